"""Rules of either rate from round to round other than FedHyper's: decays, plateaus, FedExP and FATHOM."""

import math

import optax

from fedhyper_jax import _validate
from fedhyper_jax.base import Scalar
from fedhyper_jax.methods.pieces import Pieces, Start
from fedhyper_jax.methods.values import method
from fedhyper_jax.parts import RateRule, rates

__all__ = [
    "decay_global",
    "decay_local",
    "exponential_decay",
    "fathom",
    "fedexp",
    "plateau_global",
    "plateau_local",
]

_BASELINE = "Wang, Wang, Li, ICLR 2024, arXiv 2310.03156 (baseline)"
_PLATEAU = "optax.contrib.reduce_on_plateau (PyTorch's waits one round more)"
_PLATEAU_STATE = "optax.contrib.reduce_on_plateau's"


def exponential_decay(rate: Scalar, factor: Scalar = 0.995) -> optax.Schedule:
    """The schedule rate · factor^round; rate and factor may be traced.

    Example:
      >>> round(float(exponential_decay(0.1)(2)), 6)  # 0.1 · 0.995²
      0.099003
    """
    _validate.positive(rate=rate, factor=factor)
    return lambda count: rate * factor**count


@method(title="Decay-G", kind="global rate", equation="α^t = α · factor^t", source=_BASELINE)
def decay_global(*, decay_factor: Scalar = 0.995) -> Pieces:
    """Decay-G: FedAvg with α^t = α · factor^t. Settings as of `fedavg`.

    Args:
      decay_factor: > 0, a round.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = decay_global(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, decay_factor=0.9)

    Reference:
      A baseline of Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024.
    """
    _validate.positive(decay_factor=decay_factor)

    def global_rate(start: Start) -> RateRule:
        _validate.positive(global_rate=start.global_rate)
        schedule = exponential_decay(start.global_rate, decay_factor)
        return rates.scheduled(schedule, rounds=start.schedule_rounds, name="global_rate")

    return Pieces(global_rate=global_rate)


@method(
    title="Decay-SL",
    kind="local rate",
    equation="β^t = β · factor^t",
    source=_BASELINE,
    note="without effect in the authors' public code; here it acts",
)
def decay_local(*, decay_factor: Scalar = 0.995) -> Pieces:
    """Decay-SL: FedAvg with β^t = β · factor^t. Settings as of `fedavg`.

    (In the authors' public code this decay is without effect: local rates are rebuilt from the initial value at the
    top of each round. Here it acts.)

    Args:
      decay_factor: > 0, a round.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = decay_local(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, decay_factor=0.9)

    Reference:
      A baseline of Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024.
    """
    _validate.positive(decay_factor=decay_factor)

    def local_rate(start: Start) -> RateRule:
        _validate.positive(local_rate=start.local_rate)
        schedule = exponential_decay(start.local_rate, decay_factor)
        return rates.scheduled(schedule, rounds=start.schedule_rounds, name="local_rate")

    return Pieces(local_rate=local_rate)


@method(
    title="Reduce on plateau (global rate)",
    kind="global rate",
    equation="α ← factor · α at the `patience`-th round in a row whose training loss is no new minimum",
    state=_PLATEAU_STATE,
    source=_PLATEAU,
)
def plateau_global(*, plateau_factor: Scalar = 0.1, patience: int = 10, average_rounds: int = 1) -> Pieces:
    """FedAvg whose global rate is reduced when the clients' training loss stops falling. Settings as of `fedavg`.

    Args:
      plateau_factor: strictly between 0 and 1.
      patience: rounds without improvement after which the rate falls.
      average_rounds: rounds whose mean loss is one value; more than 1 steadies the noise of small cohorts.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = plateau_global(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, plateau_factor=0.5)

    Reference:
      See `rates.reduce_on_plateau`.
    """
    _validate.fraction(plateau_factor=plateau_factor)
    options = {"factor": plateau_factor, "patience": patience, "average_rounds": average_rounds}
    return Pieces(global_rate=lambda start: rates.reduce_on_plateau(start.global_rate, **options, name="global_rate"))


@method(
    title="Reduce on plateau (local rate)",
    kind="local rate",
    equation="β ← factor · β at the `patience`-th round in a row whose training loss is no new minimum",
    state=_PLATEAU_STATE,
    source=_PLATEAU,
)
def plateau_local(*, plateau_factor: Scalar = 0.1, patience: int = 10, average_rounds: int = 1) -> Pieces:
    """FedAvg whose local rate is reduced when the clients' training loss stops falling. Settings as of `fedavg`.

    Args:
      plateau_factor: strictly between 0 and 1.
      patience: rounds without improvement after which the rate falls.
      average_rounds: rounds whose mean loss is one value; more than 1 steadies the noise of small cohorts.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = plateau_local(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, patience=5)

    Reference:
      See `rates.reduce_on_plateau`.
    """
    _validate.fraction(plateau_factor=plateau_factor)
    options = {"factor": plateau_factor, "patience": patience, "average_rounds": average_rounds}
    return Pieces(local_rate=lambda start: rates.reduce_on_plateau(start.local_rate, **options, name="local_rate"))


@method(
    title="FedExP",
    kind="global rate",
    equation="α^t = max(1, Σ p_m ‖Δ_m‖² / (2 (‖Δ‖² + ε))), evaluated at (w^{t+1} + w^t)/2",
    state="w^{t-1}, d numbers",
    communication="‖Δ_m‖² up",
    source="Jhunjhunwala et al., ICLR 2023, arXiv 2301.09604",
    note="ε as in the formula; the published code multiplies it by the cohort's size and lets it decay",
    own_global_rate="FedExP computes its global rate from the updates",
)
def fedexp(*, epsilon: Scalar = 1e-3) -> Pieces:
    r"""FedExP: α^t = max(1, Σ p_m ‖Δ_m‖² / (2 (‖Δ‖² + ε))), evaluated at the mean of the last two iterates.

    Settings as of `fedavg`, but for ``global_rate``, which it computes itself.

    Args:
      epsilon: ε ≥ 0.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedexp(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `rates.extrapolation`.
    """
    rule = rates.extrapolation(epsilon)
    return Pieces(global_rate=lambda start: rule, evaluate_at="mean_of_last_two")


@method(
    title="FATHOM (its rule of the learning rate)",
    kind="local rate",
    equation="β ← β exp(κ cos(Δ^t, Δ̄^{t-1})), Δ̄^t = a Δ̄^{t-1} + (1−a) Δ^t, κ the cosine_rate",
    state="Δ̄, d numbers",
    source="Kan, 2022, arXiv 2211.02106",
    note="FATHOM's epochs and batch sizes are not adapted",
)
def fathom(*, cosine_rate: Scalar = 0.01, smoothing: Scalar = 0.5, upper: Scalar = math.inf) -> Pieces:
    r"""FATHOM's rule of the local rate: β ← β exp(κ cos(Δ, smoothed Δ)). Settings as of `fedavg`.

    (FATHOM also adapts epochs and batch size; that is not part of it here.)

    Args:
      cosine_rate: κ ≥ 0.
      smoothing: a, strictly between 0 and 1.
      upper: bound of β.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fathom(loss_fn, work=local_steps(5, batch_size=1), local_rate=0.1, upper=0.5)

    Reference:
      See `rates.smoothed_cosine`.
    """

    def local_rate(start: Start) -> RateRule:
        bounds = (0.0, upper)
        return rates.smoothed_cosine(start.local_rate, cosine_rate, bounds, smoothing=smoothing, name="local_rate")

    return Pieces(local_rate=local_rate)
