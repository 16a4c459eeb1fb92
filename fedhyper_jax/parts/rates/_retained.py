"""A local rate that no start can break: it follows the share of the predicted gain that a round retains."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Params
from fedhyper_jax.parts.contract import ClientResult, Feedback, RateReport, RateRule

__all__ = ["retained_gain"]

_SHRINK_MOST = 0.1  # of a rate, in a round
_RESPONSIVE = 2.5  # a round whose share is so many times the target, or its reciprocal, is taken alone, without average


_ALONG_GRADIENT = "use start='given' with a local_rate: 'measured' finds the rate of steps along the gradient"


class Look(NamedTuple):
    """Numbers that each client sends; each is in units of the loss but the last two."""

    gain: Float[Array, ""]  # A_m = f_m(w; ξ_0) − f_m(w_m; ξ_0): what is left of the gain on the round's first minibatch
    predicted: Float[Array, ""]  # P_m = ⟨∇f_m(w; ξ_0), w − w_m⟩: FedHyper's product, the gain to first order
    descent: Float[Array, ""]  # E_m = mean over the steps of ⟨g^k, w^k − w^{k+1}⟩: the gain of one step to first order
    squared_norm: Float[Array, ""]  # ‖∇f_m(w; ξ_0)‖², in a round that measures; else 0
    curvature: Float[Array, ""]  # ⟨∇f_m, H ∇f_m⟩ there; likewise


class RetainedGainSettings(NamedTuple):
    """Settings of `retained_gain`; arrays."""

    target_share: Float[Array, ""]
    coherence_power: Float[Array, ""]
    coherence_limit: Float[Array, ""]
    hyper_rate: Float[Array, ""]
    memory: Float[Array, ""]
    growth: Float[Array, ""]
    first_step: Float[Array, ""]
    smallest_gain: Float[Array, ""]
    ceiling_growth: Float[Array, ""]
    given_rate: Float[Array, ""]


class RetainedGainState(NamedTuple):
    """State of `retained_gain`."""

    rate: Float[Array, ""]
    ceiling: Float[Array, ""]  # of the rate, since a round was taken back
    share: Float[Array, ""]  # ρ of the last round
    counts: Bool[Array, ""]  # whether the last round did
    measured: Bool[Array, ""]  # whether the curvature at the start is known
    begun: Bool[Array, ""]  # whether the averages hold a round
    averages: Look  # of what clients sent
    settings: RetainedGainSettings


def retained_gain(
    initial_rate,
    *,
    target_share=0.35,
    coherence_power=0.2,
    coherence_limit=5.0,
    hyper_rate=0.5,
    memory=0.6,
    growth=1.3,
    first_step=0.25,
    smallest_gain=0.05,
    ceiling_growth=1.03,
    start: str = "measured",
    name: str = "initial_rate",
) -> RateRule:
    r"""A rule of the local rate that needs no rate to begin with.

    After its local steps each client looks once more at the first minibatch ξ_0 of its round and sends three numbers in
    units of the loss, of which only the weighted means A, P and E are used:

    .. math::
      A_m &= f_m(w; \xi_0) - f_m(w_m; \xi_0) = \int_0^1 \langle \nabla f_m(w - s \Delta_m; \xi_0), \Delta_m \rangle ds
      \\ P_m &= \langle \nabla f_m(w; \xi_0), \Delta_m \rangle, \qquad
      E_m = \tfrac{1}{K_m} \sum_k \langle g_m^k, w_m^k - w_m^{k+1} \rangle

    ρ = A/P is the share that is left of the gain which FedHyper's inner product predicts: 1 where the loss is straight,
    1/2 at the minimum of a parabola along Δ, 0 where nothing is left. For K = 1 it is (1 + h)/2 with h = ⟨g', g⟩/‖g‖²,
    CL's product on the same minibatch, normalised. n = P/E says how many steps pull the same way: K where all do, less
    than 1 where noise undoes what it did. The rate follows the log-odds of the share:

    .. math::
      \log \beta^{t+1} = \log \beta^t + \eta \, (\mathrm{logit}\, \rho - \mathrm{logit}\, \rho^*), \qquad
      \rho^* = \rho_0 \, \min(n, \bar n)^{-e}

    Nothing here knows the lowest loss, the scale of the loss or the number of parameters: a constant added to the loss
    changes nothing, and the loss times s divides the rates by s.

    Round 0 *measures*: its rate is so small that nothing moves (what is exactly 0 moves by less than a norm can tell),
    and clients send the curvature along their gradient, which gives
    :math:`\beta^1 = c \|g\|^2 / \langle g, H g \rangle`. The initial rate is used only where that is no positive
    number.

    A round that keeps no more than ``smallest_gain`` of E, or ρ*/6, or half of whose clients have come to no
    finite result is *taken back* (``RoundInfo.taken_back``): parameters, optimizers and clients' rows stay, the rate
    falls by the log-odds, at least by half and at most to a tenth, and a ceiling is set at half the rate that failed,
    which each round that counts raises by 3 %.

    Args:
      initial_rate: β^0 > 0, see above.
      target_share: ρ_0, strictly between 0 and 1.
      coherence_power: e ≥ 0; clients that pull one way (unlike ones, which fit their own data) keep less of what is
        predicted at the best rate.
      coherence_limit: n̄ > 0; clients that have fitted their few examples long before their last step pull one way
        as long as they like.
      hyper_rate: η ≥ 0; with 0 and a given start nothing moves and nothing is taken back: FedAvg, but for the looks.
      memory: of the exponential averages of A, P and E, in [0, 1).
      growth: ≥ 1, of the rate in a round at most; its square where ρ > 0.85, which is far from any curvature.
      first_step: c > 0.
      smallest_gain: see above, ≥ 0.
      ceiling_growth: see above, ≥ 1.
      start: "measured", for clients that step along their gradient (SGD, momentum), or "given": round 0 trains with the
        initial rate, and measures nothing.
      name: what messages call this rate.

    Returns:
      The rule, for clients of `client_rules.counted_descent`.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = retained_gain(0.1, start="given", memory=0.0)
      >>> look = Look(*(jnp.float32(x) for x in (0.5, 1.0, 1.0, 0.0, 0.0)))  # half of what was predicted is left
      >>> state, _ = rule.update(rule.init(jnp.zeros(3)), Feedback(jnp.int32(1), jnp.float32(0), reported=look))
      >>> round(float(state.share), 2), round(float(state.rate), 4)  # 0.1 · √(1 · 0.65/0.35), but at most 0.1 · 1.3
      (0.5, 0.13)

    Reference:
      New here; docs/retained_gain.md derives it from FedHyper's equations and says what it assumes.
    """
    _validate.positive(**{name: initial_rate}, first_step=first_step, coherence_limit=coherence_limit)
    _validate.fraction(target_share=target_share)
    _validate.non_negative(
        coherence_power=coherence_power, hyper_rate=hyper_rate, memory=memory, smallest_gain=smallest_gain
    )
    _validate.one_of(("measured", "given"), start=start)
    _check_at_least_one(growth=growth, ceiling_growth=ceiling_growth)
    if not _validate.is_traced(memory) and memory >= 1:
        raise ValueError(f"memory must be below 1, got {memory!r}; 0 forgets at once, 0.6 remembers some 2 rounds")
    given = RetainedGainSettings(
        target_share=target_share,
        coherence_power=coherence_power,
        coherence_limit=coherence_limit,
        hyper_rate=hyper_rate,
        memory=memory,
        growth=growth,
        first_step=first_step,
        smallest_gain=smallest_gain,
        ceiling_growth=ceiling_growth,
        given_rate=initial_rate,
    )
    measures = start == "measured"

    def init(params: Params) -> RetainedGainState:
        dtype = _tree.accumulator_dtype(params)
        settings = RetainedGainSettings(*(jnp.asarray(value, dtype) for value in given))
        zero = jnp.zeros((), dtype)
        return RetainedGainState(
            rate=_rate_of_no_step(dtype) if measures else settings.given_rate,
            ceiling=jnp.full((), jnp.inf, dtype),
            share=jnp.zeros((), dtype),
            counts=jnp.ones((), bool),
            measured=jnp.asarray(not measures),
            begun=jnp.zeros((), bool),
            averages=Look(zero, zero, zero, zero, zero),
            settings=settings,
        )

    return RateRule(
        init=init,
        update=_update,
        initial_rate=initial_rate,
        report=_look_again,
        refused=_refused,
        accepts=lambda state: state.counts,
        observed=lambda state: state.share,
        along_gradient=_ALONG_GRADIENT if measures else None,
    )


def _check_at_least_one(**values) -> None:
    for name, value in values.items():
        _validate.positive(**{name: value})
        if not _validate.is_traced(value) and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}; 1 lets nothing grow")


def _rate_of_no_step(dtype) -> Array:
    """A rate > 0 whose square is below all numbers: what little it moves has the norm 0."""
    return jnp.asarray(float(jnp.finfo(dtype).tiny) ** (2 / 3), dtype)


# ------------------------------------------------------------------------------------------------ clients


def _look_again(state: RetainedGainState, params: Params, result: ClientResult) -> Look:
    """The numbers of a client: of its first minibatch where it was, and where it has come to."""
    if not hasattr(result.rate_state, "descent"):
        raise ValueError(
            "rates.retained_gain asks clients for the descent of their steps; give client_rules.counted_descent() as "
            "client_rule, or use the method retained_gain, which does"
        )
    loss = lambda params: result.batch_loss(jnp.int32(0), params)  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(params)
    dtype = state.rate.dtype
    zero = jnp.zeros((), dtype)

    def curved() -> tuple[Array, Array]:
        # A difference of gradients, over a thousandth of the parameters' norm: losses with a backward pass of their own
        # (jax.custom_vjp) have no second derivative.
        squared_norm = _tree.inner_product(gradient, gradient)
        length = 1e-3 * (1 + _tree.norm(params)) / jnp.sqrt(jnp.where(squared_norm > 0, squared_norm, 1))
        moved = _tree.subtract(params, _tree.scale(gradient, length))
        change = _tree.subtract(gradient, jax.grad(loss)(moved))
        return squared_norm.astype(dtype), (_tree.inner_product(change, gradient) / length).astype(dtype)

    squared_norm, curvature = jax.lax.cond(state.measured, lambda: (zero, zero), curved)
    steps = jnp.maximum(result.num_steps, 1).astype(dtype)
    return Look(
        gain=value - loss(_tree.subtract(params, result.displacement)),
        predicted=_tree.inner_product(gradient, result.displacement),
        descent=result.rate_state.descent.astype(dtype) / steps,
        squared_norm=squared_norm,
        curvature=curvature,
    )


# ------------------------------------------------------------------------------------------------ the server


def _update(state: RetainedGainState, feedback: Feedback) -> tuple[RetainedGainState, RateReport]:
    look = Look(*(x.astype(state.rate.dtype) for x in feedback.reported))
    failed = jnp.zeros((), look.gain.dtype) if feedback.failed is None else feedback.failed
    new = _tree.select(state.measured, _adapted(state, look, failed), _measured(state, look))
    finite = jnp.isfinite(look.gain + look.predicted + look.descent)
    return new, RateReport.one(clipped=state.measured & (new.rate >= new.ceiling), finite=finite)


def _measured(state: RetainedGainState, look: Look) -> RetainedGainState:
    """After a round that measured: the first rate."""
    settings = state.settings
    rate = settings.first_step * look.squared_norm / jnp.abs(look.curvature)
    rate = jnp.where((rate > 0) & jnp.isfinite(rate), rate, settings.given_rate)
    return state._replace(rate=rate, measured=jnp.ones_like(state.measured))


def _adapted(state: RetainedGainState, look: Look, failed: Array) -> RetainedGainState:
    settings = state.settings
    averages = jax.tree.map(lambda old, new: settings.memory * old + (1 - settings.memory) * new, state.averages, look)
    share, target = _share(look, settings)
    acts = settings.hyper_rate > 0
    fails = ~(share > target / 6) | ~(look.gain > settings.smallest_gain * look.descent) | (failed >= 0.5)
    fails = fails & acts
    alone = (share > _RESPONSIVE * target) | (share * _RESPONSIVE < target) | ~state.begun
    kept = _tree.select(alone, look, averages)
    most = jnp.where(share > 0.85, settings.growth**2, settings.growth)
    factor = jnp.clip(jnp.exp(settings.hyper_rate * _odds(*_share(kept, settings))), _SHRINK_MOST, most)
    factor_of_failure = jnp.clip(jnp.exp(_odds(share, target)), _SHRINK_MOST, 0.5)
    ceiling = jnp.where(fails, state.rate / 2, state.ceiling * settings.ceiling_growth)
    moved = state.rate * jnp.where(fails, jnp.nan_to_num(factor_of_failure, nan=_SHRINK_MOST), factor)
    rate = jnp.where(acts, jnp.minimum(moved, ceiling), state.rate)
    return state._replace(
        rate=rate,
        ceiling=ceiling,
        share=share,
        counts=~fails,
        begun=state.begun | ~fails,
        averages=_tree.select(fails, state.averages, kept),
    )


def _share(look: Look, settings: RetainedGainSettings) -> tuple[Array, Array]:
    """The share ρ that is retained, 0 where nothing was predicted, and its target ρ*."""
    promising = look.predicted > 0
    share = jnp.where(promising, look.gain / jnp.where(promising, look.predicted, 1), 0)
    coherence = jnp.where(promising & (look.descent > 0), look.predicted / look.descent, 1)
    target = settings.target_share * jnp.minimum(coherence, settings.coherence_limit) ** -settings.coherence_power
    return share, jnp.clip(target, 0.02, 0.9)


def _odds(share: Array, target: Array) -> Array:
    """How far the share is from its target, in log-odds."""
    share = jnp.clip(share, 1e-4, 1 - 1e-4)
    return jnp.log(share / (1 - share)) - jnp.log(target / (1 - target))


def _refused(before: RetainedGainState, moved: RetainedGainState) -> RetainedGainState:
    """What the rule made of a round that it did not accept; of one that a guard took back, half the rate."""
    half = before._replace(rate=before.rate / 2, ceiling=jnp.minimum(before.ceiling, before.rate / 2))
    half = _tree.select(before.settings.hyper_rate > 0, half, before)
    return _tree.select(moved.counts & before.measured, half, moved)
