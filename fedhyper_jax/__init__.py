"""A JAX functional simulator of federated learning with the FedHyper hypergradient learning-rate schedulers.

A federated algorithm is a pair of pure functions (init, round), and a learning rate is data, never code: rates live in
arrays, so they change at every step, differ per client, are swept under ``vmap`` and never cause a recompile.

  * Methods: `fedavg`, `fedhyper` and those they are compared with (`fedadam`, `fedexp`, `fedprox`, `scaffold`, …); they
    add up, ``fedprox() + G()``; by name, joined by '+', through `method_by_name` and `make_method`; from parts of your
    own through `federated_algorithm`.
  * Runs: `simulate` (one scan), `run` (host loop with callbacks), `sweep` (a grid of rates and seeds in one program);
    on a CPU, `use_all_cores` first. `load_run` reads what a command left.
  * Optax transforms: `scale_by_hypergradient`, `track_hypergradient`, `scale_by_local_hypergradient`,
    `scale_by_retained_gain`.
  * Parts: `rates` (rules of either rate), `client_rules`, `terms`, `server_optimizers`, `aggregators`, `failures`,
    `guards`, `participation`; their contracts stand in `parts.contract`.
  * Results: `make_evaluation` in a run, `evaluate_clients` by client, `History.columns` as a table of rounds.
  * Modules: `methods` (the table of them), `data`, `models`, `losses`, `metrics`, `evaluation`, `cohort`.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fedhyper_jax import base, data, hypergradient, methods, parts
from fedhyper_jax.base import FederatedAlgorithm, Model, RoundInfo, ServerState
from fedhyper_jax.data import Cohort, FederatedData, local_epochs, local_steps
from fedhyper_jax.engine import (
    History,
    IdleCoresWarning,
    LeftOutWarning,
    SlowConvolutionWarning,
    StopRun,
    autotune,
    federated_algorithm,
    run,
    simulate,
    sweep,
    use_all_cores,
)
from fedhyper_jax.engine import strategies as cohort
from fedhyper_jax.hypergradient import (
    global_rate,
    local_rate,
    scale_by_hypergradient,
    scale_by_local_hypergradient,
    scale_by_retained_gain,
    track_hypergradient,
    window_starts,
)
from fedhyper_jax.methods import make_method, method_by_name
from fedhyper_jax.methods.families import *  # noqa: F403
from fedhyper_jax.parts import (
    aggregators,
    client_rules,
    failures,
    guards,
    participation,
    rates,
    server_optimizers,
    terms,
)
from fedhyper_jax.tasks import (
    EvaluationData,
    evaluate_clients,
    evaluation,
    losses,
    make_evaluation,
    metrics,
    rounds_to_target,
)

if TYPE_CHECKING:  # (see __getattr__)
    from fedhyper_jax import models
    from fedhyper_jax.shell.cache import use_compilation_cache
    from fedhyper_jax.shell.runs import load_run

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
    "IdleCoresWarning",
    "LeftOutWarning",
    "Model",
    "RoundInfo",
    "ServerState",
    "SlowConvolutionWarning",
    "StopRun",
    "aggregators",
    "autotune",
    "base",
    "client_rules",
    "cohort",
    "data",
    "evaluate_clients",
    "evaluation",
    "failures",
    "federated_algorithm",
    "global_rate",
    "guards",
    "hypergradient",
    "load_run",
    "local_epochs",
    "local_rate",
    "local_steps",
    "losses",
    "make_evaluation",
    "make_method",
    "method_by_name",
    "methods",
    "metrics",
    "models",
    "participation",
    "parts",
    "rates",
    "rounds_to_target",
    "run",
    "scale_by_hypergradient",
    "scale_by_local_hypergradient",
    "scale_by_retained_gain",
    "server_optimizers",
    "simulate",
    "sweep",
    "terms",
    "track_hypergradient",
    "use_all_cores",
    "use_compilation_cache",
    "window_starts",
]
__all__ += methods.families.__all__  # every method by its name


_OF_THE_SHELL = {"load_run": "fedhyper_jax.shell.runs", "use_compilation_cache": "fedhyper_jax.shell.cache"}


if not TYPE_CHECKING:  # type checkers know these names from above, and any other is misspelt

    def __getattr__(name: str) -> Any:
        """Loads `models`, which imports flax, and what belongs to the shell at first use."""
        if name == "models":
            return importlib.import_module("fedhyper_jax.models")
        if name == "load_run":
            importlib.import_module("fedhyper_jax.shell.command").check_packages("load_run")
        if name in _OF_THE_SHELL:
            return getattr(importlib.import_module(_OF_THE_SHELL[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
