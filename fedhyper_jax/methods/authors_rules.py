"""The rules and server steps of the authors' public code (github ATP-1010/FedHyper), in our sense of direction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from fedhyper_jax import _tree
from fedhyper_jax.base import Params
from fedhyper_jax.hypergradient import AdaptiveRate, adapt, adaptive_rate
from fedhyper_jax.parts import ClientFacts, ClientRule, Feedback, RateReport, RateRule

_MOMENTUM = 0.9


class MomentumRateState(NamedTuple):
    """State of GM's rate 1 + agg."""

    rate: Float[Array, ""]
    adaptive: AdaptiveRate
    last: Params  # Δ + 0.9 · last: minus the code's `last`


def _decayed_sum(last: Params, gradient: Params) -> Params:
    return jax.tree.map(lambda m, g: (g + _MOMENTUM * m).astype(m.dtype), last, gradient)


def momentum_rate() -> RateRule:
    """α = 1 + agg with agg += ⟨last, v⟩."""

    def init(params):
        adaptive = adaptive_rate(1.0, 1.0, (0.8, 5.0), _tree.accumulator_dtype(params))
        return MomentumRateState(adaptive.rate, adaptive, optax.tree.zeros_like(params))

    def update(state: MomentumRateState, feedback: Feedback):
        adaptive, observed = adapt(state.adaptive, _tree.inner_product(feedback.pseudo_gradient, state.last))
        new_state = MomentumRateState(adaptive.rate, adaptive, _decayed_sum(state.last, feedback.pseudo_gradient))
        return new_state, RateReport.one(clipped=observed.clipped, finite=~observed.non_finite)

    return RateRule(init=init, update=update, initial_rate=1.0)


def momentum_step() -> optax.GradientTransformationExtraArgs:
    """The update −(Δ + 0.9 agg / α · last), which α multiplies: w ← w − α Δ − 0.9 agg · last."""

    def update_fn(updates, last, params=None, *, global_rate, **extra_args):
        del params, extra_args
        factor = _MOMENTUM * (global_rate - 1) / global_rate
        step = jax.tree.map(lambda g, m: (-g - factor * m).astype(g.dtype), updates, last)
        return step, _decayed_sum(last, updates)

    return optax.GradientTransformationExtraArgs(optax.tree.zeros_like, update_fn)


class AdamStepState(NamedTuple):
    """State of `adam_step`."""

    first: Params
    second: Params


def adam_step() -> optax.GradientTransformationExtraArgs:
    """The update −(m / 0.1) / √(s / 0.01 + 0.0316), m of 0.1 α Δ, s of m²; divided by α, which multiplies it later."""

    def update_fn(updates, state, params=None, *, global_rate, **extra_args):
        del params, extra_args

        def moment(m, g):
            return (0.9 * m + 0.1 * (0.1 * global_rate * g)).astype(m.dtype)

        def step(m, s):
            return (-(m / 0.1) / jnp.sqrt(s / 0.01 + 0.0316) / global_rate).astype(m.dtype)

        first = jax.tree.map(moment, state.first, updates)
        second = jax.tree.map(lambda s, m: (0.99 * s + 0.01 * m**2).astype(s.dtype), state.second, first)
        return jax.tree.map(step, first, second), AdamStepState(first, second)

    def init_fn(params):
        return AdamStepState(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ReferenceLocalState(NamedTuple):
    """State of a client's rate in `reference_local_rule`."""

    rate: Float[Array, ""]  # b · β^0 of the last step
    multiplier: Float[Array, ""]  # b of the next one
    previous_change: Params  # u_prev
    step_count: Int[Array, ""]
    update_count: Int[Array, ""]
    clipped_count: Int[Array, ""]


def reference_local_rule() -> ClientRule:
    r"""CL of the authors' public code: a multiplier b of the local rate, moved after each step but an epoch's first.

    With the parameter change u = w_now − w_before of the step, v_prev = −Δ^{t-1} and S the size of the cohort:

    .. math::
      \gamma = \min(1.1, 1 + 0.1 \langle u, v_{prev} \rangle / S + \langle u, u_{prev} \rangle), \qquad
      b \leftarrow \mathrm{clip}(\gamma b, 0.1, 10)

    b = 1 and u_prev = v_prev at each round's start; u_prev ← u only where b moved.

    Reference:
      The code at github ATP-1010/FedHyper, facts only.
    """

    def transform(settings, first_rate, facts: ClientFacts):
        del settings

        def init_fn(params):
            zero = jnp.zeros((), jnp.int32)
            return ReferenceLocalState(
                first_rate, jnp.ones_like(first_rate), optax.tree.zeros_like(params), zero, zero, zero
            )

        def update_fn(updates, state, params=None, *, global_update, **extra_args):
            del params, extra_args
            rate = state.multiplier * first_rate
            change = _tree.scale(updates, rate)
            mean_change = jax.tree.map(jnp.negative, global_update)
            first_update = state.update_count == 0
            previous = _tree.select(first_update, mean_change, state.previous_change)
            agreement = 0.1 * _tree.inner_product(change, mean_change) / facts.cohort_size
            factor = jnp.minimum(1.1, 1 + agreement + _tree.inner_product(change, previous))
            begins_epoch: Bool[Array, ""] = state.step_count % jnp.maximum(facts.steps_an_epoch, 1) == 0
            moves = ~begins_epoch & jnp.isfinite(factor)
            proposed = state.multiplier * factor
            clipped = jnp.clip(proposed, min=0.1, max=10.0)
            multiplier = jnp.where(moves, clipped, state.multiplier).astype(first_rate.dtype)
            new_state = ReferenceLocalState(
                rate=rate,
                multiplier=multiplier,
                previous_change=_tree.select(moves, change, state.previous_change),
                step_count=state.step_count + 1,
                update_count=state.update_count + moves,
                clipped_count=state.clipped_count + (moves & (clipped != proposed)),
            )
            return change, new_state

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    def report(state: ReferenceLocalState) -> RateReport:
        return RateReport(state.update_count, state.clipped_count, jnp.zeros((), jnp.int32))

    return ClientRule(init=lambda params: (), transform=transform, report=report, needs_pseudo_gradient=True)
