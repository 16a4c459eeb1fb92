"""Rates that are given in advance: constants and schedules of the round."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Params, PyTree
from fedhyper_jax.parts.contract import Feedback, RateReport, RateRule

__all__ = ["SCHEDULE_ROUNDS", "as_rate_rule", "check_horizon", "scheduled"]

SCHEDULE_ROUNDS = 10_000
"""Rounds for which a schedule is tabulated by default."""


class ScheduledRate(NamedTuple):
    """A rate read from a table."""

    rate: Float[Array, ""]
    table: Float[Array, " rounds"]  # the rate of each round; the last value holds beyond the end


def scheduled(schedule: optax.Schedule | float, *, rounds: int = SCHEDULE_ROUNDS, name: str = "rate") -> RateRule:
    """A constant, or an optax schedule of the round, as data.

    The schedule is tabulated for ``rounds`` rounds into the state, so another schedule is other data for the same
    compiled program, and schedules can be swept under ``vmap``. `simulation.simulate` and `simulation.run` refuse
    more rounds than the table holds. In a round at rate 0 (a warm-up may begin with one) no parameters move.

    Args:
      schedule: a rate > 0 (which may be traced), or a callable from the round number to a rate.
      rounds: length of the table, for a callable; at least 2.
      name: what messages call this rate.

    Raises:
      ValueError: a rate that is not finite and > 0; a schedule that is negative or not finite in some round, or 0 in
        all of them.

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
            _check_table(np.asarray(table), name)
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


def _check_table(values: np.ndarray, name: str) -> None:
    """Raises ValueError for rates that cannot be."""
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(wrong):
        at = int(wrong[0])
        shorter = f"; if the run is shorter, make the algorithm with schedule_rounds={at}" if at >= 2 else ""
        raise ValueError(
            f"{name}: the schedule gives {values[at]} in round {at}; rates must be finite and ≥ 0{shorter}"
        )
    if not values.any():
        raise ValueError(
            f"{name}: the schedule gives 0 in all of its {len(values)} rounds, which would move nothing; give one that "
            "rises above 0, or tabulate more of it by schedule_rounds"
        )


def _tabulate(schedule: optax.Schedule, rounds: int, name: str) -> Float[Array, " rounds"]:
    try:
        table = jax.vmap(lambda count: jnp.asarray(schedule(count), float))(jnp.arange(rounds))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        # A schedule in plain Python (`if count < 10`) or NumPy: one round after the other.
        table = jnp.asarray([schedule(count) for count in range(rounds)], float)
    if table.shape != (rounds,):
        raise ValueError(f"{name}: the schedule must give one number a round, got shape {table.shape[1:]}")
    return table


def as_rate_rule(rate: RateRule | optax.ScalarOrSchedule, *, rounds: int = SCHEDULE_ROUNDS, name: str) -> RateRule:
    """A rule as it is; a number or a schedule as `scheduled`."""
    return rate if isinstance(rate, RateRule) else scheduled(rate, rounds=rounds, name=name)


def check_horizon(rule_state: PyTree, rounds: int, *, name: str) -> None:
    """Raises ValueError where a tabulated schedule is shorter than the run."""
    if isinstance(rule_state, ScheduledRate):
        horizon = rule_state.table.shape[-1]
        if 1 < horizon < rounds:
            raise ValueError(
                f"the schedule of {name} is tabulated for {horizon} rounds, but the run has {rounds}; "
                f"make the algorithm with schedule_rounds={rounds}"
            )
