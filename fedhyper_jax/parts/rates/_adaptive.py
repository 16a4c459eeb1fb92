"""Rates that follow what the rounds tell: hypergradients, extrapolation, cosines, plateaus."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Params, Range, Scalar
from fedhyper_jax.hypergradient import (
    AdaptiveRate,
    adapt,
    adaptive_rate,
    check_adaptive_rate,
    normalised,
    pipeline,
    ratio,
)
from fedhyper_jax.parts.contract import ClientResult, Feedback, RateReport, RateRule, no_report

__all__ = ["DebiasedRate", "extrapolation", "hypergradient", "reduce_on_plateau", "smoothed_cosine"]


class DebiasedRate(NamedTuple):
    """State of `hypergradient` with ``normalise="debiased"``.

    Attributes:
      rate: r.
      hyper_rate: κ.
      lower: bound that r never falls below.
      upper: bound that r never exceeds.
      max_change: c ≥ |κ h|; None: no bound.
      squared_norm: D^{t-1}, what the next product is divided by; 0 where nothing is known.
    """

    rate: Float[Array, ""]
    hyper_rate: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    max_change: Float[Array, ""] | None
    squared_norm: Float[Array, ""]


_FLOOR = 0.1
"""The debiased squared norm is at least this part of ‖Δ‖²: where noise outweighs the mean the estimate may be < 0."""


def hypergradient(
    initial_rate: Scalar,
    hyper_rate: Scalar = 1.0,
    bounds: Range = (0.0, math.inf),
    *,
    warm: bool = False,
    normalise: str | None = None,
    update: str = "additive",
    max_change: Scalar | None = None,
    name: str = "initial_rate",
) -> RateRule:
    r"""The rule of FedHyper-G and -SL: r ← clip(r + κ⟨Δ^t, Δ^{t-1}⟩, lower, upper), and its scale-free relatives.

    Used for α it sets the rate of the present round, used for β that of the next; see SPEC eq. 15-18. (In round 0 the
    product is 0, so either rate is then the initial one.) After a round that a guard took back the rate is halved.

    The raw product scales with the square of the loss and of the local rate. Scale-free is

    .. math:: r \leftarrow \mathrm{clip}\bigl(r \exp(\mathrm{clip}(\kappa h, \pm c)), \text{lower}, \text{upper}\bigr)

    with the exponential update and one of three pure numbers h; a product with a norm of 0 in it moves nothing:

      * "cosine": ⟨Δ^t, Δ^{t-1}⟩ / (‖Δ^t‖ ‖Δ^{t-1}‖);
      * "squared_norm": ⟨Δ^t, Δ^{t-1}⟩ / ‖Δ^{t-1}‖²;
      * "debiased": ⟨Δ^t, Δ^{t-1}⟩ / D^{t-1}, with the mean inner product of the updates of two *different* clients

    .. math::
      U = \frac{\sum_{i \ne j} p_i p_j \langle \Delta_i, \Delta_j \rangle}{\sum_{i \ne j} p_i p_j}
      = \frac{\|\Delta\|^2 - \sum_m p_m^2 \|\Delta_m\|^2}{1 - \sum_m p_m^2}, \qquad
      D = \max\bigl(U, \tfrac{1}{10} \|\Delta\|^2\bigr).

    ‖Δ‖² holds the noise of the cohort besides the mean, and shrinks as cohorts grow, so the first two h grow with them.
    U counts no client against itself: with equal weights its expectation is the same for all cohorts of 2 clients or
    more. Each client sends ‖Δ_m‖² for it. After a round with one participant, where U says nothing, the rate stays.

    With ``inner_product="applied"`` products are taken with u^{t-1}, which then counts with the length of Δ^{t-1}: one
    factor ‖Δ^{t-1}‖ becomes ‖u^{t-1}‖. "debiased" is refused there, and where Δ^t is no mean of updates.

    Args:
      initial_rate: where the rate starts.
      hyper_rate: κ; of a normalised product and an exponential update 0.2 is a good start.
      bounds: (lower, upper) as plain numbers.
      warm: for β only: r is first replaced by Σ p_m β_m, the mean of the clients' final rates.
      normalise: None for the raw product, "cosine", "squared_norm" or "debiased".
      update: "additive", r + κ h, where κ has the unit of r over that of h, or "exponential", r exp(κ h), where it has
        none.
      max_change: c > 0, the most that |κ h| counts. None: 0.2 of exponential updates, no bound of additive ones.
      name: what messages call this rate.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = hypergradient(1.0, bounds=(1 / 3, 3.0))
      >>> feedback = Feedback(jnp.int32(1), jnp.float32(0.25))
      >>> float(rule.update(rule.init(jnp.zeros(3)), feedback)[0].rate)
      1.25
      >>> rule = hypergradient(1.0, hyper_rate=0.2, normalise="squared_norm", update="exponential")
      >>> now, before = jnp.array([1.0, 7.0]), jnp.array([2.0, 0.0])
      >>> feedback = Feedback(jnp.int32(1), jnp.vdot(now, before), now, previous=before, reference=before)
      >>> round(float(rule.update(rule.init(now), feedback)[0].rate), 5)  # exp(0.2 · 2/4)
      1.10517

    Reference:
      Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024, eq. 15-18. The normalisations are not
      of the paper: "squared_norm" follows Chu et al., `Provable and Practical Online Learning Rate Adaptation with
      Hypergradient Descent <https://arxiv.org/abs/2502.11229>`_, 2025.
    """
    check_adaptive_rate(initial_rate, hyper_rate, bounds, rate_name=name)
    ways = pipeline(normalise, update, max_change)
    debiased = normalise == "debiased"

    def init(params: Params) -> AdaptiveRate | DebiasedRate:
        dtype = _tree.accumulator_dtype(params)
        rate = adaptive_rate(initial_rate, hyper_rate, bounds, dtype, max_change=ways.max_change)
        return DebiasedRate(*rate, squared_norm=jnp.zeros((), dtype)) if debiased else rate

    def move(state: AdaptiveRate | DebiasedRate, feedback: Feedback):
        rate = AdaptiveRate(*state[: len(AdaptiveRate._fields)])
        if warm:
            mean = jnp.clip(feedback.reported.astype(rate.rate.dtype), min=rate.lower, max=rate.upper)
            rate = rate._replace(rate=mean)
        rate, observed = adapt(rate, _pure_number(normalise, state, feedback), update=update)
        if debiased:
            rate = DebiasedRate(*rate, squared_norm=_debiased(feedback).astype(rate.rate.dtype))
        report = RateReport.one(clipped=observed.clipped, finite=~observed.non_finite)
        return rate, _tree.select(rate.hyper_rate > 0, report, RateReport.none())

    def refused(before, moved):
        """Half the rate, within its bounds: the round was no good. κ = 0 keeps it."""
        del moved
        halved = jnp.maximum(before.rate / 2, before.lower)
        return before._replace(rate=jnp.where(before.hyper_rate > 0, halved, before.rate))

    return RateRule(
        init=init,
        update=move,
        initial_rate=initial_rate,
        report=_final_rate if warm else no_report,
        refused=refused,
        mean_only="normalise='debiased' estimates the length of a mean of client updates" if debiased else None,
        needs_spread=debiased,
    )


def _final_rate(state: AdaptiveRate, params: Params, result: ClientResult):
    del state, params
    return result.rate


def _pure_number(normalise: str | None, state: AdaptiveRate | DebiasedRate, feedback: Feedback) -> Float[Array, ""]:
    """h: the product normalised, or as it is."""
    if normalise == "debiased":
        return ratio(feedback.inner_product, state.squared_norm)
    return normalised(
        feedback.inner_product,
        normalise,
        present=feedback.pseudo_gradient,
        previous=feedback.previous,
        reference=feedback.reference,
    )


def _debiased(feedback: Feedback) -> Float[Array, ""]:
    """D of the round's pseudo-gradient; 0 of a round with a single participant."""
    squared_norm = _tree.inner_product(feedback.pseudo_gradient, feedback.pseudo_gradient)
    scale = 1 if feedback.scale is None else feedback.scale
    others = 1 - feedback.spread.squared_weight  # Σ over i ≠ j of p_i p_j
    unbiased = ratio(squared_norm - scale**2 * feedback.spread.squared_norm, others)
    return jnp.where(others > 0, jnp.maximum(unbiased, _FLOOR * squared_norm), 0)


class ExtrapolationState(NamedTuple):
    """State of `extrapolation`."""

    rate: Float[Array, ""]
    epsilon: Float[Array, ""]


def extrapolation(epsilon: Scalar = 1e-3) -> RateRule:
    r"""FedExP's global rate: the more the clients' updates disagree, the longer the step.

    .. math:: \alpha^t = \max\Bigl(1, \frac{\sum_m p_m \|\Delta_m^t\|^2}{2 (\|\Delta^t\|^2 + \epsilon)}\Bigr)

    Its state starts at 1, and is moved before round 0 uses it.

    Args:
      epsilon: ε ≥ 0, against a vanishing mean update. The published code multiplies it by the cohort size and lets it
        decay with the local rate; here it is the number in the formula.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = extrapolation(0.0)
      >>> mean = jnp.array([0.5, 0.5, 0.5, 0.5])  # of four updates, each 2 in a place of its own
      >>> feedback = Feedback(jnp.int32(0), jnp.float32(0.0), mean, reported=jnp.float32(4.0))
      >>> float(rule.update(rule.init(mean), feedback)[0].rate)  # 4 / (2 · 1): half the cohort's size
      2.0

    Reference:
      Jhunjhunwala, Wang, Joshi, `FedExP: Speeding Up Federated Averaging via Extrapolation
      <https://arxiv.org/abs/2301.09604>`_, ICLR 2023.
    """
    _validate.non_negative(epsilon=epsilon)

    def init(params: Params) -> ExtrapolationState:
        dtype = _tree.accumulator_dtype(params)
        return ExtrapolationState(rate=jnp.ones((), dtype), epsilon=jnp.asarray(epsilon, dtype))

    def update(state: ExtrapolationState, feedback: Feedback):
        squared_norm = _tree.inner_product(feedback.pseudo_gradient, feedback.pseudo_gradient)
        denominator = 2 * (squared_norm + state.epsilon)
        mean_squared_norm = feedback.reported if feedback.scale is None else feedback.scale**2 * feedback.reported
        ratio = mean_squared_norm / jnp.where(denominator > 0, denominator, 1)
        finite = jnp.isfinite(ratio)
        rate = jnp.where(finite, jnp.maximum(ratio, 1), state.rate).astype(state.rate.dtype)
        return ExtrapolationState(rate, state.epsilon), RateReport.one(clipped=ratio < 1, finite=finite)

    return RateRule(
        init=init,
        update=update,
        initial_rate=1.0,
        report=_squared_norm,
        mean_only="FedExP extrapolates a mean of client updates",
    )


def _squared_norm(state: ExtrapolationState, params: Params, result: ClientResult):
    del state, params
    return _tree.inner_product(result.update, result.update)


class SmoothedCosineState(NamedTuple):
    """State of `smoothed_cosine`."""

    rate: Float[Array, ""]
    hyper_rate: Float[Array, ""]
    smoothing: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    smoothed: Params  # exponential average of the pseudo-gradients, the present one excluded


def smoothed_cosine(
    initial_rate: Scalar,
    hyper_rate: Scalar = 0.01,
    bounds: Range = (0.0, math.inf),
    *,
    smoothing: Scalar = 0.5,
    name: str = "initial_rate",
) -> RateRule:
    r"""FATHOM's rule of the local rate: multiplicative, and blind to the scale of the loss.

    .. math::
      r \leftarrow \mathrm{clip}\bigl(r \exp(\kappa \cos(\Delta^t, \bar\Delta^{t-1}))\bigr), \qquad
      \bar\Delta^t = a \bar\Delta^{t-1} + (1 - a) \Delta^t

    The average excludes the present pseudo-gradient, and is zero before round 0, which so moves nothing.

    Args:
      initial_rate: where the rate starts.
      hyper_rate: κ ≥ 0.
      bounds: (lower, upper) as plain numbers; the published runs have an upper bound only.
      smoothing: a, strictly between 0 and 1.
      name: what messages call this rate.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = smoothed_cosine(0.1, hyper_rate=0.5)
      >>> state = rule.init(jnp.zeros(2))
      >>> for g in (jnp.array([3.0, 0.0]), jnp.array([70.0, 0.0])):
      ...     state, _ = rule.update(state, Feedback(jnp.int32(1), jnp.float32(0.0), g))
      >>> round(float(state.rate), 5)  # 0.1 · exp(0.5 · 1)
      0.16487

    Reference:
      Kan, `FATHOM: Federated Optimization with Automatic Tuning of Hyperparameters
      <https://arxiv.org/abs/2211.02106>`_, 2022 (its rule of the learning rate).
    """
    check_adaptive_rate(initial_rate, hyper_rate, bounds, rate_name=name)
    _validate.fraction(smoothing=smoothing)

    def init(params: Params) -> SmoothedCosineState:
        scalars = (initial_rate, hyper_rate, smoothing, *bounds)
        dtype = _tree.accumulator_dtype(params)
        return SmoothedCosineState(*(jnp.asarray(s, dtype) for s in scalars), smoothed=optax.tree.zeros_like(params))

    def update(state: SmoothedCosineState, feedback: Feedback):
        norms = _tree.norm(feedback.pseudo_gradient) * _tree.norm(state.smoothed)
        product = _tree.inner_product(feedback.pseudo_gradient, state.smoothed)
        cosine = product / jnp.where(norms > 0, norms, 1)
        finite = jnp.isfinite(cosine)
        proposed = jnp.where(finite, state.rate * jnp.exp(state.hyper_rate * cosine), state.rate)
        rate = jnp.where(state.hyper_rate > 0, jnp.clip(proposed, min=state.lower, max=state.upper), state.rate)

        def average(old, new):
            return (state.smoothing * old + (1 - state.smoothing) * new).astype(old.dtype)

        new_state = SmoothedCosineState(
            rate=rate.astype(state.rate.dtype),
            hyper_rate=state.hyper_rate,
            smoothing=state.smoothing,
            lower=state.lower,
            upper=state.upper,
            smoothed=jax.tree.map(average, state.smoothed, feedback.pseudo_gradient),
        )
        return new_state, RateReport.one(clipped=rate != proposed, finite=finite)

    return RateRule(init=init, update=update, initial_rate=initial_rate)


class PlateauState(NamedTuple):
    """State of `reduce_on_plateau`."""

    rate: Float[Array, ""]
    initial_rate: Float[Array, ""]
    plateau: optax.contrib.ReduceLROnPlateauState


def reduce_on_plateau(
    initial_rate: Scalar,
    *,
    factor: float = 0.1,
    patience: int = 10,
    relative_tolerance: float = 1e-4,
    cooldown: int = 0,
    average_rounds: int = 1,
    name: str = "initial_rate",
) -> RateRule:
    """Multiplies a rate by ``factor`` when the clients' training loss has stopped falling, by optax's rule.

    Args:
      initial_rate: where the rate starts.
      factor: strictly between 0 and 1.
      patience: rounds without improvement after which the rate falls.
      relative_tolerance: what counts as an improvement: loss < (1 − tolerance) · best.
      cooldown: rounds after a reduction that are not judged.
      average_rounds: rounds whose mean loss is one value; more than 1 steadies the noise of small cohorts.
      name: what messages call this rate.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = reduce_on_plateau(0.1, factor=0.5, patience=2)
      >>> state = rule.init(jnp.zeros(2))
      >>> for loss in (1.0, 0.9, 0.9, 0.9):
      ...     feedback = Feedback(jnp.int32(1), jnp.float32(0.0), client_loss=jnp.float32(loss))
      ...     state, _ = rule.update(state, feedback)
      >>> round(float(state.rate), 5)
      0.05

    Reference:
      `optax.contrib.reduce_on_plateau <https://optax.readthedocs.io/en/latest/api/contrib.html>`_, with its defaults;
      PyTorch's ``ReduceLROnPlateau`` waits one round more.
    """
    _validate.positive(**{name: initial_rate})
    _validate.fraction(factor=factor)
    _validate.positive_integer(patience=patience, average_rounds=average_rounds)
    _validate.non_negative(relative_tolerance=relative_tolerance)
    transform = optax.contrib.reduce_on_plateau(
        factor, patience, rtol=relative_tolerance, cooldown=cooldown, accumulation_size=average_rounds
    )

    def init(params: Params) -> PlateauState:
        rate = jnp.asarray(initial_rate, _tree.accumulator_dtype(params))
        return PlateauState(rate=rate, initial_rate=rate, plateau=transform.init(rate))

    def update(state: PlateauState, feedback: Feedback):
        finite = jnp.isfinite(feedback.client_loss)
        _, plateau = transform.update((), state.plateau, value=feedback.client_loss)
        plateau = _tree.select(finite, plateau, state.plateau)
        rate = state.initial_rate * plateau.scale
        return PlateauState(rate, state.initial_rate, plateau), RateReport.none()

    return RateRule(init=init, update=update, initial_rate=initial_rate)
