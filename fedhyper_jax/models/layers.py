"""Convolution that stays fast inside a loop and under ``vmap``, on CPU.

Federated training runs convolutions inside ``lax.scan`` (local steps), mostly under ``vmap`` (clients, seeds). Plain
``lax.conv_general_dilated`` is a trap there, for two reasons:

1. XLA:CPU rewrites convolutions into the one form its fast kernel takes (NHWC input, HWIO kernel, NHWC output) only in
   the entry computation. In a loop body any other form runs as a naive loop, and both gradients that JAX derives are
   of other forms. So the gradients here are written as convolutions of the fast form, transposes and all.
2. ``vmap`` over kernels makes one grouped convolution of the clients', 3-6 times slower than one client after the
   other. So each product has its own ``vmap`` rule: one after the other on CPU.

Other platforms have other traps; `forms` says which form is taken where.

Client-steps/s of CNN training (batch 32, 28×28×1, 5×5 kernels, 16 and 32 channels) in a scan on one core of a
two-core AVX-512 machine, JAX 0.10.2 / 0.12.0: plain 6 / 6; these layers 180 / 150, vmapped over ten clients 120 / 106.
Then gradients towards kernels came in parts (`_in_parts`) and pools in one pass: a sixth more on an AVX2 machine.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap, sequential_vmap
from jaxtyping import Array, Float

from fedhyper_jax.models.forms import Forms, by_platform

Pair = tuple[int, int]


class _Window(NamedTuple):
    """A convolution apart from its operands; pairs are (height, width). Hashable, so static under jit."""

    strides: Pair
    pads: tuple[Pair, Pair]  # (before, after) of height and of width; negative ones crop
    input_dilation: Pair  # input_dilation − 1 zeros between input pixels: where gradients of strides end up
    kernel_dilation: Pair
    groups: int


def _client_by_client(product: Callable) -> Callable:
    """``product(x, kernel)`` with the vmap rule of reason 2 above.

    A shared kernel needs no loop: the vmapped axis joins the examples.
    """
    wrapped = custom_vmap(product)

    @wrapped.def_vmap
    def rule(axis_size, is_batched, x, kernel):
        x_batched, kernel_batched = is_batched
        if not kernel_batched:
            y = wrapped(x.reshape(-1, *x.shape[2:]), kernel)
            return y.reshape(axis_size, -1, *y.shape[1:]), True

        def one_by_one(x, kernel):
            if x_batched:
                return lax.map(lambda operands: wrapped(*operands), (x, kernel))
            return lax.map(lambda k: wrapped(x, k), kernel)

        ways = {"one_by_one": one_by_one, "at_once": jax.vmap(product, in_axes=(0 if x_batched else None, 0))}
        return by_platform(lambda forms: ways[forms.clients], x, kernel), True

    return wrapped


def _sum_by_sum(product: Callable) -> Callable:
    """The same for ``product(x, g)``, a sum over examples: a gradient towards a kernel."""
    looped, wrapped = sequential_vmap(product), custom_vmap(product)

    @wrapped.def_vmap
    def rule(axis_size, is_batched, x, g):
        del axis_size
        axes = tuple(0 if batched else None for batched in is_batched)
        ways = {"one_by_one": jax.vmap(looped, axes), "at_once": jax.vmap(product, axes)}
        return by_platform(lambda forms: ways[forms.clients], x, g), True

    return wrapped


def _plain(window: _Window) -> Callable:
    """(x, kernel) -> y as JAX has it."""
    return functools.partial(
        lax.conv_general_dilated,
        window_strides=window.strides,
        padding=window.pads,
        lhs_dilation=window.input_dilation,
        rhs_dilation=window.kernel_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=window.groups,
    )


@functools.cache
def _direct(window: _Window) -> Callable:
    """(x, kernel) -> y as one convolution of the fast form."""
    return _client_by_client(_plain(window))


def _patches(x: Array, size: Pair, out: Pair, window: _Window) -> Float[Array, "taps_channels examples_pixels"]:
    """im2col, channel-major: row (a, b, c) holds what tap (a, b) of channel c sees at every output pixel."""
    x = x.transpose(3, 0, 1, 2)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), *((*pads, 0) for pads in window.pads)))

    def seen(axis, tap):
        start, stride = tap * window.kernel_dilation[axis], window.strides[axis]
        return slice(start, start + (out[axis] - 1) * stride + 1, stride)

    taps = [x[:, :, seen(0, a), seen(1, b)] for a in range(size[0]) for b in range(size[1])]
    return jnp.stack(taps).reshape(len(taps) * x.shape[0], -1)


@functools.cache
def _im2col(window: _Window) -> Callable:
    """(x, kernel) -> y as one matrix product with the patches."""

    def product(x, kernel):
        size, out = kernel.shape[:2], _output_size(x.shape[1:3], kernel.shape[:2], window)
        rows = _patches(x, size, out, window)
        y = lax.dot_general(kernel.reshape(rows.shape[0], -1), rows, (((0,), (0,)), ((), ())))
        return y.reshape(-1, x.shape[0], *out).transpose(1, 2, 3, 0)

    return _client_by_client(product)


@functools.cache
def _im2col_kernel_gradient(window: _Window, size: Pair) -> Callable:
    """(x, g) -> dW for `_im2col`. The patches are made again: keeping them was no faster, and slower under vmap."""

    def product(x, g):
        rows = _patches(x, size, g.shape[1:3], window)
        return (rows @ g.reshape(-1, g.shape[-1])).reshape(*size, x.shape[-1], -1)

    return _sum_by_sum(product)


def _takes_im2col(forms: Forms, x_shape: Sequence[int], window: _Window) -> bool:
    # The rule: a layer that reads images (grey or colour), where the direct kernel has too few channels to vectorise.
    # Steps/s of the whole CNN above, im2col / direct: 185 / 140 on JAX 0.10.2 and 156 / 127 on 0.12.0; with 32×32×3
    # images 104 / 88 and 91 / 87. The price is memory: taps · channels numbers for each output pixel.
    return x_shape[-1] <= forms.im2col_channels and window.groups == 1 and window.input_dilation == (1, 1)


def _output_size(size: Sequence[int], kernel_size: Sequence[int], window: _Window) -> Pair:
    """floor((padded image − dilated kernel) / stride) + 1, for height and width."""
    height, width = (
        ((n - 1) * e + 1 + sum(pads) - (k - 1) * d - 1) // s + 1
        for n, k, s, pads, e, d in zip(size, kernel_size, *window[:4], strict=True)
    )
    return height, width


# The three products, each differentiable by the other two, and so any number of times. Along one axis, with x̃ the input
# of n pixels after input dilation e, stride s, kernel dilation d, k taps and p pixels of padding before:
#
#   y[i] = Σ_a x̃[s·i + d·a − p] W[a],   0 ≤ i < m.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(window: _Window, x: Array, kernel: Array) -> Array:
    return by_platform(lambda forms: (_im2col if _takes_im2col(forms, x.shape, window) else _direct)(window), x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel_gradient(window: _Window, size: Pair, x: Array, g: Array) -> Array:
    at_once = functools.partial(_direct_kernel_gradient, window, size)
    ways = {
        "in_parts": functools.partial(_in_parts, at_once),
        "at_once": at_once,
        "derived": _derived_kernel_gradient(window, size),
    }

    def choose(forms):
        if _takes_im2col(forms, x.shape, window):
            return _im2col_kernel_gradient(window, size)
        return ways[forms.gradients]

    return by_platform(choose, x, g)


def _in_parts(product: Callable, x: Array, g: Array) -> Array:
    """``product(x, g)``, a sum over examples, in parts of so few that the part of g stays in a core's cache.

    The fast kernel passes over g, which is its kernel here, once for every few of x's channels and taps.
    """
    # 256 KiB: CPUs of these years have 512 KiB of L2 or more a core. docs/layers.md has parts of other sizes, measured.
    divisors = [n for n in range(1, len(g) + 1) if len(g) % n == 0]
    most = max((n for n in divisors if n * g.nbytes <= 2**18 * len(g)), default=1)
    if most == len(g):
        return product(x, g)
    parts = [array.reshape(-1, most, *array.shape[1:]) for array in (x, g)]
    return lax.map(lambda part: product(*part), parts).sum(0)


def _direct_kernel_gradient(window: _Window, size: Pair, x: Array, g: Array) -> Array:
    # dW[a] = Σ_i x̃[s·i + d·a − p] g[i]: the convolution of x̃ by g as a kernel of m taps, dilated by s, at stride d,
    # with p before; the padding q after makes its output k long: ((n−1)e + 1) + p + q − ((m−1)s + 1) = (k−1)d.
    pads = tuple(
        (p, (k - 1) * d + (m - 1) * s - (n - 1) * e - p)
        for n, m, k, s, (p, _), e, d in zip(x.shape[1:3], g.shape[1:3], size, *window[:4], strict=True)
    )
    # Channels become examples and examples become channels; each group of channels keeps to its outputs because the
    # (group, example) pairs, in this order, are the channels of a convolution with as many groups.
    x = x.reshape(*x.shape[:3], window.groups, -1).transpose(4, 1, 2, 3, 0)
    x = x.reshape(*x.shape[:3], -1)
    swapped = _Window(window.kernel_dilation, pads, window.input_dilation, window.strides, window.groups)
    return _direct(swapped)(x, g.transpose(1, 2, 0, 3)).transpose(1, 2, 0, 3)


@functools.cache
def _derived_kernel_gradient(window: _Window, size: Pair) -> Callable:
    """(x, g) -> dW as JAX has it."""

    def product(x, g):
        kernel = jax.ShapeDtypeStruct((*size, x.shape[-1] // window.groups, g.shape[-1]), x.dtype)
        return jax.linear_transpose(lambda kernel: _plain(window)(x, kernel), kernel)(g)[0]

    return _sum_by_sum(product)


@functools.cache
def _derived_input_gradient(window: _Window, size: Pair) -> Callable:
    """(g, W) -> dx as JAX has it."""

    def product(g, kernel):
        x = jax.ShapeDtypeStruct((len(g), *size, kernel.shape[2] * window.groups), kernel.dtype)
        return jax.linear_transpose(lambda x: _plain(window)(x, kernel), x)(g)[0]

    return _client_by_client(product)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _derived(window: _Window, size: Pair, kernel: Array, g: Array) -> Array:
    return _derived_input_gradient(window, size)(g, kernel)


def _derived_backward(window, size, operands, dx):
    kernel, g = operands
    return _kernel_gradient(window, kernel.shape[:2], dx, g), _convolve(window, dx, kernel)


_derived.defvjp(lambda window, size, *operands: (_derived(window, size, *operands), operands), _derived_backward)


def _input_gradient(window: _Window, size: Pair, kernel: Array, g: Array) -> Array:
    written = functools.partial(_direct_input_gradient, window, size)
    derived = functools.partial(_derived, window, size)
    return by_platform(lambda forms: derived if forms.gradients == "derived" else written, kernel, g)


def _direct_input_gradient(window: _Window, size: Pair, kernel: Array, g: Array) -> Array:
    # dx̃[j] = Σ_{i,a: s·i + d·a − p = j} g[i] W[a], and dx[h] = dx̃[e·h]: the convolution of g, dilated by s, by W back
    # to front (a -> k−1−a), dilated by d, at stride e, with (k−1)d − p before; the padding q after makes its output n
    # long: ((m−1)s + 1) + ((k−1)d − p) + q − ((k−1)d + 1) = (n−1)e.
    pads = tuple(
        ((k - 1) * d - p, (n - 1) * e - (m - 1) * s + p)
        for n, m, k, s, (p, _), e, d in zip(size, g.shape[1:3], kernel.shape[:2], *window[:4], strict=True)
    )
    taps, outputs = kernel.shape[:2], kernel.shape[3] // window.groups
    kernel = kernel[::-1, ::-1].reshape(*taps, -1, window.groups, outputs)
    kernel = kernel.transpose(0, 1, 4, 3, 2).reshape(*taps, outputs, -1)
    swapped = _Window(window.input_dilation, pads, window.strides, window.kernel_dilation, window.groups)
    return _convolve(swapped, g, kernel)


def _backward(window, operands, g):
    x, kernel = operands  # the gradient of x is dead code where x is data, and XLA drops it
    return _input_gradient(window, x.shape[1:3], kernel, g), _kernel_gradient(window, kernel.shape[:2], x, g)


def _kernel_gradient_backward(window, size, operands, dkernel):
    x, g = operands
    return _input_gradient(window, x.shape[1:3], dkernel, g), _convolve(window, x, dkernel)


_convolve.defvjp(lambda window, *operands: (_convolve(window, *operands), operands), _backward)
_kernel_gradient.defvjp(
    lambda window, size, *operands: (_kernel_gradient(window, size, *operands), operands), _kernel_gradient_backward
)


def _varying_alike(*operands: Array) -> list[Array]:
    """The operands cast so that inside ``shard_map`` all vary over the same mesh axes; a custom gradient demands it."""

    def axes_of(operand):  # JAX has moved this attribute before; where it is missing nothing is cast
        manual = getattr(jax.typeof(operand), "manual_axis_type", None)
        return getattr(manual, "varying", frozenset())

    axes = frozenset().union(*map(axes_of, operands))
    missing = [tuple(axes - axes_of(operand)) for operand in operands]
    return [lax.pcast(o, m, to="varying") if m else o for o, m in zip(operands, missing, strict=True)]


def _pair(name: str, value: Sequence[int]) -> Pair:
    try:
        height, width = (operator.index(v) for v in value)
        if min(height, width) < 1:
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair of integers ≥ 1, got {value!r}; e.g. (2, 2)") from None
    return height, width


def _pads(padding: Sequence[Pair]) -> tuple[Pair, Pair]:
    try:
        (top, bottom), (left, right) = padding
        return (operator.index(top), operator.index(bottom)), (operator.index(left), operator.index(right))
    except (TypeError, ValueError):
        raise ValueError(
            f"padding must be 'SAME', 'VALID' or integers ((top, bottom), (left, right)), got {padding!r}"
        ) from None


def convolution(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels_per_group outputs"],
    *,
    strides: Pair = (1, 1),
    padding: Literal["SAME", "VALID"] | Sequence[Pair] = "SAME",
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Float[Array, "batch out_height out_width outputs"]:
    """Two-dimensional convolution, fast inside loops and client by client under ``vmap`` (this module's docstring).

    y[n,i,j,o] = Σ_{a,b,c} x[n, s_h·i + d_h·a − p_h, s_w·j + d_w·b − p_w, c] · kernel[a,b,c,o], zero outside the image:
    what ``lax.conv_general_dilated`` computes. Reverse mode is differentiable any number of times; forward mode
    (``jax.jvp``) is not, as for every ``jax.custom_vjp``.

    Args:
      x: images (batch, height, width, channels).
      kernel: (kernel_height, kernel_width, channels / groups, outputs).
      strides: s, pixels between two outputs.
      padding: "SAME" (output ⌈size / stride⌉), "VALID" (none), or ((top, bottom), (left, right)) in pixels.
      dilation: d, pixels between two taps of the kernel.
      groups: the channels and the outputs fall into so many groups in order; each output sees its group's channels.

    Returns:
      (batch, out_height, out_width, outputs), of the operands' common dtype.

    Raises:
      ValueError: shapes do not fit each other, a setting is malformed, or no output pixel would remain.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedhyper_jax.models import convolution
      >>> y = convolution(jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1, 1)))
      >>> print(y[0, :, :, 0])
      [[4. 6. 4.]
       [6. 9. 6.]
       [4. 6. 4.]]
    """
    if jnp.ndim(x) != 4 or jnp.ndim(kernel) != 4:
        raise ValueError(
            "x must be (batch, height, width, channels) and kernel (height, width, channels / groups, outputs), "
            f"got shapes {jnp.shape(x)} and {jnp.shape(kernel)}; give a grey image its channel axis with x[..., None]"
        )
    strides, dilation = _pair("strides", strides), _pair("dilation", dilation)
    if groups < 1 or x.shape[3] != groups * kernel.shape[2] or kernel.shape[3] % groups:
        raise ValueError(
            f"x has {x.shape[3]} channels and kernel {kernel.shape[2]} → {kernel.shape[3]} with groups={groups!r}; "
            "channels must be groups × the kernel's, and the outputs a multiple of groups"
        )
    spans = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"unknown padding {padding!r}; known: SAME, VALID, or ((top, bottom), (left, right))")
        padding = lax.padtype_to_pads(x.shape[1:3], spans, strides, padding)
    pads = _pads(padding)
    window = _Window(strides, pads, (1, 1), dilation, int(groups))
    if min(_output_size(x.shape[1:3], kernel.shape[:2], window)) < 1:
        raise ValueError(
            f"a kernel spanning {tuple(spans)} pixels does not fit into images of {tuple(x.shape[1:3])} padded by "
            f"{pads}; use a smaller kernel, larger images or padding='SAME'"
        )
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    return _convolve(window, *_varying_alike(jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)))
