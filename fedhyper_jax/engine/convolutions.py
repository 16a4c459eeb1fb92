"""Finds the convolutions of a traced program that XLA:CPU will run as a naive loop.

XLA:CPU has one fast convolution kernel, for NHWC images and an HWIO kernel. It brings other forms into this one only in
the entry computation: in the body of a loop they stay as they are (docs/layers.md). Measured on one AVX-512 core with
JAX 0.10.2: such a loop does about 3 GFLOP/s, the fast kernel up to 80.

- Any order of dimensions but the fast one is slow, for inputs of one, two or three spatial dimensions and of every
  floating dtype; both gradients that JAX derives of a convolution have another order.
- ``batch_group_count`` > 1 is slow in any order: the kernel gradient of a grouped convolution.
- Kernels of 1×1 become matrix products, and at most four channels a group are no faster in the fast form.
- A scan is a loop even if it runs once; one that is unrolled altogether (``unroll=True``) is none.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr

# Below this, the naive loop is within a factor of two of the fast kernel: both take some 50 µs.
_FEWEST_MULTIPLY_ADDS = 100_000
NAIVE_MULTIPLY_ADDS_PER_SECOND = 1.5e9


class PlainConvolution(NamedTuple):
    """A convolution in the body of a loop that XLA:CPU will run naively."""

    layer: str  # flax's path of the layer, or "" where nothing named it
    form: str  # such as "NCHW, OIHW -> NCHW"
    input_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    multiply_adds: int

    def __str__(self) -> str:
        where = f"{self.layer}: " if self.layer else ""
        return f"{where}{self.form} of {self.input_shape} by {self.kernel_shape}"


def plain_convolutions(jaxpr: ClosedJaxpr | Jaxpr) -> tuple[PlainConvolution, ...]:
    """The convolutions inside loops of a program that XLA:CPU will run as naive loops.

    Looks into scan, while, cond, jit, shard_map, checkpoint and the custom rules; of ``lax.platform_dependent`` only
    into the CPU's branch. Convolutions outside of loops are left out, for XLA brings them into the fast form.

    Args:
      jaxpr: from ``jax.make_jaxpr(function)(*arguments)`` or ``jax.jit(function).trace(*arguments).jaxpr``.

    Returns:
      One entry per equation, in the order of the program; () if all is well.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def step(kernel, x):
      ...     y = jax.lax.conv(x, kernel, (1, 1), "SAME")
      ...     return kernel - jnp.mean(y), None
      >>> kernel, xs = jnp.zeros((16, 8, 3, 3)), jnp.zeros((5, 4, 8, 14, 14))
      >>> program = jax.make_jaxpr(lambda kernel, xs: jax.lax.scan(step, kernel, xs))(kernel, xs)
      >>> print(*plain_convolutions(program))
      NCHW, OIHW -> NCHW of (4, 8, 14, 14) by (16, 8, 3, 3)
    """
    return tuple(_walk(jaxpr, looped=False))


def _walk(jaxpr: ClosedJaxpr | Jaxpr, looped: bool) -> Iterator[PlainConvolution]:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "conv_general_dilated":
            if looped and not _is_fast(equation):
                yield _described(equation)
            continue
        inside = looped or name == "while" or (name == "scan" and not _is_unrolled(params))
        for inner in _jaxprs_on_cpu(params):
            yield from _walk(inner, inside)


def _is_unrolled(params: dict[str, Any]) -> bool:
    return params["unroll"] >= params["length"] > 1


def _jaxprs_on_cpu(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    platforms = params.get("branches_platforms")
    if platforms is not None:  # lax.platform_dependent: a branch is for the platforms that it names, or the default
        ours = [i for i, names in enumerate(platforms) if names is not None and "cpu" in names]
        ours = ours or [i for i, names in enumerate(platforms) if names is None]
        yield from (params["branches"][i] for i in ours)
        return
    for value in params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, ClosedJaxpr | Jaxpr):
                yield inner


def _is_fast(equation) -> bool:
    """Whether the loop is no slower than the fast kernel would be (this module's docstring)."""
    params, kernel = equation.params, equation.invars[1].aval.shape
    numbers, last = params["dimension_numbers"], len(kernel) - 1
    lhs, rhs, out = (
        numbers.lhs_spec,
        numbers.rhs_spec,
        numbers.out_spec,
    )  # (batch, feature, space...), (out, in, space...)
    if params["batch_group_count"] == 1:
        batch_first = lhs[:2] == out[:2] == (0, last) and rhs[:2] == (last, last - 1)
        if batch_first and lhs[2:] == out[2:] == tuple(axis + 1 for axis in rhs[2:]):
            return True
        narrow = params["feature_group_count"] > 1 and kernel[rhs[1]] <= 4 and lhs[0] == 0  # no gradient of a kernel
        if narrow or math.prod(kernel[axis] for axis in rhs[2:]) == 1:
            return True
    return _multiply_adds(equation) < _FEWEST_MULTIPLY_ADDS


def _multiply_adds(equation) -> int:
    kernel, rhs = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
    return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[axis] for axis in rhs[1:])


def _described(equation) -> PlainConvolution:
    numbers = equation.params["dimension_numbers"]
    specs = (numbers.lhs_spec, "NC"), (numbers.rhs_spec, "OI"), (numbers.out_spec, "NC")
    lhs, rhs, out = (_letters(spec, names) for spec, names in specs)
    shapes = (tuple(variable.aval.shape) for variable in (*equation.invars[:2], equation.outvars[0]))
    return PlainConvolution(_layer(equation), f"{lhs}, {rhs} -> {out}", *shapes, _multiply_adds(equation))


def _letters(spec: tuple[int, ...], names: str) -> str:
    names = names + "DHW"[5 - len(spec) :]
    return "".join(names[spec.index(axis)] for axis in range(len(spec)))


def _layer(equation) -> str:
    # flax opens a scope for each module; transformations wrap their names around: "transpose(jvp(Net))/Conv_0".
    scopes = str(getattr(getattr(equation, "source_info", None), "name_stack", ""))
    return re.sub(r"\w+\(|\)", "", scopes)
