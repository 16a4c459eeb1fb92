"""From a data set and a configuration to a task: the model, its loss, its metrics, and what chance achieves."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedhyper_jax import _validate, models
from fedhyper_jax.base import LossFunction, Model, Params
from fedhyper_jax.data import ClientData, Dataset, check_examples
from fedhyper_jax.shell.config import ModelConfig, any_of
from fedhyper_jax.tasks import (
    Measure,
    Task,
    accuracy_of_classes,
    accuracy_of_symbols,
    error_of_targets,
    losses,
    metrics,
)


class Kind(NamedTuple):
    """A kind of tasks; each function takes the data set or the model.

    Attributes:
      num_outputs: of the model, per example or per position.
      output_shape: of the model for a whole batch of targets.
      loss: see `losses`.
      metrics: see `metrics`.
      measure: the metric reported first, with its chance level.
    """

    num_outputs: Callable[[Dataset], int]
    output_shape: Callable[[Dataset], tuple[int, ...]]
    loss: Callable[[Model], LossFunction]
    metrics: Callable[[Model], Any]
    measure: Callable[[Dataset], Measure]


TASKS: dict[str, Kind] = {
    "classification": Kind(
        num_outputs=lambda dataset: dataset.num_classes,
        output_shape=lambda dataset: (dataset.num_classes,),
        loss=losses.cross_entropy,
        metrics=metrics.classification,
        measure=lambda dataset: accuracy_of_classes(dataset.num_classes),
    ),
    "next_symbol": Kind(
        num_outputs=lambda dataset: dataset.num_classes,
        output_shape=lambda dataset: (*dataset.train["y"].shape[1:], dataset.num_classes),
        loss=losses.cross_entropy,
        metrics=metrics.classification,
        measure=lambda dataset: accuracy_of_symbols(dataset.train["y"], dataset.num_classes),
    ),
    "regression": Kind(
        num_outputs=lambda dataset: dataset.train["y"].shape[-1],
        output_shape=lambda dataset: dataset.train["y"].shape[1:],
        loss=losses.squared_error,
        metrics=metrics.regression,
        measure=lambda dataset: error_of_targets(dataset.train["y"], dataset.test["y"]),
    ),
}
"""Kinds of tasks by the name that a `Dataset` gives as its ``task``."""


def build_task(config: ModelConfig, dataset: Dataset, data: ClientData, target: float | None = None) -> Task:
    """The task of a data set with the model of a configuration.

    Args:
      config: of the model.
      dataset: what is learned.
      data: the same, divided over clients.
      target: value of the task's measure whose rounds are counted; None: the measure's own.

    Returns:
      The `Task`.

    Raises:
      ValueError: unknown names, settings that the model refuses, a model that does not fit the data, examples that
        `check_examples` or the loss refuses, an impossible target.

    Example:
      >>> from fedhyper_jax.data import from_client_ids, load
      >>> digits = load("digits")
      >>> task = build_task(ModelConfig(), digits, data=None)
      >>> task.measure.name, task.measure.guessing
      ('accuracy', 0.1)
    """
    kind = TASKS[dataset.task]
    model = make_model(config, kind.num_outputs(dataset))
    inputs = jnp.asarray(dataset.train["x"][:1])
    params = _checked_params(model, config.name, dataset, inputs)
    loss_fn, measure = kind.loss(model), kind.measure(dataset)
    for split, examples in (("train", dataset.train), ("test", dataset.test)):
        check_examples(examples)
        if hasattr(loss_fn, "check"):
            loss_fn.check(params, examples, name=f"{dataset.name}.{split}")
    return Task(
        name=dataset.task,
        data=data,
        test={name: jnp.asarray(array) for name, array in dataset.test.items()},
        inputs=inputs,
        model=model,
        num_outputs=int(kind.num_outputs(dataset)),
        loss_fn=loss_fn,
        metrics_fn=kind.metrics(model),
        measure=measure if target is None else measure.with_target(target),
    )


def _checked_params(model: Model, name: str, dataset: Dataset, inputs: jax.Array) -> Params:
    """The shapes of a model's parameters.

    Refuses a model that makes something else of an example than its target; offers those that can work.
    """
    kind = TASKS[dataset.task]
    wanted = kind.output_shape(dataset)

    def shapes_of(model: Model) -> tuple[Params, tuple[int, ...]]:
        params = jax.eval_shape(model.init, jax.random.key(0), inputs)
        return params, jax.eval_shape(model.apply, params, inputs).shape[1:]

    try:
        params, outputs = shapes_of(model)
        if outputs == wanted:
            return params
        refusal = None
    except ValueError as error:
        refusal = error
    fitting = []
    for known in models.MODELS:
        with contextlib.suppress(ValueError):
            if shapes_of(models.make_model(known, kind.num_outputs(dataset)))[1] == wanted:
                fitting.append(known)
    if refusal is not None and name in fitting:  # its settings are to blame
        raise refusal
    raise ValueError(
        f"model {name!r} does not go with {dataset.name!r}, which has inputs of shape {inputs.shape[1:]} "
        f"({inputs.dtype}) and asks for outputs of shape {wanted}; use {any_of(fitting)}"
    )


def make_model(config: ModelConfig, num_outputs: int) -> Model:
    """The model of a configuration; settings that are None are left to the model."""
    _validate.one_of(models.MODELS, model=config.name)
    own = ("name", "compute_dtype")
    settings = {name: value for name, value in vars(config).items() if name not in own and value is not None}
    hidden = inspect.signature(models.MODELS[config.name]).parameters.get("hidden")
    if "hidden" in settings and hidden is not None and isinstance(hidden.default, int):
        if len(config.hidden) != 1:
            raise ValueError(f"hidden of {config.name!r} must be one number, got {list(config.hidden)}; e.g. 256")
        settings["hidden"] = config.hidden[0]
    model = models.make_model(config.name, num_outputs, **settings)
    return model if config.compute_dtype is None else models.compute_in(model, config.compute_dtype)
