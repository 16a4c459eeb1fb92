"""Argument checks that run before any tracing; each message names the argument, its value and the remedy.

Traced values pass unchecked: a sweep under ``vmap`` or ``jit`` hands tracers to the factories.
"""

import difflib
import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_traced(*values: Any) -> bool:
    """Whether any of the values is known only when the traced program runs."""
    return any(isinstance(value, jax.core.Tracer) for value in values)


def _scalars(**arguments: Any) -> dict[str, float]:
    """Concrete arguments as floats; an array of several rates (a sweep) is a caller's error here."""
    concrete = {}
    for name, value in arguments.items():
        if is_traced(value):
            continue
        array = np.asarray(value)
        # (bfloat16 is of kind V to NumPy)
        if array.shape != () or not (array.dtype.kind in "fiu" or jnp.issubdtype(array.dtype, jnp.floating)):
            raise ValueError(f"{name} must be a real number, got {value!r}; to try several values, vmap over them")
        concrete[name] = float(array)
    return concrete


def _fits_float32(name: str, value: float) -> None:
    """float32, the dtype of rates, may hold the value neither as infinity nor as a zero that it is not."""
    with np.errstate(over="ignore"):
        rounded = np.float32(value)
    if not np.isfinite(rounded) or (rounded == 0 and value != 0):
        raise ValueError(f"{name} must lie in the range of float32, got {value!r}; give a number from 1e-38 to 3e38")


def positive(**arguments: Any) -> None:
    """Each argument is finite and > 0."""
    for name, value in _scalars(**arguments).items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and > 0, got {value!r}; give a positive number such as 0.1")
        _fits_float32(name, value)


def non_negative(**arguments: Any) -> None:
    """Each argument is finite and ≥ 0."""
    for name, value in _scalars(**arguments).items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and ≥ 0, got {value!r}; give 0 or a positive number")
        _fits_float32(name, value)


def finite(**arguments: Any) -> None:
    """Each argument is finite."""
    for name, value in _scalars(**arguments).items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}; give a number such as 0.0")
        _fits_float32(name, value)


def decay(**arguments: Any) -> None:
    """Each argument lies in [0, 1)."""
    for name, value in _scalars(**arguments).items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value!r}; give a decay such as 0.9")


def probability(**arguments: Any) -> None:
    """Each argument lies in [0, 1)."""
    for name, value in _scalars(**arguments).items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be a probability in [0, 1), got {value!r}; 0.1 is one in ten")


def fraction(**arguments: Any) -> None:
    """Each argument lies strictly between 0 and 1."""
    for name, value in _scalars(**arguments).items():
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}; give a fraction such as 0.2")


def positive_integer(**arguments: Any) -> None:
    """Each argument is an integer ≥ 1."""
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be an integer ≥ 1, got {value!r}; give a whole number such as 10")
        if value >= 2**31:
            raise ValueError(f"{name} must be below 2**31, got {value!r}; counts are int32")


def fits(values: Any, *, name: str) -> None:
    """JAX's dtype holds the numbers of an array, but for ordinary rounding; it has 32 bits where NumPy's has 64.

    Refused are integers out of range, finite numbers that become infinite, and integers stored as floats that become
    others: numbers from 2^24 to 2^53 that are whole, all of them, and not all representable. Arrays of JAX are past
    that already. Of most arrays it takes the smallest and the largest number, and copies nothing.
    """
    if isinstance(values, jax.Array):
        return
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" or array.size == 0:
        return
    if array.dtype.itemsize > 8:
        raise ValueError(f"{name} must be of at most 64 bits, got dtype {array.dtype}; use astype(np.float64)")
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
    if dtype == array.dtype:
        return
    low, high = array.min(), array.max()
    if dtype.kind == "f":
        if not max(-low, high) <= 2**24:  # also true for NaN
            _keeps_floats(array, dtype, name)
    elif low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
        wrong = (array < np.iinfo(dtype).min) | (array > np.iinfo(dtype).max)
        _raise_changed(array, wrong, f"which {dtype} cannot hold; renumber or scale it", name)


def _keeps_floats(array: np.ndarray, dtype: np.dtype, name: str) -> None:
    """The part of `fits` for floats beyond 2^24."""
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype)
    overflows = np.isinf(rounded) & np.isfinite(array)
    if overflows.any():
        _raise_changed(array, overflows, f"which {dtype} cannot hold; scale it", name)
    size = np.abs(array)
    large = (size > 2**24) & (size <= 2**53)
    changed = large & (rounded != array)
    if changed.any() and (np.floor(array) == array)[large].all():
        why = f"a whole number that {dtype} rounds; renumber or scale it, use astype(np.{dtype}) if that is meant"
        _raise_changed(array, changed, why, name)


def _raise_changed(array: np.ndarray, wrong: np.ndarray, why: str, name: str) -> None:
    index = tuple(np.argwhere(wrong)[0])
    place = f" in row {index[0]}" if index else ""
    raise ValueError(
        f"{name} has {array[index].item()!r}{place}, {why}, or keep 64 bits with "
        "jax.config.update('jax_enable_x64', True)"
    )


def bounds(value: Any, *, initial_rate: Any, name: str = "bounds", rate_name: str = "initial_rate") -> tuple:
    """A pair with 0 ≤ lower ≤ initial_rate ≤ upper ≤ ∞; returned as it came."""
    try:
        lower, upper = value
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (lower, upper), got {value!r}; e.g. (0.1, 10.0)") from None
    given = _scalars(lower=lower, upper=upper)
    low, high = given.get("lower", 0.0), given.get("upper", math.inf)
    if not 0 <= low <= high:  # also false for NaN
        raise ValueError(f"{name} must satisfy 0 ≤ lower ≤ upper, got {value!r}; e.g. (0.1, 10.0)")
    if not is_traced(initial_rate) and not low <= float(initial_rate) <= high:
        raise ValueError(
            f"{rate_name} must lie inside {name}, got {rate_name}={float(initial_rate)!r} "
            f"and {name}=({low!r}, {high!r}); "
            "widen the bounds, start inside them, or give them relative to the initial rate"
        )
    return lower, upper


def one_of(known: Iterable[str], **argument: Any) -> None:
    """The argument is one of the known names."""
    ((name, value),) = argument.items()
    names = list(known)
    if value not in names:
        raise ValueError(f"unknown {name} {value!r}; {instead_of(value, names)}")


def instead_of(value: Any, known: Iterable[str]) -> str:
    """What a message offers instead of an unknown name: the nearest one first, then all.

    Example:
      >>> instead_of("fedxep", ["fedavg", "fedprox", "fedexp"])
      'did you mean fedexp? known: fedavg, fedprox, fedexp'
      >>> instead_of("paint", [])
      'known: none'
    """
    names = list(map(str, known))
    return f"{did_you_mean(value, names)}known: {', '.join(names) or 'none'}"


def did_you_mean(value: Any, known: Iterable[str]) -> str:
    """The question that begins an offer: the name nearest to a misspelled one; empty where all are far.

    Example:
      >>> did_you_mean("FedExP", ["fedavg", "fedexp"])
      'did you mean fedexp? '
    """
    spelled: dict[str, str] = {}
    for name in known:
        spelled.setdefault(name.lower().lstrip("-"), name)  # (all options are alike in their dashes)
    near = difflib.get_close_matches(str(value).lower().lstrip("-"), spelled, n=1, cutoff=0.65)
    return f"did you mean {spelled[near[0]]}? " if near else ""


def installed(what: str, *packages: str) -> None:
    """The packages, by the names that Python imports, are there that something needs beside those of the transforms.

    Example:
      >>> installed("a picture", "numpy", "no_such_package")
      Traceback (most recent call last):
      ModuleNotFoundError: a picture needs no_such_package, not installed: pip install 'fedhyper-jax[all]'
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        message = f"{what} needs {', '.join(missing)}, not installed: pip install 'fedhyper-jax[all]'"
        raise ModuleNotFoundError(message, name=missing[0])
