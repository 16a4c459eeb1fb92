"""From a configuration to the objects that it names; what `fedhyper run` and `fedhyper compare` share.

`datasets`, `tasks`, `algorithms` and `checks` do the work, each its own part of the configuration.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from fedhyper_jax.base import FederatedAlgorithm, Params
from fedhyper_jax.data import check_cohort_size
from fedhyper_jax.engine import place
from fedhyper_jax.parts import Participation
from fedhyper_jax.shell.algorithms import algorithm_factory, cells, rate_bounds
from fedhyper_jax.shell.checks import check_numbers
from fedhyper_jax.shell.config import Config, ConfigError, one_line
from fedhyper_jax.shell.datasets import build_clients
from fedhyper_jax.shell.deployment import make_participation
from fedhyper_jax.shell.tasks import build_task
from fedhyper_jax.tasks import Evaluation, EvaluationData, Task, make_evaluation


class Experiment(NamedTuple):
    """Everything that a configuration names, ready to run.

    Attributes:
      task: what is learned: data, model, loss and measure.
      evaluate: see `make_evaluation`.
      evaluation_data: the server's test set and, if asked for, the clients' examples.
      participation: how cohorts are drawn; uniformly if None.
      make_algorithm: ``make_algorithm(method, local_rate, **options) -> FederatedAlgorithm``; the options replace the
        configuration's, and all may be traced.
      start: ``start(seed) -> (parameters, key of the run)``.
      facts: what summaries of runs say of it: data, digest, metric, target and bounds of the rates.
    """

    task: Task
    evaluate: Evaluation
    evaluation_data: EvaluationData
    participation: Participation | None
    make_algorithm: Callable[..., FederatedAlgorithm]
    start: Callable[[int], tuple[Params, Array]]
    facts: dict[str, Any]


def build_experiment(config: Config) -> Experiment:
    """Loads, divides and assembles what a configuration names; nothing is compiled or run.

    Args:
      config: of a run or of a comparison.

    Returns:
      The `Experiment`. Every method and rate of the configuration has been made once, so that all are known to work.

    Raises:
      ConfigError: anything that the configuration gets wrong, or data that are not there; the message is one line.

    Example:
      >>> from fedhyper_jax.shell.config import RunConfig
      >>> experiment = build_experiment(RunConfig())
      >>> experiment.task.data.population, experiment.task.measure.name
      (100, 'accuracy')
    """
    try:
        check_numbers(config)
        clients = build_clients(config.data)
        population = clients.data.population
        check_cohort_size(config.run.cohort_size, population)
        task = build_task(config.model, clients.dataset, clients.data, config.run.target)
        measure = task.measure
        make_algorithm = algorithm_factory(task.loss_fn, config, population)
        participation = make_participation(config.deployment, population, config.data.partition_seed)
        bounds = [
            {"method": method, "initial_local_rate": rate, **rate_bounds(make_algorithm(method, rate))}
            for method, rate in cells(config)
        ]
        return Experiment(
            task=task,
            evaluate=make_evaluation(
                task.metrics_fn, lower_is_better=() if measure.higher_is_better else (measure.name,)
            ),
            evaluation_data=EvaluationData(test=task.test, clients=clients.evaluated),
            participation=participation,
            make_algorithm=make_algorithm,
            start=functools.partial(_start, jax.jit(task.model.init), task.inputs),
            facts={
                "data": clients.dataset.name,
                "data_source": clients.dataset.source,
                "partition_digest": clients.digest,
                "num_outputs": task.num_outputs,
                "metric": dataclasses.asdict(measure),
                f"target_{measure.name}": measure.target,
                "rate_bounds": bounds,
            },
        )
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(one_line(error)) from error


def _start(init: Callable[[Array, Array], Params], inputs: Array, seed: int) -> tuple[Params, Array]:
    init_key, run_key = jax.random.split(jax.random.key(seed))
    return init(init_key, inputs), run_key


def simulation_arguments(config: Config, experiment: Experiment, strategy: str) -> dict[str, Any]:
    """What `run` and `sweep` are given alike: cohorts and evaluation, and the data where the strategy wants them."""
    return {
        "data": place(strategy, experiment.task.data),
        "cohort_size": config.run.cohort_size,
        "evaluate": experiment.evaluate,
        "evaluation_data": place(strategy, experiment.evaluation_data),
        "eval_every": config.run.eval_every,
        "participation": experiment.participation,
    }
