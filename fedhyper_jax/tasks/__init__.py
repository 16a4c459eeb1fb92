"""Tasks: what is learned and how it is measured; losses, metrics, and the evaluation of parameters."""

from fedhyper_jax.tasks import evaluation, losses, metrics
from fedhyper_jax.tasks.evaluation import Evaluation, EvaluationData, make_evaluation, rounds_to_target
from fedhyper_jax.tasks.metrics import check_per_example

__all__ = [
    "Evaluation",
    "EvaluationData",
    "check_per_example",
    "evaluation",
    "losses",
    "make_evaluation",
    "metrics",
    "rounds_to_target",
]
