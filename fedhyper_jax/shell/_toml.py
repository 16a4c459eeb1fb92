"""Dataclasses to TOML tables and back, exactly and strictly: what a file misspells is refused, not ignored."""

import dataclasses
import types
import typing
from typing import Any

from fedhyper_jax import _validate

_NAMES = {str: "a string", bool: "true or false", int: "an integer", float: "a number"}


def table_of(config: Any) -> dict[str, Any]:
    """The nested TOML table of a configuration. Fields that are None are left out: TOML has no null."""
    table = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            table[field.name] = table_of(value)
        elif value is not None:
            table[field.name] = list(value) if isinstance(value, tuple) else value
    return table


def from_table(cls: type, table: dict[str, Any], where: str = "") -> Any:
    """A configuration from its table; fields that the table lacks take their defaults.

    Raises:
      ValueError: an unknown key, which lists the known ones, or a value of a wrong type, which names the key.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)  # without Annotated
    values = {}
    for key, value in table.items():
        if key not in fields:
            kind = f"key {key!r} in [{where}]" if where else f"table {key!r}"
            raise ValueError(f"unknown {kind}; {_validate.instead_of(key, fields)}")
        values[key] = _convert(hints[key], value, f"{where}.{key}" if where else key)
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    is_dict = typing.get_origin(hint) is dict
    if (is_dict or dataclasses.is_dataclass(hint)) and not isinstance(value, dict):
        raise ValueError(f"{where} must be a table, got {value!r}; write it as [{where}] with its keys below")
    if is_dict:
        _, kind = typing.get_args(hint)
        return {key: _convert(kind, entry, f"{where}.{key}") for key, entry in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_table(hint, value, where)
    matches = [_match(kind, value) for kind in kinds(hint)]
    for matched, converted in matches:
        if matched:
            return converted
    expected = " or ".join(describe(kind) for kind in kinds(hint))
    raise ValueError(f"{where} must be {expected}, got {value!r}")


def kinds(hint: Any) -> list[Any]:
    """The members of a union, None apart: a file says None by leaving the key out."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return [hint]


def _match(kind: Any, value: Any) -> tuple[bool, Any]:
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if not isinstance(value, list):
            return False, None
        wanted = [parts[0]] * len(value) if parts[-1] is Ellipsis else list(parts)
        if len(wanted) != len(value):
            return False, None
        entries = [_match(part, entry) for part, entry in zip(wanted, value, strict=True)]
        return all(matched for matched, _ in entries), tuple(converted for _, converted in entries)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return True, float(value)
        except OverflowError:
            return False, None
    # bool is a subclass of int, but `rounds = true` is a mistake
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), value


def describe(kind: Any) -> str:
    """What a value of a member of a union is called in messages.

    Example:
      >>> describe(float), describe(tuple[int, ...]), describe(tuple[float, float])
      ('a number', 'a list of integers', 'a list of 2 numbers')
    """
    if typing.get_origin(kind) is not tuple:
        return _NAMES[kind]
    parts = typing.get_args(kind)
    plural = {"a string": "strings", "an integer": "integers", "a number": "numbers"}[_NAMES[parts[0]]]
    return f"a list of {plural}" if parts[-1] is Ellipsis else f"a list of {len(parts)} {plural}"
