"""The table of methods in the shell: names, options and settings, and `fedhyper methods`."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from rich.cells import cell_len

from fedhyper_jax.methods import KINDS, METHODS, method_options
from fedhyper_jax.shell.algorithms import CLIENT_OPTIMIZERS, SERVER_OPTIMIZERS, given_options
from fedhyper_jax.shell.arguments import RunArguments, parse_settings
from fedhyper_jax.shell.cli import main
from fedhyper_jax.shell.config import (
    CompareConfig,
    ConfigError,
    DataConfig,
    GridConfig,
    MethodConfig,
    MethodSettings,
    ModelConfig,
    RunConfig,
    load_config,
)
from fedhyper_jax.shell.datasets import build_partition
from fedhyper_jax.shell.experiment import build_experiment
from fedhyper_jax.shell.method_pages import _code, _escaped
from fedhyper_jax.shell.panels import Curve, _distinct
from fedhyper_jax.shell.records import read_records
from tests.helpers import without_pictures

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "methods.md"
SMALL = {"data": DataConfig(clients=20), "model": ModelConfig(name="logistic")}


def state_of(method, **given):
    """The state before round 0 of the algorithm that a configuration names."""
    experiment = build_experiment(RunConfig(method=method, **SMALL))
    return experiment.make_algorithm(method.name, method.local_rate, **given).init({"w": jnp.ones(3)})


@pytest.fixture(scope="module")
def every_method():
    """All of them in one configuration, which makes each."""
    return build_experiment(CompareConfig(compare=GridConfig(methods=tuple(METHODS)), **SMALL))


@pytest.mark.parametrize("name", [*METHODS, "G+SL+CL", "fedprox+G", "scaffold+fedexp", "CL+mime_lite"])
def test_every_method_has_a_name(name, every_method):
    algorithm = every_method.make_algorithm(name, 0.05)
    state = jax.eval_shape(algorithm.init, {"w": jnp.ones(3)})
    rows = {"scaffold": "control_variates", "feddyn": "dynamic_regularization", "scaffold+fedexp": "control_variates"}
    assert set(state.clients) == ({rows[name]} if name in rows else set())
    assert all(leaf.shape[0] == 20 for leaf in jax.tree.leaves(state.clients))  # as many as the data have


def test_every_optimizer_has_a_name():
    for name in SERVER_OPTIMIZERS:
        assert build_experiment(RunConfig(method=MethodConfig(name="SL", server_optimizer=name), **SMALL))
    for name in CLIENT_OPTIMIZERS:
        assert build_experiment(RunConfig(method=MethodConfig(client_optimizer=name), **SMALL))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("sgd", -400.0),
        ("momentum", -400.0),
        ("adam", -0.01),
        ("adam_corrected", -0.01),
        ("adagrad", -0.01),
        ("yogi", -0.01),
    ],
)
def test_server_optimizers_have_rates_of_their_own(name, step):
    """The first step from Δ = 400: −Δ of SGD and momentum, and one unit times 0.01 of those that divide by √v."""
    optimizer, faster = SERVER_OPTIMIZERS[name](1.0 if name == "sgd" else None), SERVER_OPTIMIZERS[name](0.5)
    updates = [o.update(jnp.array(400.0), o.init(jnp.array(1.0)), jnp.array(1.0))[0] for o in (optimizer, faster)]
    assert updates[0] == pytest.approx(step, rel=2e-3)
    assert updates[1] == pytest.approx(step * (0.5 if abs(step) > 1 else 50), rel=2e-3)


def test_plain_descent_is_left_to_the_method():
    assert SERVER_OPTIMIZERS["sgd"](None) is None


def test_rates_left_out_are_the_methods_own():
    assert state_of(MethodConfig(name="fedadam")).global_rate.rate == jnp.float32(0.1)
    assert state_of(MethodConfig(name="fedadam", global_rate=1.0)).global_rate.rate == 1
    assert state_of(MethodConfig(name="fedavg")).global_rate.rate == 1


def test_options_reach_their_method_and_may_be_replaced():
    method = MethodConfig(name="fedprox+fedexp", options={"proximal_weight": 0.5, "epsilon": 2.0})
    assert state_of(method).global_rate.epsilon == 2
    assert state_of(method, epsilon=3.0).global_rate.epsilon == 3
    whole = given_options(MethodConfig(options={"patience": 3.0}), ["plateau_local"])
    assert whole == {"patience": 3} and isinstance(whole["patience"], int)  # numbers of a file are floats


def test_each_method_of_a_comparison_gets_the_options_that_it_takes():
    settings = MethodSettings(global_rate=0.5, options={"epsilon": 2.0})
    grid = GridConfig(methods=("fedavg", "fedexp"))
    make = build_experiment(CompareConfig(compare=grid, method=settings, **SMALL)).make_algorithm
    assert make("fedavg", 0.1).init(jnp.ones(3)).global_rate.rate == 0.5
    assert make("fedexp", 0.1).init(jnp.ones(3)).global_rate.epsilon == 2
    with pytest.raises(ConfigError, match="epsilon is of fedexp, not of any of fedavg, G; known: global_bounds"):
        build_experiment(CompareConfig(compare=GridConfig(methods=("fedavg", "G")), method=settings, **SMALL))


def test_settings_of_another_partitioner_are_refused_unless_they_stand_at_their_default():
    assert build_partition(DataConfig(partitioner="iid", alpha=0.5))
    for setting in ({"alpha": 0.1}, {"min_examples": 2}, {"shards_per_client": 3}, {"skew": 2.0}):
        with pytest.raises(ValueError, match=f"partitioner 'iid' takes no {next(iter(setting))}"):
            build_partition(DataConfig(partitioner="iid", **setting))


def parsed(*arguments):
    settings, _ = parse_settings("run", RunArguments, arguments)
    return settings.settings.method


def test_options_of_the_command_line_go_before_those_of_the_file(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('[method]\nname = "fedprox+CL"\n[method.options]\nproximal_weight = 1\nclient_rates = "warm"\n')
    file = parsed("--config", str(path))
    assert file.options == {"proximal_weight": 1.0, "client_rates": "warm"}
    both = parsed("--config", str(path), "--options", "proximal_weight", "1e-3", "global_weight", "0")
    assert both.options == {"proximal_weight": 0.001, "client_rates": "warm", "global_weight": 0.0}
    assert parsed("--config", str(path), "--options", "client_rates", "None").options == {"proximal_weight": 1.0}
    assert parsed("--config", str(path), "--hyper-rate", "None").hyper_rate is None


def test_names_that_are_joined_run_with_their_options(tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    arguments = "--clients 5 --cohort-size 4 --local-steps 2 --batch-size 8 --model logistic --rounds 2 --quiet".split()
    arguments += ["--no-evaluate-clients", "--method", "scaffold+fedprox+fedexp", "--out", str(tmp_path)]
    assert main(["run", *arguments, "--options", "proximal_weight", "0.01", "epsilon", "1e-30"]) == 0
    assert load_config(tmp_path / "config.toml").method.options == {"proximal_weight": 0.01, "epsilon": 1e-30}
    for record in read_records(tmp_path):
        assert record["global_rate"] > 1  # FedExP's, where ε hides nothing
        # each of 4 clients sends its update and SCAFFOLD's c_m⁺ − c_m, 650 numbers each, and ‖Δ_m‖² for FedExP
        assert record["bytes_up"] == 4 * (2 * 650 + 1) * 4


def test_rates_that_stand_still_are_one_line_where_they_are_the_same():
    def line(method, *rates):
        return Curve(method, [[{"round": t, "global_rate": rate} for t, rate in enumerate(rates)]])

    lines = [line("fedavg", 1, 1), line("G", 1, 2), line("fedprox", 1, 1), line("fedadam", 0.1, 0.1)]
    assert [line.method for line in _distinct(lines, "global_rate")] == ["fedavg", "fedadam", "G"]
    assert len({str(Curve("fedprox", [], number).style) for number in range(32)}) == 32


def printed(capsys, *arguments):
    assert main(["methods", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "\x1b" not in captured.out
    return captured.out


def test_all_methods_are_listed_on_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = printed(capsys).splitlines()
    assert max(map(cell_len, lines)) <= 80 and not any("…" in line for line in lines)
    first = [line.split()[0] for line in lines if line.strip()]
    assert set(METHODS) <= set(first)
    assert [line.strip() for line in lines if line.strip().lower() in [kind.lower() for kind in KINDS]] == [
        kind[0].upper() + kind[1:] for kind in KINDS
    ]
    assert any("proximal_weight" in line and line.strip().startswith("fedprox ") for line in lines)


def test_one_method_is_told_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = printed(capsys, "scaffold")
    method = METHODS["scaffold"]
    for text in (method.title, method.kind, method.equation, method.state, method.communication, method.source):
        assert text in out
    assert "--global-rate (default 1.0)" in out
    both = printed(capsys, "feddyn+CL")
    assert METHODS["feddyn"].note in both and "FedHyper-CL" in both
    assert "--options dynamic_weight (default 0.01)" in both and "--hyper-rate (default 1.0)" in both


def test_the_page_of_methods_is_up_to_date(capsys):
    assert PAGE.read_text(encoding="utf-8") == printed(capsys, "--markdown"), (
        "fedhyper methods --markdown > docs/methods.md"
    )


def test_the_page_has_a_well_formed_row_for_every_method(capsys):
    lines = printed(capsys, "--markdown").splitlines()
    for name, method in METHODS.items():
        (row,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert row.replace("\\|", "").count("|") == 8 and method.equation in row
        assert all(f"`{option}={default!r}`" in row for option, default in method_options(name).items())
        assert sum(line.startswith(f"- `{name}`: ") for line in lines) == bool(method.note)


def test_nothing_in_a_cell_is_taken_for_markup():
    assert _escaped("‖a_m‖ |x| *b* <i>") == r"‖a\_m‖ \|x\| \*b\* \<i>"
    assert _code("|x|") == r"`\|x\|`" and _code("`patience` rounds") == "`` `patience` rounds ``"


def test_settings_that_are_flags_are_options_of_methods():
    """Every shared setting that may be left to the method is an option of one at least, by the same name."""
    known = {option for name in METHODS for option in method_options(name)}
    assert {"global_rate", "hyper_rate", "global_bounds", "local_bounds", "decay_factor"} <= known
