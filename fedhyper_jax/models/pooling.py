"""Pooling of images whose gradients are fast inside loops on CPU; else flax's functions, arguments and all.

The gradient that JAX derives of ``lax.reduce_window`` is a scatter (maximum) or another ``reduce_window`` (mean), and
XLA:CPU runs both number by number. Here each pixel collects what the windows that see it send back, which is a few
comparisons and sums of shifted arrays: several times faster in a training loop (docs/layers.md).
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from jax import lax
from jaxtyping import Array, Float

from fedhyper_jax.models.layers import Pair, _pads, _pair

Padding = Literal["SAME", "VALID"] | Sequence[Pair]


class _Window(NamedTuple):
    """Where windows lie; pairs are (height, width). Hashable, so static under jit."""

    size: Pair
    strides: Pair
    pads: tuple[Pair, Pair]


def _padded(x: Array, pads: Sequence[Pair], fill: float) -> Array:
    return lax.pad(x, jnp.asarray(fill, x.dtype), ((0, 0, 0), *((*pair, 0) for pair in pads), (0, 0, 0)))


def _counts(size: Sequence[int], window: _Window) -> Pair:
    """Windows along height and width: floor((padded image − window) / stride) + 1."""
    rows, columns = ((n + sum(pads) - k) // s + 1 for n, k, s, pads in zip(size, *window, strict=True))
    return rows, columns


def _taps(x: Array, window: _Window, fill: float) -> list[Float[Array, "batch rows columns channels"]]:
    """Pixels that each entry of the window sees: per entry one array of all windows."""
    ends = [(m - 1) * s + 1 for m, s in zip(_counts(x.shape[1:3], window), window.strides, strict=True)]
    x, (down, right) = _padded(x, window.pads, fill), window.strides
    entries = itertools.product(*map(range, window.size))
    return [x[:, a : a + ends[0] : down, b : b + ends[1] : right] for a, b in entries]


def _collected(window: _Window, size: Pair, share: Array, x: Array | None = None, y: Array | None = None) -> Array:
    """Gradient of the pixels if each window sends its ``share`` to all that it sees, or to those of x that equal its y.

    Along one axis pixel s·q + r of the padded image is entry a = r + s·t of window q − t, for all t with a < window.
    So the pixels of one remainder r form an image, and this image meets the arrays of the windows shifted by t.
    """
    (height, width), (down, right), pads = window
    if window.size == window.strides and pads == ((0, 0), (0, 0)):
        return _collected_alone(window.size, size, share, x, y)
    cells = [-(-(n + sum(p)) // s) for n, s, p in zip(size, window.strides, pads, strict=True)]
    most = [(k - 1) // s for k, s in zip(window.size, window.strides, strict=True)]
    grown = [(p, q * s - n - p) for n, q, s, (p, _) in zip(size, cells, window.strides, pads, strict=True)]
    margins = [(t, q - m) for t, q, m in zip(most, cells, share.shape[1:3], strict=True)]
    share = _padded(share, margins, 0)
    if y is not None:
        x, y = _padded(x, grown, 0), _padded(y, margins, jnp.nan)  # NaN: no pixel equals a window that is not there

    def image(*remainder):
        total = jnp.zeros((share.shape[0], *cells, share.shape[3]), share.dtype)
        for a, b in itertools.product(range(remainder[0], height, down), range(remainder[1], width, right)):
            i, j = most[0] - a // down, most[1] - b // right
            shifted = slice(None), slice(i, i + cells[0]), slice(j, j + cells[1])
            sent = share[shifted]
            if y is not None:
                sent = jnp.where(x[:, remainder[0] :: down, remainder[1] :: right] == y[shifted], sent, 0)
            total += sent
        return total

    dx = jnp.stack([jnp.stack([image(a, b) for b in range(right)], 3) for a in range(down)], 2)
    dx = dx.reshape(share.shape[0], cells[0] * down, cells[1] * right, share.shape[3])
    return _padded(dx, [(-before, -after) for before, after in grown], 0)


def _collected_alone(window: Pair, size: Pair, share: Array, x: Array | None, y: Array | None) -> Array:
    """`_collected` where no pixel is seen by two windows: one pass instead of one for each entry of a window."""
    rows, columns = share.shape[1] * window[0], share.shape[2] * window[1]

    def upsampled(a):
        return jnp.repeat(jnp.repeat(a, window[0], 1), window[1], 2)

    dx = upsampled(share)
    if y is not None:
        dx = jnp.where(x[:, :rows, :columns] == upsampled(y), dx, 0)
    return _padded(dx, ((0, size[0] - rows), (0, size[1] - columns)), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_pool(window: _Window, x: Array) -> Array:
    return functools.reduce(jnp.maximum, _taps(x, window, -jnp.inf))


def _max_forward(window, x):
    y = _max_pool(window, x)
    return y, (x, y)


def _max_backward(window, residuals, g):
    # Winners are found again by comparison with the maximum: keeping them would cost an array per entry.
    x, y = residuals
    winners = sum((tap == y).astype(g.dtype) for tap in _taps(x, window, -jnp.inf))
    return (_collected(window, x.shape[1:3], g / winners, x, y),)


_max_pool.defvjp(_max_forward, _max_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_pool(window: _Window, size: Pair, x: Array) -> Array:
    return functools.reduce(jnp.add, _taps(x, window, 0))


_sum_pool.defvjp(
    lambda window, size, x: (_sum_pool(window, size, x), None),
    lambda window, size, _, g: (_collected(window, size, g),),
)


def _window(x: Array, window_shape: Pair, strides: Pair | None, padding: Padding) -> _Window:
    size = _pair("window_shape", window_shape)
    strides = (1, 1) if strides is None else _pair("strides", strides)
    if jnp.ndim(x) < 3:
        raise ValueError(f"inputs must be (..., height, width, channels), got shape {jnp.shape(x)}; add missing axes")
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f"unknown padding {padding!r}; known: SAME, VALID, or ((top, bottom), (left, right))")
        padding = lax.padtype_to_pads(x.shape[-3:-1], size, strides, padding)
    window = _Window(size, strides, _pads(padding))
    if min(_counts(x.shape[-3:-1], window)) < 1:
        raise ValueError(f"images of {x.shape[-3:-1]} hold no window of {size}; pool less or use larger images")
    return window


def _is_ours(x: Array, window_shape: Sequence[int]) -> bool:
    """Whether these are images; flax's own functions take volumes, sequences and integers."""
    images = not isinstance(window_shape, Sequence) or len(window_shape) == 2
    return images and jnp.issubdtype(x.dtype, jnp.floating)


def max_pool(
    inputs: Float[Array, "*batch height width channels"],
    window_shape: Pair,
    strides: Pair | None = None,
    padding: Padding = "VALID",
) -> Float[Array, "*batch rows columns channels"]:
    """Maximum over windows: ``flax.linen.max_pool`` with a gradient that is fast in loops on CPU.

    y[n,i,j,c] = max_{a<h, b<w} x[n, s_h·i + a − p_h, s_w·j + b − p_w, c], outside the image −∞. Where several entries
    attain the maximum, the gradient is split evenly between them: the centre of the subdifferential
    conv{e_m : x_m = max x}, and the convention of ``jnp.max``. flax gives all of it to the first. After a ReLU, ties
    are zeros, through which no gradient passes either way.

    Args:
      inputs: images (..., height, width, channels). Integers, and windows of another rank than 2, go to flax's own.
      window_shape: (h, w) in pixels.
      strides: (s_h, s_w), pixels between two windows; (1, 1) if None, as in flax.
      padding: "VALID" (p = 0; what is left of the image is cut off), "SAME" (⌈size / stride⌉ outputs) or
        ((top, bottom), (left, right)) in pixels.

    Returns:
      (..., rows, columns, channels).

    Raises:
      ValueError: inputs have fewer than three axes, a setting is malformed, the window is larger than the image.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedhyper_jax.models import max_pool
      >>> print(max_pool(jnp.arange(20.0).reshape(1, 4, 5, 1), (2, 2), strides=(2, 2))[0, :, :, 0])
      [[ 6.  8.]
       [16. 18.]]

    Reference: Flax, https://flax.readthedocs.io.
    """
    if not _is_ours(inputs, window_shape):
        return linen.max_pool(inputs, window_shape, strides, padding)
    window = _window(inputs, window_shape, strides, padding)
    y = _max_pool(window, inputs.reshape(-1, *inputs.shape[-3:]))
    return y.reshape(*inputs.shape[:-3], *y.shape[1:])


def avg_pool(
    inputs: Float[Array, "*batch height width channels"],
    window_shape: Pair,
    strides: Pair | None = None,
    padding: Padding = "VALID",
    count_include_pad: bool = True,
) -> Float[Array, "*batch rows columns channels"]:
    """Mean over windows: ``flax.linen.avg_pool`` with a gradient that is fast in loops on CPU.

    y[n,i,j,c] = (1/N_ij) Σ_{a<h, b<w} x[n, s_h·i + a − p_h, s_w·j + b − p_w, c], outside of the image 0, where N_ij is
    h·w, or without ``count_include_pad`` the number of entries inside the image.

    Args:
      inputs: images (..., height, width, channels). Integers, and windows of another rank than 2, go to flax's own.
      window_shape: (h, w) in pixels.
      strides: (s_h, s_w), pixels between two windows; (1, 1) if None, as in flax.
      padding: as for `max_pool`.
      count_include_pad: whether the zeros outside of the image count.

    Returns:
      (..., rows, columns, channels).

    Raises:
      ValueError: inputs have fewer than three axes, a setting is malformed, the window is larger than the image.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedhyper_jax.models import avg_pool
      >>> print(avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2), strides=(2, 2))[0, :, :, 0])
      [[ 2.5  4.5]
       [10.5 12.5]]

    Reference: Flax, https://flax.readthedocs.io.
    """
    if not _is_ours(inputs, window_shape):
        return linen.avg_pool(inputs, window_shape, strides, padding, count_include_pad)
    window = _window(inputs, window_shape, strides, padding)
    x = inputs.reshape(-1, *inputs.shape[-3:])
    y = _sum_pool(window, x.shape[1:3], x)
    if count_include_pad:
        y = y / (window.size[0] * window.size[1])
    else:
        y = y / functools.reduce(jnp.add, _taps(jnp.ones((1, *x.shape[1:3], 1), x.dtype), window, 0))
    return y.reshape(*inputs.shape[:-3], *y.shape[1:])
