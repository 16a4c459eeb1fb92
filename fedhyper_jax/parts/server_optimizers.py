r"""Server optimizers of the FedOpt family, as published; optax's own differ in small print that changes results.

Each is an optax transform to be used as it stands: its update descends, with rate 1, and the global rate α multiplies
it. With m and v as below, all of them step along

.. math:: u^t = \frac{m^t}{\sqrt{v^t} + \tau}

with τ outside the root and, unless asked for, no bias correction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from fedhyper_jax import _validate
from fedhyper_jax.base import Params, Scalar


class MomentsState(NamedTuple):
    """State of `adam`, `yogi` and `adagrad`.

    Attributes:
      count: updates so far.
      first: m, the running mean of Δ.
      second: v, of Δ²: its running mean, or in adagrad its sum.
    """

    count: Int[Array, ""]
    first: Params
    second: Params


def momentum(decay: Scalar = 0.9) -> optax.GradientTransformation:
    """FedAvgM: m ← decay · m + Δ, without dampening; the update is −m.

    Reference:
      Hsu, Qi, Brown, `Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification
      <https://arxiv.org/abs/1909.06335>`_, 2019.
    """
    _validate.decay(decay=decay)
    return optax.sgd(1.0, momentum=decay)


def adagrad(adaptivity: Scalar = 1e-3, *, initial_accumulator: Scalar = 0.0) -> optax.GradientTransformation:
    """FedAdagrad: m = Δ, v ← v + Δ².

    Args:
      adaptivity: τ > 0.
      initial_accumulator: v before round 0.

    Reference:
      Reddi et al., `Adaptive Federated Optimization <https://arxiv.org/abs/2003.00295>`_, ICLR 2021.
    """
    return _adaptive(lambda v, square: v + square, 0.0, adaptivity, initial_accumulator)


def adam(
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    adaptivity: Scalar = 1e-3,
    *,
    initial_accumulator: Scalar = 0.0,
    bias_correction: bool = False,
) -> optax.GradientTransformation:
    r"""FedAdam: m ← b1 m + (1 − b1) Δ, v ← b2 v + (1 − b2) Δ².

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      adaptivity: τ > 0.
      initial_accumulator: v before round 0.
      bias_correction: whether the update is multiplied by √(1 − b2^{t+1}) / (1 − b1^{t+1}), as Flower does; the paper
        and Google's code do not.

    Reference:
      Reddi et al., `Adaptive Federated Optimization <https://arxiv.org/abs/2003.00295>`_, ICLR 2021.
    """
    _validate.decay(b2=b2)
    correction = (lambda t: jnp.sqrt(1 - b2**t) / (1 - b1**t)) if bias_correction else None
    return _adaptive(lambda v, square: b2 * v + (1 - b2) * square, b1, adaptivity, initial_accumulator, correction)


def yogi(
    b1: Scalar = 0.9, b2: Scalar = 0.99, adaptivity: Scalar = 1e-3, *, initial_accumulator: Scalar = 0.0
) -> optax.GradientTransformation:
    """FedYogi: m as `adam`, v ← v − (1 − b2) Δ² sign(v − Δ²).

    Arguments and reference as `adam`.
    """
    _validate.decay(b2=b2)
    return _adaptive(
        lambda v, square: v - (1 - b2) * square * jnp.sign(v - square), b1, adaptivity, initial_accumulator
    )


def _adaptive(second_moment, b1, adaptivity, initial_accumulator, correction=None) -> optax.GradientTransformation:
    _validate.decay(b1=b1)
    _validate.positive(adaptivity=adaptivity)
    _validate.non_negative(initial_accumulator=initial_accumulator)

    def init_fn(params):
        second = jax.tree.map(lambda w: jnp.full_like(w, initial_accumulator), params)
        return MomentsState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), second)

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)

        def moments(g, m, v):
            return (b1 * m + (1 - b1) * g).astype(m.dtype), second_moment(v, g * g).astype(v.dtype)

        pairs = jax.tree.map(moments, updates, state.first, state.second)
        first, second = (jax.tree.map(lambda _, pair, i=i: pair[i], updates, pairs) for i in (0, 1))
        scale = 1.0 if correction is None else correction(count.astype(float))
        step = jax.tree.map(lambda m, v: (-scale * m / (jnp.sqrt(v) + adaptivity)).astype(m.dtype), first, second)
        return step, MomentsState(count, first, second)

    return optax.GradientTransformation(init_fn, update_fn)


def dog(initial_distance: Scalar = 1e-6) -> optax.GradientTransformation:
    """Server DoG: step r̄ / √(Σ ‖Δ‖²), r̄ the largest distance from w^0 so far; no rate to set.

    Args:
      initial_distance: r̄ before round 0 is this times 1 + ‖w^0‖.

    Reference:
      Ivgi, Hinder, Carmon, `DoG is SGD's Best Friend <https://arxiv.org/abs/2302.12022>`_, ICML 2023; optax's.
    """
    _validate.positive(initial_distance=initial_distance)
    return optax.contrib.dog(1.0, ("heuristic", initial_distance))


def mechanic(initial_scale: Scalar = 1e-6, *, weight_decay: Scalar = 1e-2) -> optax.GradientTransformation:
    """Server Mechanic on plain descent: learns the scale of Σ Δ by coin betting; no rate to set.

    It finds the sum of its own updates in the parameters, so it must be the only one to set the step: α = 1.

    Args:
      initial_scale: s before round 0.
      weight_decay: Mechanic's own, which steadies the scale.

    Reference:
      Cutkosky, Defazio, Mehta, `Mechanic: A Learning Rate Tuner <https://arxiv.org/abs/2306.00144>`_, NeurIPS 2023;
      optax's.
    """
    _validate.positive(initial_scale=initial_scale)
    _validate.non_negative(weight_decay=weight_decay)
    return optax.contrib.mechanize(optax.sgd(1.0), weight_decay=weight_decay, s_init=initial_scale)
