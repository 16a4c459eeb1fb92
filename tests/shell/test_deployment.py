"""Dropout, lost updates, availability and rollback from the command line."""

import dataclasses

import jax
import numpy as np
import pytest

from fedhyper_jax.methods import METHODS
from fedhyper_jax.shell.algorithms import rate_bounds
from fedhyper_jax.shell.cli import main
from fedhyper_jax.shell.config import (
    CompareConfig,
    DataConfig,
    GridConfig,
    MethodConfig,
    MethodSettings,
    ModelConfig,
    RunConfig,
    load_config,
)
from fedhyper_jax.shell.deployment import DeploymentConfig, make_participation
from fedhyper_jax.shell.experiment import build_experiment
from fedhyper_jax.shell.figures import common_marks
from fedhyper_jax.shell.records import read_records, read_summary

QUICK = ["--quiet", "--strategy", "sequential", "--clients", "20", "--cohort-size", "10", "--model", "logistic"]
QUICK += ["--local-steps", "2", "--batch-size", "8", "--no-evaluate-clients", "--method", "fedavg"]
SMALL = {"data": DataConfig(clients=20), "model": ModelConfig(name="logistic")}


def test_clients_that_fail_are_counted_and_told(tmp_path, capsys):
    options = ["--dropout", "0.3", "--lost-updates", "0.2", "--stragglers", "0.5", "--availability", "1"]
    options += ["--rounds", "5"]
    assert main(["run", *QUICK, *options, "--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    summary, records = read_summary(tmp_path / "a"), read_records(tmp_path / "a")
    for name in ("not_started", "lost"):
        assert summary[name] == sum(record[name] for record in records) > 0
    assert f"{summary['not_started']} clients of the cohorts failed before their work." in out
    assert f"{summary['lost']} client updates did not arrive." in out
    for record in records:
        assert record["participants"] + record["not_started"] + record["lost"] + record["left_out"] == 10
        assert record["participants"] <= record["local_steps"] <= 2 * record["participants"]
    assert any(record["local_steps"] < 2 * record["participants"] for record in records)  # some were slow
    deployment = load_config(tmp_path / "a" / "config.toml").deployment
    assert deployment == DeploymentConfig(dropout=0.3, lost_updates=0.2, stragglers=0.5, availability=1.0)


def test_a_comparison_takes_rounds_back_and_says_so(tmp_path, capsys):
    grid = ["--methods", "fedavg", "--local-rates", "30", "--seeds", "2", "--rounds", "4"]
    options = [*QUICK[:-2], "--rollback", "1.01", "--availability", "0.5"]
    assert main(["compare", *options, *grid, "--out", str(tmp_path / "a")]) == 0
    (cell,) = read_summary(tmp_path / "a")["cells"]
    assert cell["taken_back"] == sum(record["taken_back"] for record in read_records(tmp_path / "a")) > 0
    assert f"{cell['taken_back']} rounds taken" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_by_default_nothing_fails_and_all_clients_are_alike():
    experiment = build_experiment(RunConfig(**SMALL))
    assert experiment.participation is None
    state = experiment.make_algorithm("fedavg", 0.1).init(np.float32(0))
    assert state.failures == () and state.guard == ()


def test_the_settings_reach_the_state():
    deployment = DeploymentConfig(dropout=0.25, lost_updates=0.5, rollback=3.0)
    experiment = build_experiment(RunConfig(deployment=deployment, **SMALL))
    state = experiment.make_algorithm("scaffold", 0.1).init(np.float32(0))
    assert [float(p) for p in state.failures] == [0.25, 0.5] and float(state.guard.factor) == 3.0


def test_availabilities_are_log_normal_and_come_from_the_seed_of_the_partition():
    def logarithms(sigma, seed):
        participation = make_participation(DeploymentConfig(availability=sigma), 4000, seed)
        return np.asarray(participation.init(4000))

    assert np.std(logarithms(0.5, 0)) == pytest.approx(0.5, rel=0.05)
    assert np.std(logarithms(2.0, 0)) == pytest.approx(2.0, rel=0.05)
    assert np.array_equal(logarithms(0.5, 7), logarithms(0.5, 7))
    assert not np.array_equal(logarithms(0.5, 7), logarithms(0.5, 8))
    participation = make_participation(DeploymentConfig(availability=20.0), 30, 0)
    first = [participation.sample(jax.random.key(k), participation.init(30), 30, 1)[0] for k in range(30)]
    assert len({int(client) for client in first}) < 5  # as good as always the same


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dropout", "1", "dropout must lie in [0, 1), got 1.0"),
        ("stragglers", "1.5", "stragglers must lie in [0, 1), got 1.5"),
        ("lost-updates", "-0.1", "lost_updates must lie in [0, 1), got -0.1"),
        ("availability", "-1", "availability must lie in [0, 20], got -1.0"),
        ("availability", "nan", "availability must lie in [0, 20], got nan"),
        ("rollback", "1", "rollback must be finite and > 1, got 1.0"),
        ("rollback", "inf", "rollback must be finite and > 1, got inf"),
    ],
)
def test_numbers_out_of_range_are_one_line(option, value, message, capsys):
    assert main(["run", f"--{option}", value, "--processes", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def bounds(config):
    return build_experiment(config).facts["rate_bounds"]


def test_bounds_of_rates_come_from_the_state():
    (both,) = bounds(RunConfig(method=MethodConfig(name="G+SL", local_rate=0.1), **SMALL))
    assert both["global"] == pytest.approx([1 / 3, 3.0]) and both["local"] == pytest.approx([0.01, 1.0])
    (clients,) = bounds(RunConfig(method=MethodConfig(name="CL", local_bounds=(0.05, float("inf"))), **SMALL))
    assert clients["global"] is None and clients["local"][0] == pytest.approx(0.05) and clients["local"][1] is None
    (none,) = bounds(RunConfig(method=MethodConfig(name="scaffold"), **SMALL))
    assert none["global"] is None and none["local"] is None


def test_bounds_are_drawn_where_methods_agree():
    grid = GridConfig(methods=("SL", "G", "fedadam+G"), local_rates=(0.1, 0.2))
    config = CompareConfig(method=MethodSettings(global_bounds="relative"), compare=grid, **SMALL)
    marks = {rate: common_marks({"rate_bounds": bounds(config)}, rate) for rate in grid.local_rates}
    assert marks[0.1].global_bounds is None  # G's and fedadam+G's differ
    assert marks[0.1].local_bounds == pytest.approx([0.01, 1.0])
    assert marks[0.2].local_bounds == pytest.approx([0.02, 2.0])


def test_every_method_tells_its_bounds():
    told = bounds(CompareConfig(compare=GridConfig(methods=tuple(METHODS), local_rates=(0.1,)), **SMALL))
    assert len(told) == len(METHODS)
    for rates in told:
        assert all(rates[name] is None or len(rates[name]) == 2 for name in ("global", "local"))


def test_bounds_do_not_depend_on_the_parameters():
    experiment = build_experiment(RunConfig(method=MethodConfig(name="G+SL+CL"), **SMALL))
    algorithm = experiment.make_algorithm("G+SL+CL", 0.1)
    state = algorithm.init(experiment.start(0)[0])
    told = rate_bounds(algorithm)
    assert told["global"] == pytest.approx([float(state.global_rate.lower), float(state.global_rate.upper)])
    assert dataclasses.is_dataclass(state) and told["local"] == pytest.approx([float(state.local_rate.lower), 1.0])
