"""`fedhyper bench`: what it counts, what it refuses, and that the peers get the same job."""

import functools
import importlib.util
import json
import pathlib
import sys
import time
import types

import jax
import numpy as np
import pytest

from fedhyper_jax.data import local_epochs, pack
from fedhyper_jax.models import logistic
from fedhyper_jax.shell import bench
from fedhyper_jax.shell.bench import jobs, suite
from fedhyper_jax.shell.cli import main
from fedhyper_jax.tasks.losses import cross_entropy

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_small_device(monkeypatch):
    """Programs for one device compile faster, and the ceiling of this machine is of no interest here."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    ceiling = functools.partial(bench.matrix_product_ceiling, sizes=[64], repeats=2)
    monkeypatch.setitem(bench.measure.__globals__, "matrix_product_ceiling", ceiling)


def ragged_task(local_rate=0.05):
    """Clients of 1, 5 and 8 examples, all of them in every round, two epochs in batches of 4."""
    model = logistic(3)
    rng = np.random.default_rng(0)
    examples = {"x": rng.normal(size=(14, 5)).astype(np.float32), "y": rng.integers(0, 3, 14).astype(np.int32)}
    return jobs.Workload(
        loss_fn=cross_entropy(model),
        params=model.init(jax.random.key(0), examples["x"][:1]),
        data=pack(examples, np.split(np.arange(14), [1, 6])),
        work=local_epochs(2, batch_size=4),
        local_rate=local_rate,
        example={"x": jax.ShapeDtypeStruct((5,), np.float32), "y": jax.ShapeDtypeStruct((), np.int32)},
    )


def tiny(build=ragged_task):
    return jobs.Job("tiny", "ragged clients", "two epochs", build, cohort_size=3, strategy="chunked(2)", rounds=2)


def test_client_steps_are_the_real_ones_and_costs_are_of_pairs(monkeypatch):
    clocks = types.SimpleNamespace(perf_counter=Clock(), process_time=time.process_time)
    monkeypatch.setitem(bench.measure.__globals__, "time", clocks)
    measured = bench.measure(tiny(), ["SL", "fedavg"], repeats=3)
    # masked steps of the shorter client in a chunk do not count
    assert measured["client_steps_per_round"] == 2 * (1 + 2 + 2)
    assert (measured["population"], measured["parameters"]) == (3, 5 * 3 + 3)
    assert measured["strategy"] == {"asked": "chunked(2)", "used": "chunked(2)"}
    scheduler, baseline = measured["methods"]
    assert baseline["cost_over_fedavg"]["wall"] == {"median": 0.0, "min": 0.0, "max": 0.0}
    for method in (scheduler, baseline):
        speed, seconds = method["client_steps_per_second"], method["round_seconds"]
        assert speed["median"] == pytest.approx(10 / seconds["median"])
        assert speed["min"] == pytest.approx(10 / seconds["max"])
        assert method["rounds_per_second"]["median"] == pytest.approx(1 / seconds["median"])
        assert method["gigaflops"]["max"] == pytest.approx(speed["max"] * measured["flops_per_client_step"] / 1e9)
        assert method["client_loss"]["last"] < method["client_loss"]["first"] and method["left_out"] == 0
    # the clock makes the n-th interval n seconds: SL, fedavg | fedavg, SL | SL, fedavg are n, n+1 | n+2, n+3 | n+4, n+5
    n = round(2 * scheduler["round_seconds"]["min"])
    ratios = sorted([n / (n + 1), (n + 3) / (n + 2), (n + 4) / (n + 5)])
    assert scheduler["cost_over_fedavg"]["wall"]["median"] == pytest.approx(ratios[1] - 1)
    assert scheduler["cost_over_fedavg"]["wall"]["max"] == pytest.approx(ratios[2] - 1)


class Clock:
    """Every second call is n seconds after the one before, n = 1, 2, ..."""

    def __init__(self):
        self.now, self.calls = 0.0, 0

    def __call__(self):
        self.calls += 1
        if self.calls % 2 == 0:
            self.now += self.calls // 2
        return self.now


def test_flops_of_a_dense_layer_are_those_of_its_products():
    # forward and the gradient towards the weights; none towards the inputs
    assert bench.flops_per_client_step(ragged_task()) == pytest.approx(2 * 2 * 4 * 5 * 3, rel=1.5)
    wide = jobs._mlp(clients=2)
    assert bench.flops_per_client_step(wide) == pytest.approx(2 * 20 * (2 * 64 * 64 + 3 * 64 * 10), rel=0.05)


def test_updates_that_are_not_finite_are_reported():
    measured = bench.measure(tiny(lambda: ragged_task(local_rate=1e38)), rounds=1, repeats=1)
    (method,) = measured["methods"]
    assert method["left_out"] > 0 and method["cost_over_fedavg"]["wall"]["median"] == 0


@pytest.fixture
def known(monkeypatch):
    def missing():
        raise FileNotFoundError("no files here.\n  Install them.")

    table = {"tiny": tiny(), "missing": jobs.Job("missing", "clients", "without data", missing, 1, "sequential", 1)}
    monkeypatch.setattr(suite, "JOBS", table)
    monkeypatch.setattr(bench, "JOBS", table)  # where the command looks
    return table


def test_command_prints_a_table_and_writes_json(known, tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    arguments = ["bench", "tiny", "--methods", "fedavg", "CL", "--rounds", "1", "--repeats", "2", "--out", str(out)]
    arguments += ["--processes", "1", "--cohort-size", "2"]
    assert main([*arguments, "--strategy", "sequential"]) == 0
    printed = capsys.readouterr()
    assert "client-steps/s" in printed.out and "CL" in printed.out
    described = "tiny: ragged clients, 2 a round, two epochs\n"  # the cohort that was asked for, not the job's own
    assert printed.err == described and described in printed.out
    results = json.loads(out.read_text())
    assert results["command"] == "bench" and results["environment"]["jax"] == jax.__version__
    assert set(results["machine"]) == {"cores", "vectors"} and results["settings"]["repeats"] == 2
    (job,) = results["jobs"]
    assert job["strategy"]["used"] == "sequential" and job["rounds_per_program"] == 1
    assert job["memory_mib"]["peak"] >= job["memory_mib"]["data"] > 0 and job["gigaflops_ceiling"] > 0
    assert [method["method"] for method in job["methods"]] == ["fedavg", "CL"]
    assert set(job["methods"][0]) == {
        *("method", "compile_seconds", "round_seconds", "client_steps_per_second", "rounds_per_second", "gigaflops"),
        *("share_of_ceiling", "cost_over_fedavg", "client_loss", "left_out", "not_started", "lost", "taken_back"),
        "non_finite_products",
    }
    assert main(["bench", "missing", "--processes", "1", "--out", str(out), "--quiet"]) == 2  # its own file is replaced
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]
    assert [job["job"] for job in json.loads(out.read_text())["jobs"]] == ["missing"]


def test_a_job_without_its_data_is_reported_and_fails(known, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert main(["bench", "missing", "--processes", "1", "--out", str(out), "--quiet"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "fedhyper: error: missing was not measured: no files here. Install them.\n"
    assert json.loads(out.read_text())["jobs"] == [{"job": "missing", "error": "no files here. Install them."}]


def test_several_jobs_run_in_processes_of_their_own(known, monkeypatch):
    calls = []
    monkeypatch.setattr(suite, "_in_own_process", lambda name, settings, processes: calls.append(name) or {"job": name})
    assert [job["job"] for job in bench.bench()["jobs"]] == calls == ["tiny", "missing"]


def test_list(capsys):
    assert main(["bench", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(bench.JOBS)
    assert {"mlp", "cnn", "logistic-1M", "resnet18", "char_lstm"} <= set(bench.JOBS)


BAD = {
    "job": (["mpl"], "unknown job 'mpl'; did you mean mlp? known: mlp, cnn"),
    "twice": (["mlp", "mlp"], "jobs must be different names, got ['mlp', 'mlp']; name each once"),
    "method": (["mlp", "--methods", "GCL"], "unknown method 'GCL'; did you mean CL? known: fedavg, G, SL, CL"),
    "methods": (["mlp", "--methods", "G", "G"], "methods must be one or more different names, got ['G', 'G']"),
    "rounds": (["mlp", "--rounds", "0"], "rounds must be an integer ≥ 1, got 0"),
    "repeats": (["mlp", "--repeats", "0"], "repeats must be an integer ≥ 1, got 0"),
    "strategy": (["mlp", "--strategy", "fast"], "unknown strategy 'fast'; known: vectorized, sequential"),
    "debug": (["mlp", "--strategy", "debug"], "strategy 'debug' runs without compilation"),
    "folder": (["mlp", "--out", "."], "out must be a file, got the folder ."),
    "other file": (["mlp", "--out", __file__], "which `fedhyper bench` did not write; choose another file"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line(case, capsys):
    arguments, message = BAD[case]
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_peak_memory_counts_what_was_held():
    bench.measure.__globals__["forget_peak_memory"]()
    before = bench.peak_memory()
    np.ones(2**25)  # 256 MiB, let go at once
    assert bench.peak_memory() > before + 100


@pytest.mark.product  # test_tasks.py runs on such clients, and benchmarks on others
def test_a_job_from_clients_made_on_demand():
    task = jobs.logistic_1m(population=1000)
    job = jobs.JOBS["logistic-1M"]._replace(build=lambda: task, cohort_size=5)
    measured = bench.measure(job, rounds=1, repeats=1)
    assert 5 <= measured["client_steps_per_round"] <= 5 * 50
    assert measured["flops_per_client_step"] == pytest.approx(2 * 2 * 20 * 64 * 10, rel=0.1)


@pytest.mark.parametrize(
    ("name", "build", "shape", "steps"),
    [
        ("resnet18", lambda: jobs._resnet18(clients=3, width=2), (32, 32, 3), 2),
        ("char_lstm", lambda: jobs._char_lstm(clients=3, hidden=4), (80,), 5),
    ],
)
def test_jobs_of_networks(name, build, shape, steps, monkeypatch):
    monkeypatch.setattr(jax, "jit", lambda init: functools.partial(jax.eval_shape, init))  # shapes are enough
    task = build()
    assert task.data.examples["x"].shape[1:] == shape == task.example["x"].shape
    assert task.work.steps == steps and len(set(task.data.client_sizes.tolist())) == 1
    assert len(task.data.client_sizes) == 3
    batch = {key: task.data.examples[key][: task.work.batch_size] for key in ("x", "y")}
    assert jax.eval_shape(task.loss_fn, task.params, batch).shape == (task.work.batch_size,)


def test_peers_get_the_same_job():
    common = load_script(EXPERIMENTS / "peers" / "common.py")
    x, y = common.clients("mlp")
    ours = jobs._mlp()
    numbers = common.JOBS["mlp"]
    assert np.array_equal(ours.data.examples["x"], x.reshape(-1, 64))
    assert np.array_equal(ours.data.examples["y"], y.reshape(-1))
    assert ours.data.client_sizes.tolist() == [numbers["examples"]] * numbers["clients"]
    assert (ours.work.steps, ours.work.batch_size) == (numbers["steps"], numbers["batch"])
    assert (jobs.JOBS["mlp"].cohort_size, ours.local_rate) == (numbers["cohort"], numbers["rate"])


def test_ratios_of_pairs():
    script = load_script(EXPERIMENTS / "benchmark_peers.py")
    speeds = [(300, 100), (500, 100), (200, 50)]
    pairs = [
        {
            "job": "mlp",
            "peer": "torch",
            "ours": {"client_steps_per_second": ours},
            "theirs": {"client_steps_per_second": theirs},
        }
        for ours, theirs in speeds
    ]
    (row,) = script.ratios(pairs)
    assert row["ratio"] == {"median": 4.0, "min": 3.0, "max": 5.0} and row["pairs"] == 3
