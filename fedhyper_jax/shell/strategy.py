"""The strategy of a run: as asked for, or the fastest of throw-away rounds, which is remembered."""

import time
from collections.abc import Callable
from typing import Any

import jax

from fedhyper_jax.engine import agreed, divided, fastest, strategy_candidates, time_strategies
from fedhyper_jax.shell.algorithms import OPTION_SETTINGS
from fedhyper_jax.shell.cache import recall, remember
from fedhyper_jax.shell.config import AUTO, CompareConfig, Config
from fedhyper_jax.shell.progress import ProgressBar
from fedhyper_jax.shell.records import environment


def choose_strategy(
    config: Config,
    one_round: Callable[[str], Callable[[], Any]],
    bar: ProgressBar,
    *,
    program: str,
    rounds: int,
    devices: int | None = None,
) -> dict[str, Any]:
    """The strategy of a run, chosen on rounds of the very program that is to come.

    Args:
      config: whose strategy may be "auto"; then candidates are timed.
      one_round: see `time_strategies`.
      bar: is told, and of the program if timing has compiled it.
      program: its name there.
      rounds: of the run that is to come.
      devices: that share a cohort; all of all processes if None.

    Returns:
      What the run folder records of the choice; its name is ``used``.
    """
    bar.describe("choosing a strategy")
    asked, devices = config.run.strategy, jax.device_count() if devices is None else devices
    if asked != AUTO:
        used = divided(asked, devices)
        return {"asked": asked, "used": used}
    candidates = strategy_candidates(config.run.cohort_size, devices)
    question = _job_of(config)
    known = recall(question)
    position = int(agreed(candidates.index(known) if known in candidates else -1))
    if position >= 0:
        return {"asked": asked, "used": candidates[position], "timings": "of an earlier run"}
    start = time.perf_counter()
    timings = time_strategies(candidates, one_round, rounds=rounds)
    bar.compiled(program, time.perf_counter() - start)
    used = fastest(timings)
    if jax.process_index() == 0:
        remember(question, used)
    return {"asked": asked, "used": used, "timings": [timing._asdict() for timing in timings]}


def _job_of(config: Config) -> dict[str, Any]:
    """Everything that the fastest strategy depends on: all but rates, seeds, the folder and how often is evaluated."""
    run, method = vars(config.run), vars(config.method)
    rates = ("local_rate", "options", *OPTION_SETTINGS)
    return {
        "data": vars(config.data),
        "model": vars(config.model),
        "work": vars(config.work),
        "deployment": vars(config.deployment),
        "method": {name: value for name, value in method.items() if name not in rates},
        "run": {name: run[name] for name in ("rounds", "cohort_size")},
        "compare": vars(config.compare) if isinstance(config, CompareConfig) else None,
        "environment": environment(),
        "processes": jax.process_count(),
    }
