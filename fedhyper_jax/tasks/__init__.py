"""Tasks: what is learned and how it is measured; losses, metrics, and the evaluation of parameters."""

from fedhyper_jax.tasks import evaluation, losses, metrics
from fedhyper_jax.tasks.evaluation import (
    Evaluation,
    EvaluationData,
    evaluate_clients,
    make_evaluation,
    rounds_to_target,
)
from fedhyper_jax.tasks.losses import check_per_example, losses_of, takes_key
from fedhyper_jax.tasks.task import (
    Measure,
    Task,
    accuracy_of_classes,
    accuracy_of_symbols,
    error_of_targets,
)

__all__ = [
    "Evaluation",
    "EvaluationData",
    "Measure",
    "Task",
    "accuracy_of_classes",
    "accuracy_of_symbols",
    "check_per_example",
    "error_of_targets",
    "evaluate_clients",
    "evaluation",
    "losses",
    "losses_of",
    "make_evaluation",
    "metrics",
    "rounds_to_target",
    "takes_key",
]
