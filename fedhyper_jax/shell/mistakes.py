"""What is wrong with a command line, in one line.

tyro, which parses it, says it in boxes of several lines. So what it refuses is read once more here, with the same
dataclasses at hand, up to the first mistake.
"""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from fedhyper_jax._validate import did_you_mean
from fedhyper_jax.shell._toml import describe, kinds


def mistake(cls: type, arguments: Sequence[str], command: str) -> str:
    """The first mistake in the arguments of a command, and where help is.

    Args:
      cls: dataclass of the arguments.
      arguments: what follows the command.
      command: its name.

    Example:
      >>> from fedhyper_jax.shell.arguments import RunArguments
      >>> mistake(RunArguments, ["--local-rate", "abc"], "run")
      "--local-rate must be a number, got 'abc'; see `fedhyper run --help`"
    """
    flags, positional = _arguments_of(cls)
    found = _first_mistake(flags, positional, arguments, command)
    return f"{found}{' ' if found.endswith('?') else '; '}see `fedhyper {command} --help`"


def _arguments_of(cls: type) -> tuple[dict[str, Any], str | None]:
    """Types by flag, those of nested dataclasses too; and the name of the argument without a flag, if there is one."""
    flags, positional = {}, None
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, notes = hints[field.name], ()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *notes = typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            flags |= _arguments_of(hint)[0]
        elif tyro.conf.Positional in notes:
            positional = field.name
        else:
            name = next((note.name for note in notes if getattr(note, "name", None)), field.name).replace("_", "-")
            flags |= {f"--{name}": hint, **({f"--no-{name}": hint} if hint is bool else {})}
    return flags, positional


def _first_mistake(flags: dict[str, Any], positional: str | None, arguments: Sequence[str], command: str) -> str:
    loose, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not _is_flag(argument):
            loose.append(argument)
            continue
        written, equals, value = argument.partition("=")
        flag = written.replace("_", "-")
        if flag not in flags:
            return f"unknown option {written!r}; {did_you_mean(flag, flags)}".rstrip("; ")
        hint, values = flags[flag], [value] if equals else []
        while not equals and rest and not _is_flag(rest[0]):
            values.append(rest.pop(0))
        if positional is not None and not equals:  # what is too much may be the argument without a flag
            taken = next((n for n in range(len(values), -1, -1) if _accepts(hint, values[:n])), len(values))
            values, loose = values[:taken], loose + values[taken:]
        if not _accepts(hint, values):
            return f"{flag} {_expected(hint)}, got {' '.join(map(repr, values)) or 'nothing'}"
    if positional is not None and not loose:
        return f"`fedhyper {command}` needs a {positional}"
    extra = loose[1:] if positional is not None else loose
    return f"unexpected {extra[0]!r}; options begin with --" if extra else "the arguments could not be read"


def _is_flag(argument: str) -> bool:
    """Whether it is an option, a negative number being none."""
    return argument.startswith("-") and not _is_number(argument, float)


def _is_number(text: str, kind: type) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _accepts(hint: Any, values: Sequence[str]) -> bool:
    if type(None) in typing.get_args(hint) and list(values) == ["None"]:
        return True
    return any(_accepted(kind, values) for kind in kinds(hint))


def _accepted(kind: Any, values: Sequence[str]) -> bool:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return len(values) % 2 == 0
    if typing.get_origin(kind) is tuple:
        wanted = [parts[0]] * len(values) if parts[-1] is Ellipsis else list(parts)
        return len(wanted) == len(values) and all(
            _accepted(part, [value]) for part, value in zip(wanted, values, strict=True)
        )
    if kind is bool:
        return not values
    return len(values) == 1 and (kind is str or _is_number(values[0], kind))


def _expected(hint: Any) -> str:
    if hint is bool:
        return "takes no value"
    if typing.get_origin(hint) is dict:
        return "must be names and values in turn"
    return f"must be {' or '.join(describe(kind) for kind in kinds(hint))}"
