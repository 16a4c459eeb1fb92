"""The engine: one round, and rounds in a row; it knows the contracts of parts only.

* `federated_algorithm` makes an algorithm of parts: a pair (init, round).
* `simulate`, `run` and `sweep` play rounds; `strategies` say how a cohort is run.
* `autotune`, `cores` and the warnings are about speed only.
"""

from fedhyper_jax.engine import autotune, strategies
from fedhyper_jax.engine.algorithm import federated_algorithm
from fedhyper_jax.engine.autotune import agreed, fastest, strategy_candidates, time_strategies, wait_for_all
from fedhyper_jax.engine.cores import number_of_cores, pinnable_cores, use_all_cores
from fedhyper_jax.engine.diagnoses import IdleCoresWarning, LeftOutWarning, SlowConvolutionWarning
from fedhyper_jax.engine.history import History
from fedhyper_jax.engine.simulation import Progress, StopRun, run, simulate
from fedhyper_jax.engine.strategies import Strategy, divided, parse_strategy, place
from fedhyper_jax.engine.sweep import sweep, sweep_shapes

__all__ = [
    "History",
    "IdleCoresWarning",
    "LeftOutWarning",
    "Progress",
    "SlowConvolutionWarning",
    "StopRun",
    "Strategy",
    "agreed",
    "autotune",
    "divided",
    "fastest",
    "federated_algorithm",
    "number_of_cores",
    "parse_strategy",
    "pinnable_cores",
    "place",
    "run",
    "simulate",
    "strategies",
    "strategy_candidates",
    "sweep",
    "sweep_shapes",
    "time_strategies",
    "use_all_cores",
    "wait_for_all",
]
