"""Measures: direction, chance, and how a run ended."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax.base import Model
from fedhyper_jax.data import from_client_ids, pack
from fedhyper_jax.tasks import (
    EvaluationData,
    Measure,
    accuracy_of_classes,
    accuracy_of_symbols,
    error_of_targets,
    evaluate_clients,
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
    values = jax.jit(make_evaluation(metrics.regression(model)))(
        train.mean(axis=0), EvaluationData(test={"x": np.zeros((400, 1)), "y": test})
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
    """Of 1 … 20 in ones and twos, 19.5; a name that says nothing of its direction is not guessed at."""
    data = EvaluationData(clients=pack({"x": np.arange(1.0, 21.0, dtype=np.float32)}, list(np.arange(20)[:, None])))

    def worst(name, **settings):
        evaluate = make_evaluation(lambda params, batch: {name: batch["x"], "loss": batch["x"]}, **settings)
        values = evaluate(None, data)
        return values["client_loss_worst_decile"], values[f"client_{name}_worst_decile"]

    @jax.jit
    def known():
        errors = worst("mae"), worst("regret", lower_is_better=["regret"])
        scores = worst("accuracy"), worst("bleu", lower_is_better=[]), worst("bleu", lower_is_better=["loss"])
        return errors, scores

    errors, scores = known()
    assert errors == ((19.5, 19.5),) * 2  # the loss is one, whatever is said of others
    assert scores == ((19.5, 1.5),) * 3
    with pytest.raises(ValueError, match=r"the metric 'bleu' is not known; give .*lower_is_better=\['bleu'\]"):
        worst("bleu")
    with pytest.raises(ValueError, match=r"lower_is_better names \['mea'\], but the metrics are \['loss', 'mae'\]"):
        worst("mae", lower_is_better=["mea"])
    test_only = EvaluationData(test={"x": np.arange(1.0, 21.0)})  # has no worst clients
    assert make_evaluation(lambda params, batch: {"bleu": batch["x"]})(None, test_only) == {"test_bleu": 10.5}


def test_examples_without_a_label_count_in_no_metric():
    """By hand: positions that are ignored, an example of which all are, and a client that has only this one."""
    model = Model(init=None, apply=lambda params, x: x)
    right, wrong = [2.0, 0.0], [0.0, 2.0]  # of label 0
    examples = {
        "x": np.array([[right, right], [wrong, right], [wrong, wrong]], np.float32),
        "y": np.array([[0, -1], [0, 0], [-1, -1]]),
    }
    evaluate = make_evaluation(metrics.classification(model, ignore=-1), batch_size=2)
    data = EvaluationData(test=examples, clients=pack(examples, [[0], [2], [1]]))
    values = jax.jit(lambda data: evaluate(None, data))(data)
    loss_right, loss_wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    both = (loss_right + (loss_right + loss_wrong) / 2) / 2
    assert values["test_accuracy"] == values["client_accuracy_mean"] == 0.75
    assert values["client_accuracy_std"] == 0.25 and values["client_accuracy_worst_decile"] == 0.5
    assert values["test_loss"] == pytest.approx(both, rel=1e-5)
    assert values["client_loss_mean"] == pytest.approx(both, rel=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"test": (np.zeros(3), np.zeros(3))}, "test of EvaluationData must be a dict of arrays, got tuple; give e.g."),
        ({"test": np.zeros(3)}, "must be a dict of arrays, got ndarray"),
        ({"clients": {"x": np.zeros(3)}}, "clients of EvaluationData must be as data.pack .* makes them, got dict"),
        ({"test": {"x": np.zeros(2), "y": np.array([0, 2**32])}}, r"test\['y'\] has 4294967296 in row 1, which int32"),
        ({"test": {"x": np.array([0, 1e39])}}, r"test\['x'\] has 1e\+39 in row 1, which float32 cannot hold"),
    ],
)
def test_evaluation_data_of_a_wrong_form_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        make_evaluation(lambda params, batch: {"loss": batch["x"]})(None, EvaluationData(**data))


def test_results_by_the_names_of_clients():
    """Against plain means; one client has nothing held out, and one only examples that do not count."""
    rng = np.random.default_rng(0)
    x, owner = rng.normal(size=40).astype(np.float32), np.array(["eve", "bob", "ada", "kim"])[rng.integers(0, 4, 40)]
    counts = (rng.random(40) < 0.7) & (owner != "kim")
    examples = {"x": x, "counts": counts}
    clients = from_client_ids(examples, owner)

    def metrics_fn(params, batch):
        kept = batch["counts"].astype(float)
        return {"error": abs(batch["x"] - params), "kept": metrics.Mean(batch["x"] * kept, kept)}

    results = evaluate_clients(metrics_fn, 0.5, clients, batch_size=7)
    assert list(results) == ["client", "examples", "error", "kept"]
    assert results["client"].tolist() == ["ada", "bob", "eve", "kim"]
    for row, client in enumerate(results["client"]):
        own = owner == client
        assert results["examples"][row] == own.sum()
        assert results["error"][row] == pytest.approx(abs(x[own] - 0.5).mean(), rel=1e-5)
        expected = math.nan if client == "kim" else x[own & counts].mean()
        assert results["kept"][row] == pytest.approx(expected, rel=1e-5, nan_ok=True)
    numbered = evaluate_clients(metrics_fn, 0.5, pack(examples, [np.arange(39), [39]]))
    assert numbered["client"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="has a metric 'client', which is a column already"):
        evaluate_clients(lambda params, batch: {"client": batch["x"]}, 0.5, clients)
    with pytest.raises(ValueError, match=r"clients of EvaluationData must be as data.pack .* makes them, got dict"):
        evaluate_clients(metrics_fn, 0.5, {"x": x})
