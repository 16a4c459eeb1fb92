"""Refusals that no function further down would make, or only after much work."""

import math

import numpy as np

from fedhyper_jax import _validate
from fedhyper_jax.engine import parse_strategy
from fedhyper_jax.shell.algorithms import cells
from fedhyper_jax.shell.config import AUTO, CompareConfig, Config, RunConfig
from fedhyper_jax.shell.deployment import check_deployment

_MOST_SEEDS = 10_000


def check_numbers(config: Config) -> None:
    """Refuses numbers of a configuration.

    Raises:
      ValueError: a number out of range; the message names it.

    Example:
      >>> check_numbers(RunConfig())
    """
    run, method = config.run, config.method
    _validate.positive_integer(rounds=run.rounds, eval_every=run.eval_every, clients=config.data.clients)
    if not 0 <= config.data.hold_out < 1:
        raise ValueError(f"hold_out must lie in [0, 1), got {config.data.hold_out!r}; 0 holds nothing out")
    for setting in ("decay_factor", "server_optimizer_rate"):
        if (value := getattr(method, setting)) is not None:
            _validate.positive(**{setting: value})
    check_deployment(config.deployment)
    if isinstance(config, CompareConfig):
        _check_grid(config)
    for seed in (run.seed,) if isinstance(config, RunConfig) else config.compare.seed_list:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds must be integers from 0 to 2**32 - 1, got {seed}")
    wrong = [rate for _, rate in cells(config) if not (math.isfinite(rate) and rate > 0)]
    if wrong:
        raise ValueError(f"local_rate must be finite and > 0, got {wrong[0]!r}; give a positive number such as 0.1")


def _check_grid(config: CompareConfig) -> None:
    grid, strategy = config.compare, config.run.strategy
    if isinstance(grid.seeds, int) and grid.seeds > _MOST_SEEDS:
        raise ValueError(f"seeds must be at most {_MOST_SEEDS} at once, got {grid.seeds}")
    if strategy != AUTO and not parse_strategy(strategy).compiles:
        raise ValueError(f"strategy {strategy!r} runs without compilation; use it with `fedhyper run`")
    # (rates are float32: two that it cannot tell apart are one)
    rates = tuple(np.float32(rate) for rate in grid.local_rates)
    for name, values in (("methods", grid.methods), ("local_rates", rates)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be one or more different values, got {list(getattr(grid, name))}")
    if not grid.seed_list or len(set(grid.seed_list)) < len(grid.seed_list):
        raise ValueError(f"seeds must be a number ≥ 1 or different seeds, got {grid.seeds!r}")
