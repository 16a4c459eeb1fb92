"""flax linen layers that stay fast inside loops and under ``vmap``: each stands in for flax's own of the same name.

Same fields, same parameters (names, shapes, initial values), same results and gradients up to rounding; what a layer
here does not do itself, it leaves to flax's own, whose subclass it is. So a model changes layers by changing imports,
and its checkpoints still fit. They are layers of flax.linen; for flax.nnx, `convolution`, `max_pool` and `avg_pool`
are functions.

An implementation of our own is taken where it was measured to be faster, so far on CPU (docs/layers.md has the table);
`forms` says what is taken where. ``LayerNorm`` and ``Embed`` are flax's own: they were measured too, and nothing was
faster. Pooling is the same everywhere.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen import dtypes
from flax.typing import ConvGeneralDilatedT
from jax import lax
from jaxtyping import Array, Float

from fedhyper_jax.models.forms import forms_here
from fedhyper_jax.models.layers import _varying_alike, convolution

Embed = linen.Embed
LayerNorm = linen.LayerNorm


def _conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count=1,
    precision=None,
):
    """``lax.conv_general_dilated`` as flax calls it; `convolution` where that computes the same."""
    images = lhs.ndim == 4 and tuple(lhs_dilation) == (1, 1)
    if not images or precision is not None or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return lax.conv_general_dilated(
            lhs,
            rhs,
            window_strides,
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=dimension_numbers,
            feature_group_count=feature_group_count,
            precision=precision,
        )
    return convolution(
        lhs, rhs, strides=window_strides, padding=padding, dilation=rhs_dilation, groups=feature_group_count
    )


class Conv(linen.Conv):
    """``flax.linen.Conv`` on `convolution`: fast in loops on CPU, one client after the other under ``vmap``.

    y[n,i,j,o] = b[o] + Σ_{a,b,c} x[n, s_h·i + d_h·a − p_h, s_w·j + d_w·b − p_w, c] · kernel[a,b,c,o], with any strides,
    padding (circular and reflecting too), kernel dilation, groups and mask. Kernels of another rank than 2, input
    dilation, ``precision`` and complex numbers go through ``lax.conv_general_dilated`` as in flax.

    Args:
      features: outputs.
      kernel_size: (height, width); and all other fields of ``flax.linen.Conv``.

    Returns:
      From a call with (..., height, width, channels): (..., out_height, out_width, features).

    Raises:
      ValueError: from the call, if a setting is malformed or no output pixel would remain.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fedhyper_jax.models import Conv
      >>> layer = Conv(features=4, kernel_size=(3, 3), strides=2)
      >>> params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> print(jax.jit(layer.apply)(params, jnp.ones((5, 8, 8, 3))).shape, jax.tree.map(jnp.shape, params["params"]))
      (5, 4, 4, 4) {'bias': (4,), 'kernel': (3, 3, 3, 4)}

    Reference: Flax, https://flax.readthedocs.io.
    """

    conv_general_dilated: ConvGeneralDilatedT | None = None

    def __post_init__(self) -> None:
        if self.conv_general_dilated is None and self.conv_general_dilated_cls is None:
            self.conv_general_dilated = _conv_general_dilated
        super().__post_init__()


# GroupNorm. With C channels in G groups of K, P pixels, x̂ = (x − μ)r and r = (σ² + ε)^−½ per example and group:
#
#   y = x̂·scale + bias;  dx = r (g·scale − mean(g·scale) − x̂·mean(g·scale·x̂)), means over the P·K entries of a group.
#
# Both are x times one number per channel plus another (and g times a third), so nothing is cut into groups but sums
# over pixels, which are small. flax cuts x itself, over which XLA:CPU is slow.


def _of_groups(sums: Float[Array, "batch channels"], groups: int, size: int) -> Float[Array, "batch channels"]:
    """Means over the groups, of ``size`` entries each, back at every channel."""
    means = sums.reshape(sums.shape[0], groups, -1).sum(-1) / size
    return jnp.repeat(means, sums.shape[1] // groups, axis=1)


def _group_norm_forward(groups, epsilon, x, scale, bias):
    size = x[0].size // groups
    mean = _of_groups(x.sum(1), groups, size)
    variance = jnp.maximum(0, _of_groups(jnp.square(x).sum(1), groups, size) - jnp.square(mean))
    inverse = lax.rsqrt(variance + epsilon)
    factor = inverse * scale
    y = x * factor[:, None] + (bias - mean * factor)[:, None]
    return y, (x, scale, mean, inverse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _group_norm(groups: int, epsilon: float, x: Array, scale: Array, bias: Array) -> Array:
    """Of x (batch, pixels, channels)."""
    return _group_norm_forward(groups, epsilon, x, scale, bias)[0]


def _group_norm_backward(groups, epsilon, residuals, g):
    x, scale, mean, inverse = residuals
    size = x[0].size // groups
    total = g.sum(1)
    along = inverse * ((g * x).sum(1) - mean * total)  # Σ g·x̂
    shift, slope = (_of_groups(sums * scale, groups, size) for sums in (total, along))
    factor = jnp.square(inverse) * slope
    dx = g * (inverse * scale)[:, None] - x * factor[:, None] + (factor * mean - inverse * shift)[:, None]
    return dx, along.sum(0), total.sum(0)


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


class GroupNorm(linen.GroupNorm):
    """``flax.linen.GroupNorm`` with a gradient written out: 1.5 to 4 times faster in loops on CPU.

    y = (x − μ) / √(σ² + ε) · scale + bias, where μ and σ² = max(0, E[x²] − μ²) are those of an example's group of
    channels, over all pixels. Masks, ``axis_name``, other ``reduction_axes`` and ``use_fast_variance=False`` go to
    flax's own.

    Args:
      num_groups: 32 unless given; or ``group_size``, and all other fields of ``flax.linen.GroupNorm``.

    Returns:
      From a call with (batch, ..., channels): the same shape.

    Raises:
      ValueError: from the call, if the channels do not fall into so many groups.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fedhyper_jax.models import GroupNorm
      >>> layer = GroupNorm(num_groups=2)
      >>> params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 2, 1, 4)))
      >>> print(jax.jit(layer.apply)(params, jnp.arange(8.0).reshape(1, 2, 1, 4)).round()[0, :, 0])
      [[-1. -1. -1. -1.]
       [ 1.  1.  1.  1.]]

    Reference: Wu and He, "Group Normalization", ECCV 2018, arXiv 1803.08494; Flax, https://flax.readthedocs.io.
    """

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalises; ``mask`` as in flax."""
        if not self._is_ours(x, mask):
            return super().__call__(x, mask=mask)
        channels = x.shape[-1]
        groups = self.num_groups if self.num_groups is not None else channels // self.group_size
        scale = self.get_variable("params", "scale") if self.use_scale else None
        bias = self.get_variable("params", "bias") if self.use_bias else None
        dtype = dtypes.canonicalize_dtype(x, *(p for p in (scale, bias) if p is not None), dtype=self.dtype)
        exact = jnp.promote_types(dtype, jnp.float32)
        scale = jnp.ones(channels, exact) if scale is None else scale.astype(exact)
        bias = jnp.zeros(channels, exact) if bias is None else bias.astype(exact)
        flat = x.reshape(x.shape[0], -1, channels).astype(exact)
        y = _group_norm(groups, self.epsilon, *_varying_alike(flat, scale, bias))
        return y.reshape(x.shape).astype(dtype)

    def _is_ours(self, x, mask):
        plain = self.reduction_axes is None and self.axis_name is None and mask is None
        usual = self.use_fast_variance and self.force_float32_reductions and jnp.issubdtype(x.dtype, jnp.floating)
        # flax checks the settings and makes the parameters.
        return forms_here().norm == "own" and plain and usual and x.ndim >= 2 and x.size and not self.is_initializing()


# LSTM. The inputs' share of all gates is one product before the loop. Backwards the loop only carries; the gradient of
# the recurrent kernel, which JAX adds up step by step at the size of the kernel, is one product behind it.


def _lstm_forward(z, kernel, c, h):
    def step(carry, z):
        c, h = carry
        i, f, g, o = jnp.split(z + h @ kernel, 4, -1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        new_c = f * c + i * g
        new_h = o * jnp.tanh(new_c)
        return (new_c, new_h), (new_h, new_c, jnp.concatenate([i, f, g, o], -1))

    last, (hs, cs, gates) = lax.scan(step, (c, h), z)
    return (last, hs), (kernel, c, h, hs, cs, gates)


@jax.custom_vjp
def _lstm(z: Array, kernel: Array, c: Array, h: Array) -> tuple[tuple[Array, Array], Array]:
    """((last c, last h), all h) from the inputs' share z (time, ..., 4 · features) of the gates i, f, g, o."""
    return _lstm_forward(z, kernel, c, h)[0]


def _lstm_backward(residuals, cotangents):
    kernel, c, h, hs, cs, gates = residuals
    last, dhs = cotangents
    before_c, before_h = (jnp.concatenate([s[None], all_[:-1]]) for s, all_ in ((c, cs), (h, hs)))
    transposed = kernel.T

    def step(carry, inputs):
        dc, dh = carry
        dh_here, c, before, gates = inputs
        i, f, g, o = jnp.split(gates, 4, -1)
        dh, squashed = dh + dh_here, jnp.tanh(c)
        dc = dc + dh * o * (1 - jnp.square(squashed))
        di, df, dg, do = (
            dc * g * i * (1 - i),
            dc * before * f * (1 - f),
            dc * i * (1 - g * g),
            dh * squashed * o * (1 - o),
        )
        dz = jnp.concatenate([di, df, dg, do], -1)
        return (dc * f, dz @ transposed), dz

    (dc, dh), dz = lax.scan(step, last, (dhs, cs, before_c, gates), reverse=True)
    dkernel = before_h.reshape(-1, kernel.shape[0]).T @ dz.reshape(-1, kernel.shape[1])
    return dz, dkernel, dc, dh


_lstm.defvjp(_lstm_forward, _lstm_backward)


class RNN(linen.RNN):
    """``flax.linen.RNN``, whose LSTM is up to twice as fast on CPU, in loops, under ``vmap`` and outside of them.

    Its cell is flax's own: with ``OptimizedLSTMCell`` or ``LSTMCell`` (the same parameters) the inputs' products with
    the four kernels, and the gradient of the recurrent kernels, are one product each instead of one per time step:

    i, f, o = σ(W x + U h + b), g = tanh(W_g x + U_g h + b_g), c' = f·c + i·g, h' = o·tanh(c').

    Other cells, other activations, ``seq_lengths``, ``unroll`` and mixed dtypes go to flax's own loop.

    Args:
      cell: an instance of ``flax.linen.OptimizedLSTMCell``, say; and all other fields of ``flax.linen.RNN``.

    Returns:
      From a call with (..., time, features): (..., time, cell.features), after the last carry if ``return_carry``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> from fedhyper_jax.models import RNN
      >>> layer = RNN(linen.OptimizedLSTMCell(6))
      >>> params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 9, 3)))
      >>> print(jax.jit(layer.apply)(params, jnp.ones((2, 9, 3))).shape)
      (2, 9, 6)

    Reference: Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 9(8), 1997; Flax,
      https://flax.readthedocs.io.
    """

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: tuple[Array, Array] | None = None,
        init_key: Array | None = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Runs the cell over the time axis; the arguments override fields, as in flax."""
        settings = {
            "return_carry": return_carry,
            "time_major": time_major,
            "reverse": reverse,
            "keep_order": keep_order,
        }
        settings = {name: getattr(self, name) if value is None else value for name, value in settings.items()}
        time = 0 if settings["time_major"] else inputs.ndim - 2
        if self._is_plain() and seq_lengths is None and inputs.ndim >= 2:
            x = jnp.moveaxis(inputs, time, 0)
            carry = initial_carry
            if carry is None:
                key = jax.random.key(0) if init_key is None else init_key
                carry = self.cell.initialize_carry(key, x.shape[1:])
            weights = self.cell.variables["params"]
            operands = x, *carry, *jax.tree.leaves(weights)
            if len({jnp.dtype(self.cell.dtype or x.dtype), *(operand.dtype for operand in operands)}) == 1:
                carry, y = self._run(x, carry, weights, settings["reverse"])
                if settings["reverse"] and settings["keep_order"]:
                    y = y[::-1]
                y = jnp.moveaxis(y, 0, time)
                return (carry, y) if settings["return_carry"] else y
        return super().__call__(
            inputs, initial_carry=initial_carry, init_key=init_key, seq_lengths=seq_lengths, **settings
        )

    def _is_plain(self):
        usual = type(self.cell) in (linen.OptimizedLSTMCell, linen.LSTMCell)
        usual = usual and (self.cell.gate_fn, self.cell.activation_fn) == (linen.sigmoid, linen.tanh)
        usual = usual and (self.unroll, self.variable_carry, self.variable_broadcast) == (1, False, "params")
        return forms_here().rnn == "own" and usual and not self.variable_axes and not self.is_initializing()

    def _run(self, x, carry, weights, reverse):
        def all_gates(layer: str, name: str) -> Array:
            return jnp.concatenate([weights[layer + gate][name] for gate in "ifgo"], -1)

        z = (x[::-1] if reverse else x) @ all_gates("i", "kernel") + all_gates("h", "bias")
        return _lstm(*_varying_alike(z, all_gates("h", "kernel"), *carry))
