"""Failures and absences in a deployment: the settings, and the parts that they make.

A new one is a field of `DeploymentConfig` and a line in `make_failures`, `make_guard` or `make_participation`.
"""

import dataclasses
import math

import numpy as np

from fedhyper_jax.parts import FailureModel, Guard, Participation, failures, guards, participation


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeploymentConfig:
    """Failures and absences in a deployment, and what is done about them; by default there are none."""

    availability: float = 0.0
    """Spread of the clients' availability: a client is drawn in proportion to the exponential of this times a standard
    normal number of its own, which comes from partition_seed. 0 draws all clients alike."""
    dropout: float = 0.0
    """Probability that a client that was drawn does not start."""
    stragglers: float = 0.0
    """Probability that a client is too slow, and takes a number of its local steps that is drawn from 1 to all."""
    lost_updates: float = 0.0
    """Probability that the update of a client that did its work does not arrive."""
    rollback: float | None = None
    """Take a round back whose training loss exceeds this many times (> 1) that of the last round that counted."""


_WIDEST = 20.0
"""Spread of availabilities; beyond it the cohort is as good as fixed, and float64 overflows."""


def check_deployment(config: DeploymentConfig) -> None:
    """Refuses numbers out of range.

    Raises:
      ValueError: the message names the setting.

    Example:
      >>> check_deployment(DeploymentConfig(dropout=0.1))
    """
    for name in ("dropout", "stragglers", "lost_updates"):
        if not 0 <= (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value!r}; 0.1 is one client in ten")
    if not 0 <= config.availability <= _WIDEST:
        raise ValueError(
            f"availability must lie in [0, {_WIDEST:g}], got {config.availability!r}; 0 draws all clients alike"
        )
    if config.rollback is not None and not (math.isfinite(config.rollback) and config.rollback > 1):
        raise ValueError(
            f"rollback must be finite and > 1, got {config.rollback!r}; 2 takes back rounds whose loss doubles"
        )


def make_failures(config: DeploymentConfig) -> FailureModel | None:
    """Who does not deliver; None where everybody does.

    Example:
      >>> make_failures(DeploymentConfig(dropout=0.1, stragglers=0.2)).name
      'dropout, stragglers'
    """
    models = []
    if config.dropout or config.lost_updates:
        models.append(failures.dropout(config.dropout, config.lost_updates))
    if config.stragglers:
        models.append(failures.stragglers(config.stragglers))
    return failures.joined(*models) if models else None


def make_guard(config: DeploymentConfig) -> Guard | None:
    """Which rounds count; None where all do that are finite.

    Example:
      >>> make_guard(DeploymentConfig()) is None
      True
    """
    return None if config.rollback is None else guards.rollback(config.rollback)


def make_participation(config: DeploymentConfig, population: int, seed: int) -> Participation | None:
    """Who is drawn: clients in proportion to log-normal availabilities; None, uniformly, where their spread is 0.

    Args:
      config: of the deployment.
      population: number of clients.
      seed: of the availabilities.

    Example:
      >>> make_participation(DeploymentConfig(availability=1.0), 5, seed=0).name
      'weighted'
    """
    if config.availability == 0:
        return None
    normal = np.random.default_rng((seed, population)).standard_normal(population)
    return participation.weighted(np.exp(config.availability * normal))
