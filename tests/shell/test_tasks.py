"""Text, regression and clients made on demand from the command line, as images go; and what tells them apart."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from fedhyper_jax import simulate
from fedhyper_jax.data import LOADERS, examples_of_strangers, load, procedural_logistic
from fedhyper_jax.shell import datasets
from fedhyper_jax.shell.cli import main
from fedhyper_jax.shell.config import DataConfig, ModelConfig, RunConfig, RunSettings
from fedhyper_jax.shell.datasets import build_clients, build_partition
from fedhyper_jax.shell.experiment import build_experiment
from fedhyper_jax.shell.records import read_records, read_summary
from fedhyper_jax.shell.report import print_comparison, summarise_cells, summarise_records
from fedhyper_jax.tasks import Measure
from tests.helpers import cases

from .conftest import overviews_only

QUICK = ["--quiet", "--strategy", "sequential", "--cohort-size", "4", "--method", "G"]
ERROR = Measure(name="squared_error", higher_is_better=False, guessing=1.0, guessing_loss=0.5, target=0.6)


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regression") / "run"
    options = ["--clients", "10", "--model", "logistic", "--rounds", "4", "--local-rate", "0.03"]
    with overviews_only():
        assert main(["run", *QUICK, *options, "--data", "diabetes", "--out", str(folder)]) == 0
    return folder


def test_text_is_learned(tmp_path, capsys):
    text = ["--data", "synthetic_text", "--model", "char_lstm", "--hidden", "16", "--layers", "1", "--clients", "8"]
    work = ["--local-steps", "20", "--batch-size", "8", "--local-rate", "2", "--rounds", "4"]
    assert main(["run", *QUICK, *text, *work, "--out", str(tmp_path / "a")]) == 0
    assert "rounds to 40%" in capsys.readouterr().out
    summary, records = read_summary(tmp_path / "a"), read_records(tmp_path / "a")
    assert summary["metric"]["guessing"] < 0.15  # the most frequent of 32 symbols
    assert records[-1]["loss"] < summary["metric"]["guessing_loss"] - 0.1  # more than frequencies was learned
    assert 0 <= records[-1]["client_accuracy_worst_decile"] <= records[-1]["client_accuracy_mean"] <= 1


def test_a_regression_is_learned(regression, capsys):
    summary, records = read_summary(regression), read_records(regression)
    errors = [record["squared_error"] for record in records]
    assert "accuracy" not in json.dumps(summary) and "accuracy" not in json.dumps(records)
    assert errors[-1] < 0.75 * summary["metric"]["guessing"] == pytest.approx(0.75, abs=0.01)
    assert summary["final_squared_error"] == pytest.approx(np.mean(errors[-3:]))
    assert summary["best_squared_error"] == min(errors) and summary["state"] == "ok"
    for record in records:
        assert record["loss"] == pytest.approx(record["squared_error"] / 2, rel=1e-5)
        assert record["client_squared_error_worst_decile"] >= record["client_squared_error_mean"]
    pictures = {path.stem for path in (regression / "plots").iterdir()}
    assert pictures == {"squared_error", "global_rate", "local_rates", "inner_product", "clipped_share", "overview"}


def test_a_linear_model_finds_what_least_squares_find():
    experiment = build_experiment(
        RunConfig(data=DataConfig(name="diabetes", clients=10), model=ModelConfig(name="logistic"))
    )
    train, test = experiment.task.data.examples, experiment.task.test

    def with_ones(examples):
        return np.c_[examples["x"], np.ones(len(examples["x"]))]

    solution, *_ = np.linalg.lstsq(with_ones(train), np.asarray(train["y"]), rcond=None)
    best = np.mean((with_ones(test) @ solution - np.asarray(test["y"])) ** 2)
    params = jax.tree.map(
        lambda leaf: np.float32(solution[-1] if leaf.ndim == 1 else solution[:-1]), experiment.start(0)[0]
    )
    values = experiment.evaluate(params, experiment.evaluation_data)
    assert values["test_squared_error"] == pytest.approx(best, rel=1e-4)
    assert best < 0.6 * experiment.task.measure.guessing


def test_the_shell_knows_clients_made_on_demand():
    config = DataConfig(name="procedural_logistic", clients=1_000_000)
    experiment = build_experiment(RunConfig(data=config, model=ModelConfig(name="logistic")))
    assert experiment.evaluation_data.clients is None and len(experiment.facts["partition_digest"]) == 64
    algorithm, key = experiment.make_algorithm("G", 0.1, strategy="sequential"), jax.random.key(0)

    def one_round(state):
        return simulate(algorithm, key, state, experiment.task.data, rounds=1, cohort_size=4)

    state = jax.eval_shape(algorithm.init, jax.eval_shape(lambda: experiment.start(0)[0]))
    assert jax.tree.structure(jax.eval_shape(one_round, state)[0]) == jax.tree.structure(state)


@pytest.mark.product  # docs/scaling.md trains on such clients, and above is what the shell makes of them
def test_clients_made_on_demand(tmp_path):
    options = ["--data", "procedural_logistic", "--clients", "1000000", "--model", "logistic", "--local-epochs", "1"]
    assert main(["run", *QUICK, *options, "--rounds", "2", "--out", str(tmp_path / "a")]) == 0
    summary = read_summary(tmp_path / "a")
    assert len(summary["partition_digest"]) == 64 and summary["client_accuracy"] == {}
    assert summary["final_accuracy"] > 0.1


def test_the_test_set_of_made_clients_is_of_strangers():
    config = DataConfig(name="procedural_logistic", clients=50, partition_seed=3)
    clients, same = build_clients(config), procedural_logistic(50, seed=3)
    assert np.array_equal(clients.dataset.test["x"], examples_of_strangers(same, 2000)["x"])
    assert clients.digest == datasets._digest_of(same)
    for other in (procedural_logistic(51, seed=3), procedural_logistic(50, seed=4)):
        assert datasets._digest_of(other) != clients.digest


@pytest.mark.parametrize(
    ("name", "method"), [("digits", "dirichlet"), ("synthetic_text", "by_user"), ("diabetes", "iid")]
)
def test_examples_go_to_clients_as_is_natural(name, method):
    _, partition = build_partition(DataConfig(name=name, clients=7))
    assert (partition.method, partition.num_clients) == (method, 7)


# (test_cli.py describes one by labels)
@pytest.mark.parametrize(
    "name", cases(["synthetic_text", "diabetes", "procedural_logistic"], later=["synthetic_text", "diabetes"])
)
def test_every_division_is_described(name, tmp_path, capsys):
    picture = tmp_path / "clients.png"
    assert main(["data", "--data", name, "--clients", "12", "--out", str(picture)]) == 0
    assert "over 12 clients" in capsys.readouterr().out and picture.stat().st_size > 5000


BAD = {
    "text and a model of images": (
        ["--data", "synthetic_text"],
        "model 'mlp' does not go with 'synthetic_text', which has inputs of shape (20,) (int32) and asks for outputs "
        "of shape (20, 32); use char_lstm\n",
    ),
    "images and a model of text": (
        ["--model", "char_lstm"],
        "model 'char_lstm' does not go with 'digits', which has inputs of shape (8, 8, 1) (float32) and asks for "
        "outputs of shape (10,); use logistic, mlp, cnn or resnet18\n",
    ),
    "vectors and a model of images": (
        ["--data", "diabetes", "--model", "cnn"],
        "which has inputs of shape (10,) (float32) and asks for outputs of shape (1,); use logistic or mlp\n",
    ),
    "a model that fits and its settings": (
        ["--model", "cnn", "--channels", "2", "2", "2", "2"],
        "cannot be halved 4 times",
    ),
    "two sizes": (
        ["--data", "synthetic_text", "--model", "char_lstm", "--hidden", "8", "8"],
        "hidden of 'char_lstm' must be one number, got [8, 8]",
    ),
    "labels": (
        ["--data", "diabetes", "--partitioner", "dirichlet"],
        "partitioner 'dirichlet' goes by labels, and examples of 'diabetes' have none; use iid or quantity_skew\n",
    ),
    "made and divided": (
        ["--data", "procedural_logistic", "--partitioner", "iid"],
        "data set 'procedural_logistic' makes its clients itself and takes no partitioner, got 'iid'",
    ),
    "made and held out": (["--data", "procedural_logistic", "--hold-out", "0.1"], "takes no hold_out, got 0.1"),
    "target": (["--data", "diabetes", "--model", "logistic", "--target", "-1"], "target must be finite and > 0"),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_what_does_not_go_together_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options, message = arguments
    assert main(["run", *options, "--cohort-size", "2", "--processes", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("split", "label", "message"),
    [("train", 10, "digits.train['y'] has label 10 in row 7"), ("test", -1, "digits.test['y'] has label -1 in row 7")],
)
def test_a_data_set_with_labels_that_are_no_class_is_one_line(split, label, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    digits = load("digits")
    getattr(digits, split)["y"][7] = label
    monkeypatch.setitem(LOADERS, "digits", lambda: digits)
    assert main(["run", "--cohort-size", "2", "--processes", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


def errors(values, loss=0.3):
    return [{"round": t, "squared_error": value, "loss": loss} for t, value in enumerate(values)]


def test_the_table_of_an_error_has_the_lowest_in_bold():
    good, poor = ([0.9, 0.6, 0.5, 0.5], [0.9, 0.9, 0.8, 0.7])
    cells = {
        ("fedavg", 0.1): [summarise_records(errors(poor), ERROR)],
        ("G", 0.1): [summarise_records(errors(good), ERROR)],
        ("SL", 0.1): [summarise_records(errors([0.9, 0.8, 0.8, None], loss=None), ERROR)],
    }
    rows = summarise_cells(cells, rounds=4, measure=ERROR)
    assert [row["rounds_to_target"]["text"] for row in rows] == ["> 4", "4", "> 4"]
    assert rows[2]["final_squared_error"]["mean"] is None and rows[2]["states"] == ["diverged"]
    out = io.StringIO()
    summary = {"cells": rows, "data": "diabetes", "rounds": 4, "seeds": [0], "local_rates": [0.1]}
    console = Console(file=out, width=90, force_terminal=True, no_color=True)
    print_comparison({**summary, "metric": dataclasses.asdict(ERROR)}, console)
    lines = out.getvalue().splitlines()
    (bold,) = [line for line in lines if "0.5333" in line and "\x1b[1m" in line]
    assert " G " in bold and not any("0.8" in line and "\x1b[1m" in line for line in lines)
    assert "rounds to 0.6" in out.getvalue() and "not finite" in out.getvalue()
    assert "accuracy" not in out.getvalue() and "of guessing is 1." in out.getvalue()


def test_the_target_of_a_configuration_is_that_of_its_task():
    def target(**settings):
        config = RunConfig(data=DataConfig(clients=20), model=ModelConfig(name="logistic"))
        run = dataclasses.replace(config.run, **settings)
        return build_experiment(dataclasses.replace(config, run=run)).facts["target_accuracy"]

    assert (target(), target(target=0.3)) == (0.8, 0.3) and RunSettings().target is None
