"""The strategy of a run: as asked for, or the fastest of throw-away rounds, which is remembered."""

from collections.abc import Callable
from typing import Any

import jax

from fedhyper_jax.engine import agreed, divided, fastest, strategy_candidates, time_strategies
from fedhyper_jax.shell.algorithms import OPTION_SETTINGS
from fedhyper_jax.shell.cache import recall, remember
from fedhyper_jax.shell.config import AUTO, CompareConfig, Config
from fedhyper_jax.shell.records import environment


def choose_strategy(
    config: Config, one_round: Callable[[str], Callable[[], Any]], *, rounds: int, devices: int | None = None
) -> tuple[str, dict[str, Any]]:
    """The strategy of a run.

    Args:
      config: whose strategy may be "auto"; then candidates are timed.
      one_round: see `time_strategies`.
      rounds: of the run that is to come.
      devices: that share a cohort; all of all processes if None.

    Returns:
      Its name, and what the run folder records of the choice.
    """
    asked, devices = config.run.strategy, jax.device_count() if devices is None else devices
    if asked != AUTO:
        used = divided(asked, devices)
        return used, {"asked": asked, "used": used}
    candidates = strategy_candidates(config.run.cohort_size, devices)
    question = _job_of(config)
    known = recall(question)
    position = int(agreed(candidates.index(known) if known in candidates else -1))
    if position >= 0:
        return candidates[position], {"asked": asked, "used": candidates[position], "timings": "of an earlier run"}
    timings = time_strategies(candidates, one_round, rounds=rounds)
    used = fastest(timings)
    if jax.process_index() == 0:
        remember(question, used)
    return used, {"asked": asked, "used": used, "timings": [timing._asdict() for timing in timings]}


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
