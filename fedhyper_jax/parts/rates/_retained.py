"""A local rate that no start can break: it follows the share of the predicted gain that a round retains."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Params, Scalar
from fedhyper_jax.hypergradient import share
from fedhyper_jax.hypergradient.share import ShareSettings
from fedhyper_jax.parts.contract import ClientResult, Feedback, RateReport, RateRule

__all__ = ["retained_gain"]

_ALONG_GRADIENT = "use start='given' with a local_rate: 'measured' finds the rate of steps along the gradient"


class Look(NamedTuple):
    """Numbers that each client sends; each is in units of the loss but the last two."""

    gain: Float[Array, ""]  # A_m = f_m(w; ξ_0) − f_m(w_m; ξ_0): what is left of the gain on the round's first minibatch
    predicted: Float[Array, ""]  # P_m = ⟨∇f_m(w; ξ_0), w − w_m⟩: FedHyper's product, the gain to first order
    descent: Float[Array, ""]  # E_m = mean over the steps of ⟨g^k, w^k − w^{k+1}⟩: the gain of one step to first order
    squared_norm: Float[Array, ""]  # ‖∇f_m(w; ξ_0)‖², in a round that measures; else 0
    curvature: Float[Array, ""]  # ⟨∇f_m, H ∇f_m⟩ there; likewise


class RetainedGainState(NamedTuple):
    """State of `retained_gain`; the first seven as of the rule's `SharedRate`."""

    rate: Float[Array, ""]
    ceiling: Float[Array, ""]  # of the rate, since a round was taken back
    share: Float[Array, ""]  # ρ of the last round
    counts: Bool[Array, ""]  # whether the last round did
    found: Bool[Array, ""]  # whether a share was above its target once
    predicted: Float[Array, ""]  # average of P over the rate
    descent: Float[Array, ""]  # likewise of E
    measured: Bool[Array, ""]  # whether the curvature at the start is known
    given_rate: Float[Array, ""]
    settings: ShareSettings  # arrays


def retained_gain(
    initial_rate: Scalar,
    *,
    target_share: Scalar = 0.35,
    coherence_power: Scalar = 0.2,
    coherence_limit: Scalar = 5.0,
    hyper_rate: Scalar = 2.0,
    memory: Scalar = 0.6,
    growth: Scalar = 1.3,
    first_step: Scalar = 0.25,
    smallest_gain: Scalar = 0.05,
    tolerance: Scalar = 0.0,
    ceiling_growth: Scalar = 1.03,
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
    1/2 at the minimum of a parabola along Δ, 0 where nothing is left. n = P/E says how many steps pull the same way: K
    where all do, less than 1 where noise undoes what it did. The logarithm of the rate moves by what is gained beyond a
    share ρ* of the prediction:

    .. math::
      \log \beta^{t+1} = \log \beta^t + \eta \, (A - \rho^* P) / \bar P, \qquad
      \rho^* = \rho_0 \, \min(\bar P / \bar E, \bar n)^{-e}

    with exponential averages P̄ and Ē of P/β and E/β, times β. By the trapezoid rule A − P/2 is half FedHyper's product
    ⟨∇f(w_m; ξ_0), Δ_m⟩ at the end of the round: SL's and CL's rule, with one minibatch instead of two, normalised, and
    with a set point.

    Nothing here knows the lowest loss, the scale of the loss or the number of parameters: a constant added to the loss
    changes nothing, and the loss times s divides the rates by s.

    Round 0 *measures*: its rate is so small that nothing moves (what is exactly 0 moves by less than a norm can tell),
    and clients send the curvature along their gradient, which gives
    :math:`\beta^1 = c \|g\|^2 / \langle g, H g \rangle`. The initial rate is used only where that is no positive
    number.

    A round that keeps no more than ``smallest_gain`` of E, or ρ*/6 of P, or half of whose clients have come to no
    finite result is *taken back* (``RoundInfo.taken_back``): parameters, optimizers and clients' rows stay, the rate
    falls by half, or to a tenth as long as no share was above its target, and a ceiling is set at half the rate that
    failed, which each round that counts raises by 3 %.

    Args:
      initial_rate: β^0 > 0, see above.
      target_share: ρ_0, strictly between 0 and 1.
      coherence_power: e ≥ 0; clients that pull one way (unlike ones, which fit their own data) keep less of what is
        predicted at the best rate.
      coherence_limit: n̄ > 0; clients that have fitted their few examples long before their last step pull one way
        as long as they like.
      hyper_rate: η ≥ 0; with 0 and a given start nothing moves and nothing is taken back: FedAvg, but for the looks.
      memory: of the exponential averages of P and E, in [0, 1).
      growth: ≥ 1, of the rate in a round at most; its square where ρ > 0.85, which is far from any curvature.
      first_step: c > 0.
      smallest_gain: see above, ≥ 0.
      tolerance: ≥ 0, of P̄: what a round may lose without being taken back once a share was above its target.
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
      >>> round(float(state.share), 2), round(float(state.rate), 4)  # 0.1 · exp(2 · 0.15), at most 0.1 · 1.3
      (0.5, 0.13)

    Reference:
      New here; docs/retained_gain.md derives it from FedHyper's equations and says what it assumes.
    """
    _validate.positive(**{name: initial_rate})
    _validate.one_of(("measured", "given"), start=start)
    given = share.checked_settings(
        target_share=target_share,
        coherence_power=coherence_power,
        coherence_limit=coherence_limit,
        hyper_rate=hyper_rate,
        memory=memory,
        growth=growth,
        first_step=first_step,
        smallest_gain=smallest_gain,
        tolerance=tolerance,
        ceiling_growth=ceiling_growth,
    )
    measures = start == "measured"

    def init(params: Params) -> RetainedGainState:
        dtype = _tree.accumulator_dtype(params)
        given_rate = jnp.asarray(initial_rate, dtype)
        return RetainedGainState(
            **share.shared_rate(_rate_of_no_step(dtype) if measures else given_rate, dtype)._asdict(),
            measured=jnp.asarray(not measures),
            given_rate=given_rate,
            settings=share.as_arrays(given, dtype),
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
        curvature = share.curvature_along(jax.grad(loss), params, gradient, gradient)
        return _tree.inner_product(gradient, gradient).astype(dtype), curvature.astype(dtype)

    squared_norm, curvature = jax.lax.cond(state.measured, lambda: (zero, zero), curved)
    steps = jnp.maximum(result.num_steps, 1).astype(dtype)
    predicted = _tree.inner_product(gradient, result.displacement)
    before, after = (x.astype(dtype) for x in (value, loss(_tree.subtract(params, result.displacement))))
    return Look(
        gain=share.seen_gain(before, after, predicted),
        predicted=predicted,
        descent=result.rate_state.descent.astype(dtype) / steps,
        squared_norm=squared_norm,
        curvature=curvature,
    )


# ------------------------------------------------------------------------------------------------ the server


def _update(state: RetainedGainState, feedback: Feedback) -> tuple[RetainedGainState, RateReport]:
    look = Look(*(x.astype(state.rate.dtype) for x in feedback.reported))
    failed = jnp.zeros((), bool) if feedback.failed is None else feedback.failed >= 0.5
    new = _tree.select(state.measured, _adapted(state, look, failed), _measured(state, look))
    finite = jnp.isfinite(look.gain + look.predicted + look.descent)
    return new, RateReport.one(clipped=state.measured & (new.rate >= new.ceiling), finite=finite)


def _measured(state: RetainedGainState, look: Look) -> RetainedGainState:
    """After a round that measured: the first rate."""
    rate = share.first_rate(look.squared_norm, look.curvature, state.settings, state.given_rate)
    return state._replace(rate=rate, measured=jnp.ones_like(state.measured))


def _adapted(state: RetainedGainState, look: Look, failed: Bool[Array, ""]) -> RetainedGainState:
    gains = share.Gains(look.gain, look.predicted, look.descent)
    return state._replace(**share.adapt_to_gains(share.of_state(state), gains, state.settings, failed)._asdict())


def _refused(before: RetainedGainState, moved: RetainedGainState) -> RetainedGainState:
    """What the rule made of a round that it did not accept; of one that a guard took back, half the rate."""
    half = before._replace(rate=before.rate / 2, ceiling=jnp.minimum(before.ceiling, before.rate / 2))
    half = _tree.select(before.settings.hyper_rate > 0, half, before)
    return _tree.select(moved.counts & before.measured, half, moved)
