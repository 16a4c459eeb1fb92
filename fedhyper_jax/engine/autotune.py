"""Which strategy is fastest: measured on throw-away rounds of the very job, before round 0."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedhyper_jax import _validate
from fedhyper_jax.engine.strategies import divided, parse_strategy

_WORTHWHILE = 0.3
"""Share of a run's time that another candidate may be hoped to save."""


class StrategyTiming(NamedTuple):
    """Times of the throw-away rounds of one strategy.

    Attributes:
      name: of the strategy.
      seconds_per_round: fastest of the repeats.
      compile_seconds: the first call, which compiles, less a round.
    """

    name: str
    seconds_per_round: float
    compile_seconds: float


def strategy_candidates(cohort_size: int, devices: int = 1) -> tuple[str, ...]:
    """The strategies that may be fastest here, in the order in which they are worth a try.

    On CPU clients run one after the other, which compiles in half the time and so is best for short runs, or in chunks
    that the cache holds; on accelerators as many as possible side by side.

    Args:
      cohort_size: clients a round.
      devices: that share them.

    Example:
      >>> strategy_candidates(3)
      ('sequential', 'vectorized')
    """
    _validate.positive_integer(cohort_size=cohort_size, devices=devices)
    own = -(-cohort_size // devices)  # clients of a device
    if jax.default_backend() == "cpu":
        names = ["sequential", *(f"chunked({c})" for c in (5, 10) if c < own), *["vectorized"] * (1 < own <= 10)]
    else:
        names = ["vectorized"] + [f"chunked({c})" for c in (64, 16) if c < own]
    return tuple(divided(name, devices) for name in names)


def time_strategies(
    candidates: Sequence[str], one_round: Callable[[str], Callable[[], Any]], *, rounds: int
) -> list[StrategyTiming]:
    """Times strategies on throw-away rounds of a job.

    Another candidate is tried only while a third of the whole run's time is more than trying one costs. In a program of
    several processes the first process decides for all.

    Args:
      candidates: names of strategies, cheapest first, see `strategy_candidates`.
      one_round: ``one_round(name)`` gives a function that runs one round of the job by that strategy and returns its
        arrays; the first call compiles.
      rounds: of the run that is to come.

    Returns:
      Timings in the order in which they were made; `fastest` is the choice.

    Raises:
      ValueError: no candidates, or unknown ones.

    Example:
      >>> import jax, numpy as np
      >>> from fedhyper_jax import fedavg, simulate
      >>> from fedhyper_jax.data import local_epochs, pack
      >>> data = pack({"x": np.ones((4, 1))}, [np.array([0, 1]), np.array([2, 3])])
      >>> def loss_fn(w, batch): return 0.5 * ((w - batch["x"]) ** 2).sum(axis=1)
      >>> def one_round(strategy):
      ...     algorithm = fedavg(loss_fn, work=local_epochs(1, 2), local_rate=0.1, strategy=strategy)
      ...     state = algorithm.init(jax.numpy.zeros(1))
      ...     return lambda: simulate(algorithm, jax.random.key(0), state, data, rounds=1, cohort_size=2)
      >>> timings = time_strategies(["sequential", "vectorized"], one_round, rounds=10_000_000)
      >>> [timing.name for timing in timings], fastest(timings) in ("sequential", "vectorized")
      (['sequential', 'vectorized'], True)
    """
    _validate.positive_integer(rounds=rounds)
    if not candidates:
        raise ValueError("candidates must name at least one strategy, got none; strategy_candidates() has the usual")
    for name in candidates:
        parse_strategy(name)
    timings: list[StrategyTiming] = []
    for name in candidates:
        if timings:
            best = min(timing.seconds_per_round for timing in timings)
            # A program costs its compilation and the few rounds that it is timed on.
            cost = max(timing.compile_seconds for timing in timings) + 3 * best
            if not agreed(_WORTHWHILE * best * rounds > cost):
                break
        run = one_round(name)
        first, *others = (_seconds(run) for _ in range(3))
        first, best = agreed(np.array([first, min(others)]))
        timings.append(StrategyTiming(name, float(best), max(0.0, float(first - best))))
    return timings


def fastest(timings: Sequence[StrategyTiming]) -> str:
    """Name of the fastest strategy."""
    return min(timings, key=lambda timing: timing.seconds_per_round).name


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def wait_for_all(what: str) -> None:
    """Returns once every process of the program has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def agreed(value: Any) -> Any:
    """The first process's value, in all processes; decisions must be one."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(np.asarray(value))
