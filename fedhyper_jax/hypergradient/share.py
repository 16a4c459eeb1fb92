r"""The rule of the retained gain: FedHyper's product, integrated along several steps, as a share of what it predicts.

After K steps from w to w' at the rate r, of the minibatch ξ_0 that the first of them was on,

.. math::
  A = f(w; \xi_0) - f(w'; \xi_0), \qquad P = \langle \nabla f(w; \xi_0), w - w' \rangle, \qquad
  E = \tfrac{1}{K} \sum_k \langle g_k, w_k - w_{k+1} \rangle,

and the logarithm of the rate moves by what is gained beyond the share ρ* of the prediction,

.. math::
  \log r \leftarrow \log r + \eta \, (A - \rho^* P) / \bar P, \qquad
  \rho^* = \rho_0 \, \min(\bar P/\bar E, \bar n)^{-e},

where the bars are exponential averages, of P/r and E/r, times the rate. So it rests where the *mean* of A is ρ* times
the mean of P, whatever single ones scatter.

The rule of a server's rounds (`rates.retained_gain`) and the transform for one sequence of steps
(`scale_by_retained_gain`) call `adapt_to_gains`; docs/retained_gain.md derives it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import PyTree, Scalar

_SHRINK_MOST = 0.5  # of a rate, at once, by its share
_SHRINK_AT_FIRST = 0.1  # where steps are taken back before the rate has been found


class Gains(NamedTuple):
    """Three numbers in units of the loss.

    Attributes:
      gain: A: what is left of the gain on the first minibatch.
      predicted: P: FedHyper's product, the gain to first order.
      descent: E: the mean over the steps of the gain of one, to first order.
    """

    gain: Float[Array, ""]
    predicted: Float[Array, ""]
    descent: Float[Array, ""]


class ShareSettings(NamedTuple):
    """Settings of the rule; numbers, or arrays in a state.

    Attributes:
      target_share: ρ_0.
      coherence_power: e.
      coherence_limit: n̄.
      hyper_rate: η.
      memory: of the exponential averages of P and E.
      growth: of the rate at once, at most; its square where ρ > 0.85.
      first_step: c, of a rate that is measured.
      smallest_gain: of E, below which nothing was gained.
      tolerance: of P̄, which steps may lose without being taken back.
      ceiling_growth: of the ceiling, each time that counts.
    """

    target_share: Any
    coherence_power: Any
    coherence_limit: Any
    hyper_rate: Any
    memory: Any
    growth: Any
    first_step: Any
    smallest_gain: Any
    tolerance: Any
    ceiling_growth: Any


class SharedRate(NamedTuple):
    """A rate and what moves it.

    Attributes:
      rate: the rate.
      ceiling: of the rate, since steps were taken back.
      share: ρ, the last.
      counts: whether the last steps did.
      found: whether a share was above its target once: the rate is not far too large.
      predicted: average of P over the rate; 0 before the first.
      descent: likewise of E.
    """

    rate: Float[Array, ""]
    ceiling: Float[Array, ""]
    share: Float[Array, ""]
    counts: Bool[Array, ""]
    found: Bool[Array, ""]
    predicted: Float[Array, ""]
    descent: Float[Array, ""]


def checked_settings(**named: Scalar) -> ShareSettings:
    """The settings by name; raises ValueError, naming the argument, the value and the remedy."""
    _validate.positive(coherence_limit=named["coherence_limit"], first_step=named["first_step"])
    _validate.fraction(target_share=named["target_share"])
    at_least_zero = ("coherence_power", "hyper_rate", "memory", "smallest_gain", "tolerance")
    _validate.non_negative(**{name: named[name] for name in at_least_zero})
    for name in ("growth", "ceiling_growth"):
        _validate.positive(**{name: named[name]})
        if not _validate.is_traced(named[name]) and named[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {named[name]!r}; 1 lets nothing grow")
    memory = named["memory"]
    if not _validate.is_traced(memory) and memory >= 1:
        raise ValueError(f"memory must be below 1, got {memory!r}; 0 forgets at once, 0.6 remembers some 2 rounds")
    return ShareSettings(**named)


def as_arrays(settings: ShareSettings, dtype: DTypeLike) -> ShareSettings:
    """As they stand in a state."""
    return ShareSettings(*(jnp.asarray(number, dtype) for number in settings))


def shared_rate(rate: Scalar, dtype: DTypeLike) -> SharedRate:
    """The rate before anything is known."""
    zero = jnp.zeros((), dtype)
    return SharedRate(
        rate=jnp.asarray(rate, dtype),
        ceiling=jnp.full((), jnp.inf, dtype),
        share=zero,
        counts=jnp.ones((), bool),
        found=jnp.zeros((), bool),
        predicted=zero,
        descent=zero,
    )


def of_state(state: Any) -> SharedRate:
    """What a state holds of it, in fields of the same names."""
    return SharedRate(*(getattr(state, name) for name in SharedRate._fields))


def first_rate(slope: Array, curvature: Array, settings: ShareSettings, otherwise: Array) -> Array:
    """The part c of the step along u to the minimum of the parabola: c ⟨g, u⟩ / |⟨u, H u⟩|, if that is > 0."""
    rate = settings.first_step * slope / jnp.abs(curvature)
    return jnp.where((rate > 0) & jnp.isfinite(rate), rate, otherwise)


def curvature_along(
    gradient_fn: Callable[[PyTree], PyTree], params: PyTree, gradient: PyTree, direction: PyTree
) -> Array:
    """⟨u, H u⟩ by a difference of gradients, over a thousandth of the parameters' norm.

    Losses with a backward pass of their own (``jax.custom_vjp``) have no second derivative to take.
    """
    squared_norm = _tree.inner_product(direction, direction)
    length = 1e-3 * (1 + _tree.norm(params)) / jnp.sqrt(jnp.where(squared_norm > 0, squared_norm, 1))
    moved = _tree.subtract(params, _tree.scale(direction, length))
    change = _tree.subtract(gradient, gradient_fn(moved))
    return _tree.inner_product(change, direction) / length


def seen_gain(before: Array, after: Array, predicted: Array) -> Array:
    """f(w) − f(w'), or what is predicted where that is too little for the digits of a float32 (64) loss to tell."""
    hidden = jnp.abs(predicted) < 30 * jnp.finfo(before.dtype).eps * jnp.abs(before)
    return jnp.where(hidden, predicted, before - after)


def adapt_to_gains(state: SharedRate, gains: Gains, settings: ShareSettings, failed: Array) -> SharedRate:
    """The rate after K steps; ``failed``: whether they came to no finite result. η = 0 moves and refuses nothing.

    Steps are taken back that keep no more than a sixth of the target share of what was predicted, or gain no more than
    ``smallest_gain`` of E: steps that are far too large descend a lot each and get nowhere together. Where one sequence
    of steps scatters, as with a ``tolerance``, the curvature must have done it: P − A is beyond so many times P̄, once a
    share above its target has shown the rate not to be far too large.
    """
    memory = jnp.where(state.predicted != 0, settings.memory, 0)  # the first ones stand alone
    mean_slope = memory * state.predicted + (1 - memory) * gains.predicted / state.rate
    mean_descent = memory * state.descent + (1 - memory) * gains.descent / state.rate
    target = _target(mean_slope, mean_descent, settings)
    share = _share(gains)
    expected = state.rate * mean_slope
    surplus = jnp.where(expected > 0, (gains.gain - target * gains.predicted) / jnp.where(expected > 0, expected, 1), 0)
    surplus = jnp.where(_nothing_moved(gains), 1 - target, surplus)

    bent = gains.predicted - gains.gain
    tolerance = jnp.where(state.found, settings.tolerance, 0)
    tolerated = tolerance * (jnp.abs(expected) + 2 * jnp.maximum(-gains.predicted, 0))
    little = settings.smallest_gain * gains.descent
    keeps_little = ~(bent < (1 - target / 6) * gains.predicted + tolerated)
    gains_little = ~(gains.gain > little) & ~((bent < little + tolerated) & (tolerance > 0))
    fails_now = (keeps_little | gains_little) & ~_nothing_moved(gains)
    acts = settings.hyper_rate > 0
    fails = (fails_now | failed) & acts

    fastest = jnp.where(share > 0.85, settings.growth**2, settings.growth)
    factor = jnp.clip(jnp.exp(settings.hyper_rate * surplus), _SHRINK_MOST, fastest)
    factor = jnp.where(fails, jnp.where(state.found, _SHRINK_MOST, _SHRINK_AT_FIRST), factor)
    ceiling = jnp.where(fails, state.rate / 2, state.ceiling * settings.ceiling_growth)
    return SharedRate(
        rate=jnp.where(acts, jnp.minimum(state.rate * factor, ceiling), state.rate),
        ceiling=ceiling,
        share=share,
        counts=~fails,
        found=state.found | (~fails & (share > target)),
        predicted=jnp.where(fails, state.predicted, mean_slope),
        descent=jnp.where(fails, state.descent, mean_descent),
    )


def _nothing_moved(gains: Gains) -> Bool[Array, ""]:
    """Whether steps were too small for the parameters' digits."""
    return (gains.gain == 0) & (gains.predicted == 0) & (gains.descent > 0)


def _share(gains: Gains) -> Array:
    """The share ρ that is retained: 0 where nothing was predicted, 1 where nothing moved."""
    promising = gains.predicted > 0
    share = jnp.where(promising, gains.gain / jnp.where(promising, gains.predicted, 1), 0)
    return jnp.where(_nothing_moved(gains), 1, share)


def _target(predicted: Array, descent: Array, settings: ShareSettings) -> Array:
    """ρ*, of as many steps as pull one way."""
    known = (predicted > 0) & (descent > 0)
    coherence = jnp.where(known, predicted / jnp.where(known, descent, 1), 1)
    target = settings.target_share * jnp.minimum(coherence, settings.coherence_limit) ** -settings.coherence_power
    return jnp.clip(target, 0.02, 0.9)
