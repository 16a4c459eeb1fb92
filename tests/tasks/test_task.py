"""Measures: direction, chance, and how a run ended."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax.base import Model
from fedhyper_jax.data import pack
from fedhyper_jax.tasks import (
    EvaluationData,
    Measure,
    accuracy_of_classes,
    accuracy_of_symbols,
    error_of_targets,
    losses,
    make_evaluation,
    metrics,
    rounds_to_target,
)

ERROR = Measure(name="squared_error", higher_is_better=False, guessing=2.0, guessing_loss=1.0, target=1.0)


@pytest.mark.parametrize(
    ("final", "best", "loss", "state"),
    [
        (0.9, 0.8, 0.4, "ok"),
        (1.69, 1.6, 0.8, "ok"),
        (1.71, 1.6, 0.8, "near chance"),
        (1.3, 1.0, 0.6, "collapsed"),  # of a distance of 1 from guessing 0.7 are left
        (1.2, 1.0, 0.6, "ok"),
        (50.0, 1.0, 25.0, "diverged"),
        (1.9, 1.6, None, "diverged"),
        (None, 1.0, None, "diverged"),
        (None, None, None, "diverged"),
    ],
)
def test_how_a_regression_ended(final, best, loss, state):
    assert ERROR.state(final=final, best=best, loss=loss) == state


def test_directions():
    assert ERROR.best([3.0, 1.0, 2.0]) == 1.0 and accuracy_of_classes(3).best([0.3, 0.1]) == 0.3
    errors = [1.9, 1.4, 1.0, 0.9, 0.8]
    assert rounds_to_target(range(5), errors, 1.0, higher_is_better=False) == 5
    assert rounds_to_target(range(5), errors, 1.1, higher_is_better=False) == 4
    assert rounds_to_target(range(5), errors, 0.5, higher_is_better=False) is None
    assert rounds_to_target(range(5), [math.nan, 1, 1, math.nan, 1], 1.0, higher_is_better=False) is None


def test_chance_is_that_of_the_best_constant_guess():
    rng = np.random.default_rng(0)
    symbols = rng.choice(4, p=[0.5, 0.25, 0.125, 0.125], size=(1000, 20))
    measure = accuracy_of_symbols(symbols, 5)  # the fifth never occurs
    assert measure.guessing == pytest.approx(0.5, abs=0.02)
    assert measure.guessing_loss == pytest.approx(1.75 * math.log(2), abs=0.02)
    train, test = rng.normal(3.0, 2.0, (500, 2)), rng.normal(3.0, 2.0, (400, 2))
    error = error_of_targets(train, test)
    # the loss of a model that says the mean whatever it gets
    model = Model(init=None, apply=lambda params, x: jnp.broadcast_to(params, (len(x), 2)))
    values = make_evaluation(metrics.regression(model))(
        jnp.asarray(train.mean(axis=0)), EvaluationData(test={"x": jnp.zeros((400, 1)), "y": jnp.asarray(test)})
    )
    assert values["test_squared_error"] == pytest.approx(error.guessing, rel=1e-5)
    assert values["test_loss"] == pytest.approx(error.guessing_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("measure", "target", "message"),
    [
        (accuracy_of_classes(10), 80.0, r"target must lie in \(0, 1\] for the accuracy, got 80.0; 0.8 is 80 %"),
        (accuracy_of_classes(10), 0.0, r"target must lie in \(0, 1\]"),
        (ERROR, 0.0, "target must be finite and > 0 for the squared error, got 0.0; guessing has 2"),
        (ERROR, math.nan, "target must be finite and > 0"),
    ],
)
def test_impossible_targets_are_refused(measure, target, message):
    with pytest.raises(ValueError, match=message):
        measure.with_target(target)


def test_shapes_that_would_be_broadcast_are_refused():
    model = Model(init=None, apply=lambda params, x: x)
    batch = {"x": jnp.zeros((3, 1)), "y": jnp.zeros(3)}
    for function in (losses.squared_error(model), metrics.regression(model)):
        with pytest.raises(ValueError, match=r"outputs and targets must have one shape, got \(3, 1\) and \(3,\)"):
            function(None, batch)


def test_the_worst_clients_of_an_error_are_those_with_the_highest():
    clients = pack({"x": np.arange(20.0)}, list(np.arange(20)[:, None]))

    def worst(**settings):
        evaluate = make_evaluation(lambda params, batch: {"error": batch["x"]}, **settings)
        return evaluate(None, EvaluationData(clients=clients))["client_error_worst_decile"]

    assert worst(lower_is_better=("error",)) == 18.5 and worst() == 0.5
