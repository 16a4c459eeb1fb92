"""A JAX functional simulator of federated learning with the FedHyper hypergradient learning-rate schedulers.

A federated algorithm is a pair of pure functions (init, round), and a learning rate is data, never code: rates live in
arrays, so they change at every step, differ per client, are swept under ``vmap`` and never cause a recompile.

  * Algorithms: `fedavg`, `fedhyper`, `decay_global`, `decay_local`; your own rules through `federated_algorithm`.
  * Runs: `simulate` (one scan), `run` (host loop with callbacks), `sweep` (a grid of rates and seeds in one program).
  * Optax transforms: `scale_by_hypergradient`, `track_hypergradient`, `scale_by_local_hypergradient`.
  * Modules: `data`, `models`, `losses`, `metrics`, `evaluation`, `rates`, `cohort`.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

from fedhyper_jax import cohort, data, evaluation, hypergradient, losses, metrics, rates
from fedhyper_jax.algorithms import decay_global, decay_local, exponential_decay, fedavg, fedhyper
from fedhyper_jax.base import FederatedAlgorithm, Model, RoundInfo, ServerState
from fedhyper_jax.data import Cohort, FederatedData, local_epochs, local_steps
from fedhyper_jax.evaluation import EvaluationData, make_evaluation, rounds_to_target
from fedhyper_jax.hypergradient import (
    global_rate,
    local_rate,
    scale_by_hypergradient,
    scale_by_local_hypergradient,
    track_hypergradient,
)
from fedhyper_jax.server import federated_algorithm
from fedhyper_jax.simulation import History, run, simulate
from fedhyper_jax.sweep import sweep

try:
    __version__ = version("fedhyper-jax")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "unknown"

__all__ = [
    "Cohort",
    "EvaluationData",
    "FederatedAlgorithm",
    "FederatedData",
    "History",
    "Model",
    "RoundInfo",
    "ServerState",
    "cohort",
    "data",
    "decay_global",
    "decay_local",
    "evaluation",
    "exponential_decay",
    "fedavg",
    "federated_algorithm",
    "fedhyper",
    "global_rate",
    "hypergradient",
    "local_epochs",
    "local_rate",
    "local_steps",
    "losses",
    "make_evaluation",
    "metrics",
    "models",
    "rates",
    "rounds_to_target",
    "run",
    "scale_by_hypergradient",
    "scale_by_local_hypergradient",
    "simulate",
    "sweep",
    "track_hypergradient",
]


def __getattr__(name: str):
    """Loads `models`, which imports flax, at first use."""
    if name == "models":
        return importlib.import_module("fedhyper_jax.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
