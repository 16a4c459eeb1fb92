"""Pooling over windows that do not overlap, with gradients that are cheap on CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fedhyper_jax.models.layers import Pair, _pair


def _windows(x: Array, window: Pair) -> Float[Array, "batch rows window_height columns window_width channels"]:
    """The whole windows of an image; rows and columns left over at the bottom and the right are cut off."""
    (rows, columns), (height, width) = (x.shape[1] // window[0], x.shape[2] // window[1]), window
    x = x[:, : rows * height, : columns * width]
    return x.reshape(x.shape[0], rows, height, columns, width, x.shape[3])


def _checked(x: Array, window: Pair) -> Pair:
    window = _pair("window", window)
    if jnp.ndim(x) != 4:
        raise ValueError(f"x must be (batch, height, width, channels), got shape {jnp.shape(x)}; add the missing axes")
    if x.shape[1] < window[0] or x.shape[2] < window[1]:
        raise ValueError(f"images of {x.shape[1:3]} hold no window of {window}; pool less or use larger images")
    return window


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _max_pool(window: Pair, x: Array) -> Array:
    return _windows(x, window).max((2, 4))


def _forward(window, x):
    y = _max_pool(window, x)
    return y, (x, y)


def _backward(window, residuals, g):
    # JAX's own gradient of the maximum does the same sums, but costs a fifth of a training step: it makes an array of
    # the winners and divides it at full size. Here equality with the maximum is recomputed where it is used, and the
    # gradient is divided by the number of winners at the size of the output.
    x, y = residuals
    windows = _windows(x, window)
    wins = [windows[:, :, a, :, b] == y for a in range(window[0]) for b in range(window[1])]
    share = g / sum(win.astype(g.dtype) for win in wins)
    dx = jnp.where(windows == y[:, :, None, :, None], share[:, :, None, :, None], 0)
    dx = dx.reshape(x.shape[0], y.shape[1] * window[0], y.shape[2] * window[1], x.shape[3])
    return (jnp.pad(dx, ((0, 0), (0, x.shape[1] - dx.shape[1]), (0, x.shape[2] - dx.shape[2]), (0, 0))),)


_max_pool.defvjp(_forward, _backward)


def max_pool(
    x: Float[Array, "batch height width channels"], window: Pair = (2, 2)
) -> Float[Array, "batch rows columns channels"]:
    """Maximum over windows that do not overlap (stride = window); what is left of the image is cut off ("VALID").

    y[n,i,j,c] = max_{a<h, b<w} x[n, h·i + a, w·j + b, c]. Where several entries attain the maximum, the gradient is
    split evenly between them: the centre of the subdifferential conv{e_m : x_m = max x}, and the convention of
    ``jnp.max`` (``lax.reduce_window`` gives all of it to the first).

    Args:
      x: images (batch, height, width, channels).
      window: (h, w) in pixels.

    Returns:
      (batch, height // h, width // w, channels).

    Raises:
      ValueError: x is not of rank 4, the window is malformed or larger than the image.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedhyper_jax.models import max_pool
      >>> print(max_pool(jnp.arange(20.0).reshape(1, 4, 5, 1))[0, :, :, 0])
      [[ 6.  8.]
       [16. 18.]]
    """
    return _max_pool(_checked(x, window), x)


def avg_pool(
    x: Float[Array, "batch height width channels"], window: Pair = (2, 2)
) -> Float[Array, "batch rows columns channels"]:
    """Mean over windows that do not overlap (stride = window); what is left of the image is cut off ("VALID").

    y[n,i,j,c] = (1 / h·w) Σ_{a<h, b<w} x[n, h·i + a, w·j + b, c].

    Args:
      x: images (batch, height, width, channels).
      window: (h, w) in pixels.

    Returns:
      (batch, height // h, width // w, channels).

    Raises:
      ValueError: x is not of rank 4, the window is malformed or larger than the image.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedhyper_jax.models import avg_pool
      >>> print(avg_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0])
      [[ 2.5  4.5]
       [10.5 12.5]]
    """
    return _windows(x, _checked(x, window)).mean((2, 4))
