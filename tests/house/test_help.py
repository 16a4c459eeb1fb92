"""What help() and the prompt show: the fields of public named tuples and dataclasses, in words."""

import dataclasses
import inspect
import re
import types

import pytest

import fedhyper_jax as fh


def public_classes():
    """All that can be reached from the package's face through names without an underscore."""
    modules, classes = [fh], []
    for module in modules:
        for name in getattr(module, "__all__", None) or [name for name in vars(module) if name[0] != "_"]:
            value = getattr(module, name)
            if not getattr(value, "__module__", getattr(value, "__name__", "")).startswith("fedhyper_jax"):
                continue
            if isinstance(value, types.ModuleType) and value not in modules:
                modules.append(value)
            elif inspect.isclass(value) and (dataclasses.is_dataclass(value) or hasattr(value, "_fields")):
                classes.append(value)
    return sorted(set(classes), key=lambda cls: cls.__qualname__)


@pytest.mark.parametrize("cls", public_classes(), ids=lambda cls: cls.__qualname__)
def test_every_field_is_named_in_the_docstring(cls):
    fields = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else cls._fields
    if hasattr(cls, "setup"):  # one of linen's modules, which says of its own fields only
        fields = set(fields) - {name for base in cls.__mro__[1:] for name in inspect.get_annotations(base)}
        fields -= {"parent", "name"}
    for name in fields:
        assert re.search(rf"^ +(\w+, )*{name}(, \w+)*: \S", cls.__doc__, re.M), f"{cls.__qualname__}.{name}"


def test_the_classes_are_found():
    names = {cls.__name__ for cls in public_classes()}
    assert {"RoundInfo", "History", "FederatedData", "RateRule", "AdaptiveRate", "Mean", "StrategyTiming"} <= names


def test_a_round_has_its_numbers_in_help():
    assert "      participants: clients whose update entered the average.\n" in fh.RoundInfo.__doc__
