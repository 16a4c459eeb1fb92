"""Every snippet of the README runs, and does what the text around it says."""

import dataclasses
import functools
import json
import pathlib
import re
import shlex
import shutil

import chex
import jax
import numpy as np
import pytest

from fedhyper_jax import data, models
from fedhyper_jax.shell import bench
from fedhyper_jax.shell.bench import jobs
from tests.helpers import product, without_pictures

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```console\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
]


def execute(first_words, after=""):
    """With the strategy that compiles fastest after some words, if any; that it gives the same: test_strategies.py."""
    (snippet,) = [s for s in SNIPPETS if first_words in s]
    if after:
        assert snippet.count(after) == 1
        snippet = snippet.replace(after, f'{after}, strategy="sequential"')
    names = {}
    exec(compile(snippet, "README.md", "exec"), names)
    return names


def test_every_snippet_is_run_here():
    assert len(SNIPPETS) == 5


def test_the_library_example(capsys):
    names = execute("state.global_rate.rate", '"G+CL", work=work, local_rate=0.01')
    assert names["history"].evaluation["test_accuracy"][-1] > 0.88
    assert re.fullmatch(r"accuracy \d\d\.\d%, global rate 1\.\d\d\n", capsys.readouterr().out)


def test_the_composition_example():
    """Three spellings are one start and one program, which need not run; two others are others."""
    names = execute("scaffold+fedexp")
    digits = data.load("digits")
    clients = data.pack(digits.train, data.dirichlet(digits.train["y"], 100, alpha=0.5, seed=0).client_rows)
    params = jax.eval_shape(models.mlp(num_classes=10).init, jax.random.key(0), digits.train["x"])
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)

    def program(name):
        algorithm, cohort = names[name], data.make_cohort(clients, [0, 1])
        state = algorithm.init(params)
        return jax.jit(algorithm.round).lower(jax.random.key(1), state, cohort).as_text(), state

    by_value, by_name, by_hand = (program(name) for name in ("by_value", "by_name", "by_hand"))
    assert by_value[0] == by_name[0] == by_hand[0]
    chex.assert_trees_all_equal(by_value[1], by_name[1], by_hand[1])
    assert all(program(name)[0] != by_hand[0] for name in ("on_fedprox", "authors"))


def test_the_sweep_example():
    names = execute("fh.sweep", "hyper_rate=hyper_rate")
    rates = names["history"].info.local_rate[:, :, -1]
    assert rates.shape == (3, 4)
    assert np.all(rates[1] > 0.01)
    np.testing.assert_allclose(rates[2], 0.01, rtol=1e-6)


def test_the_example_of_ones_own_data(capsys):
    """Cork's targets are higher by 1, which one model for all cannot say; the others' are exact."""
    names = execute("from_client_ids", 'weighting="weights"')
    results, columns = names["results"], names["history"].columns()
    error = dict(zip(results["client"], results["error"], strict=True))
    assert list(error) == ["Aarhus", "Bergen", "Cork", "Delft"]
    assert error.pop("Cork") > 0.6 and max(error.values()) < 0.3
    shops, tokens, clients = names["shops"], names["reviews"]["tokens"], names["clients"]
    sums = np.array([tokens[shops == shop].sum() for shop in clients.names])
    np.testing.assert_allclose(clients.weights, sums / sums.mean(), rtol=1e-6)
    np.testing.assert_allclose(columns["client_error_mean"][-1], results["error"].mean(), rtol=1e-6)
    np.testing.assert_allclose(columns["client_error_worst_decile"][-1], results["error"].max(), rtol=1e-6)
    first, *_, table = capsys.readouterr().out.split("<")
    assert first.splitlines()[2].startswith("Cork: error 0.") and table.startswith("History: 30 rounds\n")


def test_the_optax_example():
    names = execute("scale_by_hypergradient(")
    assert np.linalg.norm(names["params"]) < 0.05
    assert names["global_rate"](names["state"]) > 0.001


QUICK = ["--rounds", "2", "--strategy", "sequential", "--no-evaluate-clients", "--quiet"]


RESUMED = "fedhyper run --data digits --method G+CL --local-rate 0.01"
"""The command whose folder the README resumes, and plots."""


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """That folder."""
    from fedhyper_jax.shell.cli import main

    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        assert main([*RESUMED.split()[1:], "--model", "logistic", *QUICK, "--out", str(folder)]) == 0
    return folder


def test_what_is_resumed_is_run():
    assert RESUMED.split() in COMMANDS


TRAINED = {
    "scaffold+fedexp": "test_table.py trains three methods that are joined, with an option of each",
    "char_lstm": "test_tasks.py trains one on text",
    "--rollback": "test_deployment.py trains with clients that fail, and with rounds that are taken back",
    "compare": "test_cli.py compares",
}
"""What tells the commands apart that train with `make test-all` only, and what stands for them."""


def fedhyper_commands():
    for command in COMMANDS:
        if command[0] == "fedhyper" and command != RESUMED.split():
            yield (product if set(command) & set(TRAINED) else pytest.param)(command, id=" ".join(command))


@pytest.mark.parametrize("command", [c for c in COMMANDS if set(c) & set(TRAINED)], ids=" ".join)
def test_the_commands_that_train_can(command):
    """They name what there is, and it goes together: up to the first state."""
    from fedhyper_jax.shell.arguments import CompareArguments, RunArguments, parse_settings
    from fedhyper_jax.shell.experiment import build_experiment

    kind = {"run": RunArguments, "compare": CompareArguments}[command[1]]
    parsed, _ = parse_settings(command[1], kind, command[2:])
    config = parsed.settings
    if config.data.name == "fashion_mnist":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, name="digits"))
    experiment = build_experiment(config)
    for method in config.compare.methods if command[1] == "compare" else [config.method.name]:
        algorithm = experiment.make_algorithm(method, 0.1)
        state = jax.eval_shape(lambda init=algorithm.init: init(experiment.start(0)[0]))
        assert jax.tree.leaves(state.params)


@pytest.mark.parametrize("command", list(fedhyper_commands()))
def test_the_shell_commands(command, a_run, tmp_path, monkeypatch):
    """With few rounds and rates, in a folder of their own; flags given again override the first."""
    from fedhyper_jax.shell.cli import main

    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)  # but `fedhyper plot` draws
    arguments, quick = command[1:], QUICK
    if arguments[0] == "plot" or "--resume" in arguments:
        shutil.copytree(a_run, arguments[-1])
    if arguments[0] == "run" and "--resume" not in arguments:
        text = ["--rounds", "1", "--hidden", "8", "--layers", "1"]
        short = text if "char_lstm" in arguments else ["--model", "logistic"]
        arguments += [*quick, *short]
    if arguments[0] == "bench":
        arguments += ["--methods", "fedavg", "--rounds", "1", "--repeats", "1", "--processes", "1"]
        arguments += ["--strategy", "sequential"]
        arguments.remove("cnn")  # (jobs of networks: test_bench.py)
        few = jobs.JOBS["mlp"]._replace(build=functools.partial(jobs._mlp, clients=20))
        monkeypatch.setitem(jobs.JOBS, "mlp", few)
        ceiling = functools.partial(bench.matrix_product_ceiling, sizes=[64], repeats=2)
        monkeypatch.setitem(bench.measure.__globals__, "matrix_product_ceiling", ceiling)
        arguments += ["--cohort-size", "2"]
    if arguments[0] == "compare":
        if "fashion_mnist" in arguments:
            arguments[arguments.index("fashion_mnist")] = "digits"  # the real files: tests/test_fashion_mnist.py
        arguments += [*quick, "--model", "logistic", "--methods", "fedavg", "--local-rates", "0.01", "--seeds", "1"]
    assert main(arguments) == 0


def test_speeds_are_the_measured_ones():
    """The table under "How fast" against what experiments/benchmark_peers.py wrote."""
    results = json.loads((RESULTS / "benchmark_peers.json").read_text())
    titles = {"torch": "plain PyTorch loop", "fedjax": "FedJAX", "pfl": "pfl-research", "flower": "Flower + Ray"}
    measured = {(row["job"], titles.get(row["peer"])): row["ratio"] for row in results["ratios"]}
    rows = re.findall(r"^\| ([^|]*) \| ([\d.]+ \(.*?\)) \| ([^|]*) \|$", README, flags=re.M)
    assert [title for title, _, _ in rows] == list(titles.values())
    for title, *cells in rows:
        for job, cell in zip(("mlp", "cnn"), cells, strict=True):
            ratio = measured.get((job, title))
            if ratio is None:
                assert cell == "not measured"
                continue
            digits = 1 if "." in cell else 0
            values = [f"{ratio[name]:.{digits}f}" for name in ("median", "min", "max")]
            assert cell == "{} ({}–{})".format(*values), title


def test_costs_and_scale_are_the_measured_ones():
    jobs = {job["job"]: job for job in json.loads((RESULTS / "speed" / "jobs.json").read_text())["jobs"]}

    def cost(job, method):
        (own,) = (m for m in jobs[job]["methods"] if m["method"] == method)
        return 100 * own["cost_over_fedavg"]["wall"]["median"]

    assert "G, SL and CL cost at most 1 % over FedAvg on\n`cnn` (CL 37 % on `mlp`)" in README
    assert max(cost("cnn", method) for method in ("G", "SL", "CL")) <= 1
    assert round(cost("mlp", "CL")) == 37
    largest = json.loads((RESULTS / "speed" / "scale.json").read_text())["largest"]["jobs"][0]
    (seconds,) = (m["round_seconds"]["median"] for m in largest["methods"] if m["method"] == "fedavg")
    said = f"take {seconds:.2f} s and {largest['memory_mib']['peak'] / 1024:.1f} GiB"
    assert said in README


def test_make_targets_exist():
    makefile = (pathlib.Path(__file__).parents[2] / "Makefile").read_text()
    for command in COMMANDS:
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, flags=re.M)


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (pathlib.Path(__file__).parents[2] / target).exists(), target
