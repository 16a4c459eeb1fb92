"""Rules that move a client's rate between its local steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Params, Range, Scalar
from fedhyper_jax.hypergradient import (
    AdaptiveRate,
    adaptive_rate,
    check_adaptive_rate,
    local_pipeline,
    local_transform,
)
from fedhyper_jax.parts.contract import ClientFacts, ClientRule, RateReport


class GivenRateState(NamedTuple):
    """State of a client's rate that does not move.

    Attributes:
      rate: the broadcast rate.
    """

    rate: Float[Array, ""]


def broadcast_rate() -> ClientRule:
    """Every local step uses the rate that the server broadcast."""

    def transform(settings, rate, facts):
        del settings, facts

        def update_fn(updates, state, params=None, **extra_args):
            del params, extra_args
            return _tree.scale(updates, state.rate), state

        return optax.GradientTransformationExtraArgs(lambda params: GivenRateState(rate=rate), update_fn)

    return ClientRule(init=lambda params: (), transform=transform, report=_unmoved, moves=False)


def _unmoved(state) -> RateReport:
    del state
    return RateReport.none()


class CountedDescentState(NamedTuple):
    """State of `counted_descent`.

    Attributes:
      rate: the broadcast rate.
      descent: Σ_k ⟨g^k, w^k − w^{k+1}⟩.
    """

    rate: Float[Array, ""]
    descent: Float[Array, ""]


def counted_descent() -> ClientRule:
    """Every local step uses the broadcast rate, and the gains that the steps promise to first order are summed."""

    def transform(settings, rate, facts):
        del settings, facts

        def update_fn(updates, state, params=None, *, gradient, **extra_args):
            del params, extra_args
            steps = _tree.scale(updates, state.rate)
            descent = state.descent - state.rate * _tree.inner_product(gradient, updates).astype(rate.dtype)
            return steps, CountedDescentState(rate, descent)

        return optax.GradientTransformationExtraArgs(
            lambda params: CountedDescentState(rate, jnp.zeros_like(rate)), update_fn
        )

    return ClientRule(init=lambda params: (), transform=transform, report=_unmoved, moves=False)


class LocalSettings(NamedTuple):
    """Settings of `local_hypergradient`.

    Attributes:
      rule: hyper rate and bounds; clients start from the rate that they are sent, not from this one's.
      global_weight: of the product with Δ^{t-1}; None: 1/K_m.
    """

    rule: AdaptiveRate
    global_weight: Float[Array, ""] | None


def local_hypergradient(
    initial_rate: Scalar,
    hyper_rate: Scalar,
    bounds: Range,
    *,
    global_weight: Scalar | None = None,
    normalise: str | None = None,
    update: str = "additive",
    max_change: Scalar | None = None,
) -> ClientRule:
    """FedHyper-CL: the rate moves at every local step, see `scale_by_local_hypergradient`.

    Args:
      initial_rate: β^0 of the run, which the bounds must enclose.
      hyper_rate: κ.
      bounds: (lower, upper) as plain numbers.
      global_weight: weight ≥ 0 of the global term ⟨g, Δ^{t-1}⟩; 1/K_m if None. With 0 nothing depends on Δ^{t-1}.
      normalise, update, max_change: as of `scale_by_local_hypergradient`.
    """
    check_adaptive_rate(initial_rate, hyper_rate, bounds, rate_name="local_rate")
    if global_weight is not None:
        _validate.non_negative(global_weight=global_weight)
    ways = local_pipeline(normalise, update, max_change)

    def init(params) -> LocalSettings:
        dtype = _tree.accumulator_dtype(params)
        weight = None if global_weight is None else jnp.asarray(global_weight, dtype)
        rate = adaptive_rate(initial_rate, hyper_rate, bounds, dtype, max_change=ways.max_change)
        return LocalSettings(rate, weight)

    def transform(settings: LocalSettings, rate, facts: ClientFacts):
        weight = settings.global_weight
        if weight is None:
            weight = 1 / jnp.maximum(facts.num_steps, 1).astype(rate.dtype)
        rule = settings.rule
        own = ways._replace(max_change=rule.max_change)
        return local_transform(rate, rule.hyper_rate, (rule.lower, rule.upper), weight, own)

    def report(state):
        updates = jnp.maximum(state.step_count - 1, 0) - state.non_finite_count
        moved = RateReport(updates=updates, clipped=state.clipped_count, non_finite=state.non_finite_count)
        return _tree.select(state.hyper_rate > 0, moved, RateReport.none())

    unused = global_weight is not None and not _validate.is_traced(global_weight) and float(global_weight) == 0
    return ClientRule(init=init, transform=transform, report=report, needs_pseudo_gradient=not unused)


class StepSizeState(NamedTuple):
    """State of a step size that is computed anew at each step.

    Attributes:
      rate: of the last step.
      update_count: steps.
      clipped_count: of these, steps that the broadcast rate capped.
    """

    rate: Float[Array, ""]
    update_count: Int[Array, ""]
    clipped_count: Int[Array, ""]


def _counted(state: StepSizeState) -> RateReport:
    return RateReport(state.update_count, state.clipped_count, jnp.zeros((), jnp.int32))


def _fresh(rate, params) -> StepSizeState:
    del params
    return StepSizeState(rate, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


class PolyakSettings(NamedTuple):
    """Settings of `polyak`.

    Attributes:
      scale: c.
      lower_bound: ℓ*, of the losses of minibatches.
    """

    scale: Float[Array, ""]
    lower_bound: Float[Array, ""]


def polyak(scale: Scalar = 0.5, lower_bound: Scalar = 0.0) -> ClientRule:
    r"""FedSPS: the stochastic Polyak step of each minibatch, capped by the broadcast rate.

    .. math:: \beta_k = \min\Bigl\{\frac{F(w_k; \xi_k) - \ell^*}{c \, \|\nabla F(w_k; \xi_k)\|^2}, \beta\Bigr\}

    Args:
      scale: c > 0.
      lower_bound: ℓ*, a lower bound of the minibatch losses; 0 for cross-entropy and squared errors.

    Reference:
      Mukherjee, Loizou, Stich, `Locally Adaptive Federated Learning <https://arxiv.org/abs/2307.06306>`_, 2023; Loizou
      et al., `Stochastic Polyak Step-size for SGD <https://arxiv.org/abs/2002.10542>`_, AISTATS 2021.
    """
    _validate.positive(scale=scale)
    _validate.finite(lower_bound=lower_bound)

    def init(params) -> PolyakSettings:
        dtype = _tree.accumulator_dtype(params)
        return PolyakSettings(jnp.asarray(scale, dtype), jnp.asarray(lower_bound, dtype))

    def transform(settings: PolyakSettings, cap, facts):
        del facts

        def update_fn(updates, state, params=None, *, value, gradient, **extra_args):
            del params, extra_args
            denominator = settings.scale * _tree.inner_product(gradient, gradient)
            step = (value - settings.lower_bound) / jnp.where(denominator > 0, denominator, 1)
            step = jnp.where(denominator > 0, jnp.maximum(step, 0), jnp.inf).astype(cap.dtype)
            rate = jnp.minimum(step, cap)
            state = StepSizeState(rate, state.update_count + 1, state.clipped_count + (step > cap))
            return _tree.scale(updates, rate), state

        return optax.GradientTransformationExtraArgs(lambda params: _fresh(cap, params), update_fn)

    return ClientRule(
        init=init,
        transform=transform,
        report=_counted,
        plain_sgd_only="the Polyak step is the length of a step along the gradient",
        bounded_below_only="the Polyak step compares the local objective with its lower bound",
    )


def ngn(lower_bound: Scalar = 0.0) -> ClientRule:
    r"""NGN: the Gauss-Newton step of √(F − ℓ*), which no broadcast rate makes longer than Polyak's.

    .. math:: \beta_k = \frac{\beta}{1 + \beta \|\nabla F(w_k; \xi_k)\|^2 / (2 (F(w_k; \xi_k) - \ell^*))}

    It is β where β is small, and (F − ℓ*) / (‖g‖²/2) where it is large; the broadcast β is the paper's σ.

    Args:
      lower_bound: ℓ*, a lower bound of the minibatch losses, 0 in the paper. A loss below it makes a step of 0.

    Reference:
      Orvieto, Xiao, `An Adaptive Stochastic Gradient Method with Non-negative Gauss-Newton Stepsizes
      <https://arxiv.org/abs/2407.04358>`_, 2024.
    """
    _validate.finite(lower_bound=lower_bound)

    def transform(lower_bound, cap, facts):
        del facts

        def update_fn(updates, state, params=None, *, value, gradient, **extra_args):
            del params, extra_args
            gap = 2 * jnp.maximum(value - lower_bound, 0)
            squared_norm = _tree.inner_product(gradient, gradient)
            denominator = gap + cap * squared_norm
            rate = jnp.where(denominator > 0, cap * gap / jnp.where(denominator > 0, denominator, 1), cap)
            state = StepSizeState(rate.astype(cap.dtype), state.update_count + 1, state.clipped_count)
            return _tree.scale(updates, state.rate), state

        return optax.GradientTransformationExtraArgs(lambda params: _fresh(cap, params), update_fn)

    return ClientRule(
        init=lambda params: jnp.asarray(lower_bound, _tree.accumulator_dtype(params)),
        transform=transform,
        report=_counted,
        plain_sgd_only="the NGN step is the length of a step along the gradient",
        bounded_below_only="the NGN step compares the local objective with its lower bound",
    )


class ArmijoSettings(NamedTuple):
    """Settings of `armijo`.

    Attributes:
      decrease: c, the part of the promised decrease that a step must keep.
      shrink: b, from one trial to the next.
      fallback: the step where no trial was good enough.
      growth: of the start of a search over the last step found; None: each search starts from the broadcast rate.
    """

    decrease: Float[Array, ""]
    shrink: Float[Array, ""]
    fallback: Float[Array, ""]
    growth: Float[Array, ""] | None


class ArmijoState(NamedTuple):
    """State of `armijo`.

    Attributes:
      rate: of the last step.
      start: of the next search.
      update_count: searches.
      clipped_count: searches whose first trial was good enough.
    """

    rate: Float[Array, ""]
    start: Float[Array, ""]
    update_count: Int[Array, ""]
    clipped_count: Int[Array, ""]


def armijo(
    decrease: Scalar = 0.1,
    shrink: Scalar = 0.9,
    *,
    growth: Scalar = 2 ** (1 / 500),
    max_trials: int = 100,
    fallback: Scalar = 1e-6,
) -> ClientRule:
    r"""FedSLS: the longest step s·b^j, j = 0, 1, …, that satisfies Armijo's condition on its minibatch.

    .. math:: F(w_k - \beta_k g_k; \xi_k) \le F(w_k; \xi_k) - c \, \beta_k \|g_k\|^2

    The first search of a round starts from s = β, the broadcast rate, later ones from the last step times ``growth``;
    nothing bounds them from above. A trial costs one forward pass.

    Args:
      decrease: c, strictly between 0 and 1.
      shrink: b, strictly between 0 and 1.
      growth: ≥ 1, of the start of a search over the last step found; None: each search starts from β.
      max_trials: trials of one search.
      fallback: the step taken where none of them satisfies the condition.

    Reference:
      `Towards Hyper-parameter-free Federated Learning <https://arxiv.org/abs/2408.17145>`_, 2024; Vaswani et al.,
      `Painless Stochastic Gradient <https://arxiv.org/abs/1905.09997>`_, NeurIPS 2019 (the constants of its code).
    """
    _validate.fraction(decrease=decrease)
    _validate.fraction(shrink=shrink)
    _validate.positive_integer(max_trials=max_trials)
    _validate.positive(fallback=fallback)
    if growth is not None:
        _validate.positive(growth=growth)

    def init(params) -> ArmijoSettings:
        dtype = _tree.accumulator_dtype(params)
        given = (decrease, shrink, fallback, growth)
        return ArmijoSettings(*(None if value is None else jnp.asarray(value, dtype) for value in given))

    def transform(settings: ArmijoSettings, first_rate, facts):
        del facts

        def init_fn(params):
            del params
            return ArmijoState(first_rate, first_rate, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

        def update_fn(updates, state, params=None, *, value, gradient, value_fn, **extra_args):
            del extra_args
            squared_norm = _tree.inner_product(gradient, gradient)

            def too_long(search):
                trial, rate = search
                reached = value_fn(optax.apply_updates(params, _tree.scale(gradient, -rate)))
                # (a step of length 0 decreases enough, whatever rounding says)
                return (trial < max_trials) & (rate > 0) & ~(reached <= value - settings.decrease * rate * squared_norm)

            # A search that fails ends with trial = max_trials.
            trials, found = lax.while_loop(
                too_long, lambda search: (search[0] + 1, search[1] * settings.shrink), (jnp.int32(0), state.start)
            )
            rate = jnp.where(trials < max_trials, found, settings.fallback)
            new_state = ArmijoState(
                rate=rate,
                start=first_rate if settings.growth is None else found * settings.growth,
                update_count=state.update_count + 1,
                clipped_count=state.clipped_count + (trials == 0),
            )
            return _tree.scale(updates, rate), new_state

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return ClientRule(
        init=init,
        transform=transform,
        report=_counted,
        plain_sgd_only="Armijo's condition is about a step along the gradient",
    )


class DeltaSgdSettings(NamedTuple):
    """Settings of `delta_sgd_rate`.

    Attributes:
      scale: γ, of the bound by the local smoothness.
      growth: δ, of the bound by the last step.
    """

    scale: Float[Array, ""]
    growth: Float[Array, ""]


class DeltaSgdState(NamedTuple):
    """State of `delta_sgd_rate`.

    Attributes:
      rate: of the last step.
      ratio: θ.
      previous_params: w_{k-1}.
      step_count: k.
      clipped_count: steps that the bound by the last step held back.
    """

    rate: Float[Array, ""]
    ratio: Float[Array, ""]
    previous_params: Params
    step_count: Int[Array, ""]
    clipped_count: Int[Array, ""]


def delta_sgd_rate(scale: Scalar = 2.0, growth: Scalar = 0.1) -> ClientRule:
    r"""Δ-SGD: a step size from the local smoothness that the last step has met.

    .. math::
      \beta_k = \min\Bigl\{\frac{\gamma \|w_k - w_{k-1}\|}{2 \|\nabla F(w_k; \xi_k) - \nabla F(w_{k-1}; \xi_k)\|},
      \sqrt{1 + \delta \theta_{k-1}} \, \beta_{k-1}\Bigr\}, \qquad \theta_k = \frac{\beta_k}{\beta_{k-1}}

    Both gradients are taken on the *same* minibatch ξ_k, which costs a second backward pass. β_0 is the broadcast rate,
    θ_0 = 1, and the state starts afresh each round.

    Args:
      scale: γ > 0.
      growth: δ ≥ 0; 0.1 in the paper, 0.02 the default of its code.

    Reference:
      Kim et al., `Adaptive Federated Learning with Auto-Tuned Clients <https://arxiv.org/abs/2306.11201>`_, ICLR 2024.
    """
    _validate.positive(scale=scale)
    _validate.non_negative(growth=growth)

    def init(params) -> DeltaSgdSettings:
        dtype = _tree.accumulator_dtype(params)
        return DeltaSgdSettings(jnp.asarray(scale, dtype), jnp.asarray(growth, dtype))

    def transform(settings: DeltaSgdSettings, first_rate, facts):
        del facts

        def init_fn(params):
            zero = jnp.zeros((), jnp.int32)
            return DeltaSgdState(first_rate, jnp.ones_like(first_rate), params, zero, zero)

        def update_fn(updates, state, params=None, *, gradient, value_fn, **extra_args):
            del extra_args
            previous_gradient = jax.grad(value_fn)(state.previous_params)
            distance = _tree.norm(_tree.subtract(params, state.previous_params))
            change = _tree.norm(_tree.subtract(gradient, previous_gradient))
            smooth = settings.scale * distance / (2 * jnp.where(change > 0, change, 1))
            longest = jnp.sqrt(1 + settings.growth * state.ratio) * state.rate
            moves = state.step_count > 0
            # A step without change of gradient (or of place) has met no smoothness: only the growth binds.
            step = jnp.where((change > 0) & (distance > 0), jnp.minimum(smooth, longest), longest)
            rate = jnp.where(moves, step.astype(first_rate.dtype), state.rate)
            new_state = DeltaSgdState(
                rate=rate,
                ratio=jnp.where(moves, rate / jnp.where(state.rate > 0, state.rate, 1), state.ratio),
                previous_params=params,
                step_count=state.step_count + 1,
                clipped_count=state.clipped_count + (moves & (rate == longest)),
            )
            return _tree.scale(updates, rate), new_state

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    def report(state: DeltaSgdState):
        return RateReport(jnp.maximum(state.step_count - 1, 0), state.clipped_count, jnp.zeros((), jnp.int32))

    return ClientRule(
        init=init,
        transform=transform,
        report=report,
        plain_sgd_only="Δ-SGD's step is the length of a step along the gradient",
    )
