"""How values are told in a line: by shapes, and by numbers where these are known; never by whole arrays.

Everything here also takes what stands in the place of an array: tracers, `jax.ShapeDtypeStruct`, memory given away.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fedhyper_jax import _validate


def known(array: Any) -> np.ndarray | None:
    """The numbers of an array that this process can read now; else None.

    Example:
      >>> known(jax.ShapeDtypeStruct((3,), np.float32)), known(2.0)
      (None, array(2.))
    """
    if isinstance(array, jax.Array):
        if _validate.is_traced(array) or array.is_deleted() or not array.is_fully_addressable:
            return None
        return np.asarray(array)
    return np.asarray(array) if isinstance(array, np.ndarray | np.generic | int | float) else None


def shape(array: Any) -> tuple:
    """Of anything with one; () of anything else."""
    return tuple(getattr(array, "shape", ()))


def length(array: Any, plus: int = 0) -> str:
    """The length of a first axis, and some.

    Example:
      >>> length(np.zeros(1001), -1), length(object())
      ('1,000', '?')
    """
    return f"{shape(array)[0] + plus:,}" if shape(array) else "?"


def number(value: Any) -> str:
    """A number, the range of several, or the type of one that is not known.

    Example:
      >>> number(np.float32(0.1)), number(np.array([[3.0, np.nan, 0.25]])), number(jax.ShapeDtypeStruct((2,), np.int32))
      ('0.1', '0.25 to 3 (1 not finite)', 'int32[2]')
    """
    array = known(value)
    if array is None:
        dtype = getattr(value, "dtype", None)
        return "?" if dtype is None else f"{dtype}[{','.join(map(str, shape(value)))}]"
    array = array.astype(float).reshape(-1)
    finite = array[np.isfinite(array)]
    if not finite.size:
        return f"{array[0]:.4g}" if array.size else "none"
    low, high = finite.min(), finite.max()
    others = f" ({array.size - finite.size} not finite)" if finite.size < array.size else ""
    return (f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}") + others


def few(values: Sequence[Any], most: int = 3) -> str:
    """The first of some values.

    Example:
      >>> few(["eve", "bob"]), few(range(100))
      ("'eve', 'bob'", '0, 1, 2, …')
    """
    told = [f"{value!r:.40}" for value in values[:most]]
    return ", ".join(told + ["…"] * (len(values) > most))


def arrays(examples: Any, axes: int = 1) -> str:
    """Names, shapes and types of arrays, without their first axes.

    Example:
      >>> arrays({"x": np.zeros((5, 8, 8)), "y": np.zeros(5, np.int32)})
      'x float64[8,8], y int32[]'
    """
    if not isinstance(examples, Mapping):
        return type(examples).__name__
    return ", ".join(
        f"{name} {getattr(array, 'dtype', '?')}[{','.join(map(str, shape(array)[axes:]))}]"
        for name, array in examples.items()
    )


def parameters(tree: Any, axes: int = 0) -> str:
    """How many numbers a tree has, in how many arrays; of one run where ``axes`` say which.

    Example:
      >>> parameters({"w": np.zeros((10, 100)), "b": np.zeros(10)})
      '1,010 parameters in 2 arrays'
    """
    leaves = jax.tree.leaves(tree)
    size = sum(int(np.prod(shape(leaf)[axes:])) for leaf in leaves)
    return f"{size:,} parameter{'s' * (size != 1)} in {len(leaves)} array{'s' * (len(leaves) != 1)}"


def runs(axes: tuple) -> str:
    """The leading axes of several runs side by side; empty of one.

    Example:
      >>> runs(()), runs((4,)), runs((3, 4))
      ('', '4 runs: ', '3 × 4 runs: ')
    """
    return f"{' × '.join(map(str, axes))} runs: " if axes else ""


def name_of(function: Callable) -> str:
    """What a function is called.

    Example:
      >>> name_of(np.sum), name_of(object())
      ('sum', 'object')
    """
    return getattr(function, "__name__", type(function).__name__)


def over_rounds(title: str, columns: Mapping[str, Any]) -> str:
    """A title, and of every column of rounds its first, its last and all its values; a line where they are not known.

    Several runs have their axes before that of rounds, and a cell is the range over them.

    Example:
      >>> print(over_rounds("2 rounds", {"loss": np.array([1.5, 0.5]), "error": np.array([2.0, 0.25])}))
      <2 rounds
        number  first  last        all
        loss      1.5   0.5  0.5 to 1.5
        error       2  0.25  0.25 to 2>
    """
    rows = [("number", "first", "last", "all")]
    for name, values in columns.items():
        array = known(values)
        if array is None or array.ndim == 0:
            told = ", ".join(f"{name} {number(values)}" for name, values in columns.items())
            return f"<{title}: {told}>"
        rows.append((name, number(array[..., :1]), number(array[..., -1:]), number(array)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"  {row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([f"<{title}", *lines]) + ">"
