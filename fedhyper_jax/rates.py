"""Rules that move a rate from round to round: constant, scheduled, hypergradient.

One rule owns each rate of an algorithm, so two rules for one rate cannot be written down. A rule is a pair of pure
functions over arrays; whatever a user may want to vary (rates, hyper rates, bounds, whole schedules) is in its state.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Params, PyTree
from fedhyper_jax.hypergradient import AdaptiveRate, adapt, adaptive_rate
from fedhyper_jax.hypergradient._rule import check

SCHEDULE_ROUNDS = 10_000
"""Rounds for which a schedule is tabulated by default."""


class Feedback(NamedTuple):
    """What a round tells the rules."""

    round: Int[Array, ""]  # the round for which the rate is wanted
    inner_product: Float[Array, ""]  # ⟨Δ^t, Δ^{t-1}⟩


class RateReport(NamedTuple):
    """What a rule did in a round; int32 scalars."""

    updates: Int[Array, ""]  # hypergradient updates of the rate, that with product 0 in round 0 included
    clipped: Int[Array, ""]  # of these, values outside the bounds before clipping
    non_finite: Int[Array, ""]  # products that were not finite

    @classmethod
    def none(cls) -> "RateReport":
        """Nothing moved."""
        return cls(*(jnp.zeros((), jnp.int32) for _ in cls._fields))


class RateRule(NamedTuple):
    """How a rate moves.

    Attributes:
      init: ``init(params) -> state``; ``state.rate`` is the rate of round 0.
      update: ``update(state, feedback) -> (state, RateReport)``; ``state.rate`` is the rate of ``feedback.round``.
      initial_rate: the rate of round 0 as given, maybe traced; relative bounds are taken from it.
      by_round: whether the rate depends on the round alone, and so moves on after a round without survivors.
    """

    init: Callable[[Params], PyTree]
    update: Callable[[PyTree, Feedback], tuple[PyTree, RateReport]]
    initial_rate: Any
    by_round: bool


class ScheduledRate(NamedTuple):
    """A rate read from a table."""

    rate: Float[Array, ""]
    table: Float[Array, " rounds"]  # the rate of each round; the last value holds beyond the end


def scheduled(schedule: optax.Schedule | float, *, rounds: int = SCHEDULE_ROUNDS, name: str = "rate") -> RateRule:
    """A constant, or an optax schedule of the round, as data.

    The schedule is tabulated for ``rounds`` rounds into the state, so another schedule is other data for the same
    compiled program, and schedules can be swept under ``vmap``. `simulation.simulate` and `simulation.run` refuse
    more rounds than the table holds.

    Args:
      schedule: a rate > 0 (which may be traced), or a callable from the round number to a rate.
      rounds: length of the table, for a callable; at least 2.
      name: what messages call this rate.

    Raises:
      ValueError: a rate that is not finite and > 0; a schedule that is negative or not finite in some round, or 0 in
        round 0.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> rule = scheduled(optax.exponential_decay(1.0, 1, 0.5), rounds=8)
      >>> state = rule.init(jnp.zeros(3))
      >>> state, _ = rule.update(state, Feedback(jnp.int32(3), jnp.float32(0.0)))
      >>> float(state.rate)
      0.125
    """
    if callable(schedule):
        _validate.positive_integer(schedule_rounds=rounds)
        if rounds < 2:
            raise ValueError(
                f"schedule_rounds must be ≥ 2, got {rounds}; a single rate is no schedule, give the number"
            )
        table = _tabulate(schedule, rounds, name)
        if not _validate.is_traced(table):
            values = np.asarray(table)
            wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
            if len(wrong) or values[0] == 0:
                at = int(wrong[0]) if len(wrong) else 0
                raise ValueError(
                    f"{name}: the schedule gives {values[at]} in round {at}; "
                    "rates must be finite and ≥ 0, and > 0 in round 0; "
                    f"if the run is shorter, make the algorithm with schedule_rounds={max(at, 2)}"
                )
        initial = table[0]
    else:
        _validate.positive(**{name: schedule})
        initial, table = schedule, jnp.asarray(schedule, float)[None]

    def init(params: Params) -> ScheduledRate:
        dtype = _tree.accumulator_dtype(params)
        return ScheduledRate(rate=jnp.asarray(initial, dtype), table=table.astype(dtype))

    def update(state: ScheduledRate, feedback: Feedback):
        rate = jnp.take(state.table, feedback.round, mode="clip")
        return ScheduledRate(rate=rate, table=state.table), RateReport.none()

    return RateRule(init=init, update=update, initial_rate=initial, by_round=True)


def _tabulate(schedule: optax.Schedule, rounds: int, name: str) -> Float[Array, " rounds"]:
    try:
        table = jax.vmap(lambda count: jnp.asarray(schedule(count), float))(jnp.arange(rounds))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        # A schedule in plain Python (`if count < 10`) or NumPy: one round after the other.
        table = jnp.asarray([schedule(count) for count in range(rounds)], float)
    if table.shape != (rounds,):
        raise ValueError(f"{name}: the schedule must give one number a round, got shape {table.shape[1:]}")
    return table


def check_horizon(rule_state: PyTree, rounds: int, *, name: str) -> None:
    """Raises ValueError where a tabulated schedule is shorter than the run."""
    if isinstance(rule_state, ScheduledRate):
        horizon = rule_state.table.shape[-1]
        if 1 < horizon < rounds:
            raise ValueError(
                f"the schedule of {name} is tabulated for {horizon} rounds, but the run has {rounds}; "
                f"make the algorithm with schedule_rounds={rounds}"
            )


def hypergradient(initial_rate, hyper_rate=1.0, bounds=(0.0, math.inf), *, name: str = "initial_rate") -> RateRule:
    """The rule of FedHyper-G and -SL: r ← clip(r + κ⟨Δ^t, Δ^{t-1}⟩, lower, upper).

    Used for α it sets the rate of the present round, used for β that of the next; see SPEC eq. 15-18.

    Args:
      initial_rate: rate of round 0.
      hyper_rate: κ.
      bounds: (lower, upper) as plain numbers.
      name: what messages call this rate.

    Example:
      >>> import jax.numpy as jnp
      >>> rule = hypergradient(1.0, bounds=(1 / 3, 3.0))
      >>> feedback = Feedback(jnp.int32(1), jnp.float32(0.25))
      >>> float(rule.update(rule.init(jnp.zeros(3)), feedback)[0].rate)
      1.25

    Reference:
      Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024, eq. 15-18.
    """
    check(initial_rate, hyper_rate, bounds, rate_name=name)

    def init(params: Params) -> AdaptiveRate:
        return adaptive_rate(initial_rate, hyper_rate, bounds, _tree.accumulator_dtype(params))

    def update(state: AdaptiveRate, feedback: Feedback):
        state, observed = adapt(state, feedback.inner_product)
        report = RateReport(
            updates=(~observed.non_finite).astype(jnp.int32),
            clipped=observed.clipped.astype(jnp.int32),
            non_finite=observed.non_finite.astype(jnp.int32),
        )
        return state, report

    return RateRule(init=init, update=update, initial_rate=initial_rate, by_round=False)
