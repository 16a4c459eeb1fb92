import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from fedhyper_jax.engine import simulation
from fedhyper_jax.shell.arguments import CompareArguments, RunArguments, parse_settings
from fedhyper_jax.shell.checkpoint import load_parameters
from fedhyper_jax.shell.cli import main
from fedhyper_jax.shell.compare import compare
from fedhyper_jax.shell.config import ConfigError, RunSettings, load_config
from fedhyper_jax.shell.experiment import build_experiment
from fedhyper_jax.shell.presets import PRESETS, preset_config
from fedhyper_jax.shell.records import prepare_folder, read_notes, read_records, read_summary

from .conftest import RUN, TINY


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_what_a_run_leaves(run_folder):
    assert sorted(path.name for path in run_folder.iterdir()) == [
        "config.toml",
        "metrics.jsonl",
        "parameters",
        "plots",
        "summary.json",
        "timing.jsonl",
    ]
    records = strict(run_folder / "metrics.jsonl")
    assert [record["round"] for record in records] == [0, 1, 2]
    for record in records:
        assert {
            *("round", "accuracy", "loss", "global_rate", "local_rate", "client_rate_min"),
            *(
                "client_rate_median",
                "client_rate_max",
                "inner_product",
                "global_clipped_share",
                "local_clipped_share",
                "participants",
            ),
            *("left_out", "bytes_up", "bytes_down", "client_accuracy_mean", "client_accuracy_worst_decile"),
        } <= set(record)
        assert record["participants"] == 4 and record["local_rate"] == 0.05
    summary = read_summary(run_folder)
    assert summary["status"] == "finished" and summary["rounds"] == 3
    assert summary["final_accuracy"] == pytest.approx(np.mean([record["accuracy"] for record in records]))
    assert summary["bytes_up"] == sum(record["bytes_up"] for record in records)
    assert summary["seed"] == 0 and len(summary["partition_digest"]) == 64
    assert summary["environment"]["jax"] == jax.__version__
    assert summary["seconds"]["total"] > summary["seconds"]["first_chunk_with_compilation"] > 0


def test_the_parameters_of_a_run_give_its_last_accuracy(run_folder):
    config = load_config(run_folder / "config.toml")
    experiment = build_experiment(config)
    values = jax.jit(experiment.evaluate)(load_parameters(run_folder), experiment.evaluation_data)
    record = read_records(run_folder)[-1]
    assert np.float32(record["accuracy"]) == values["test_accuracy"]
    assert record["loss"] == pytest.approx(float(values["test_loss"]), rel=1e-5)


def test_a_run_can_be_repeated_from_its_configuration(run_folder, tmp_path):
    out = tmp_path / "again"
    config = str(run_folder / "config.toml")
    assert main(["run", "--config", config, "--out", str(out), "--quiet"]) == 0
    assert (run_folder / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()


def test_the_rounds_that_choose_a_strategy_are_of_the_program_that_runs(tmp_path):
    """Nothing is compiled twice, and a short run tries the strategy that compiles fastest only."""
    before = simulation._chunk._cache_size()
    at = TINY.index("--strategy")
    assert main(["run", *TINY[:at], *TINY[at + 2 :], "--rounds", "7", "--out", str(tmp_path / "run")]) == 0
    assert simulation._chunk._cache_size() == before + 1
    strategy = read_summary(tmp_path / "run")["strategy"]
    assert (strategy["asked"], strategy["used"]) == ("auto", "sequential")
    assert [timing["name"] for timing in strategy["timings"]] == ["sequential"]


def test_what_a_comparison_leaves_and_prints(comparison):
    compare_folder, out, err = comparison
    assert err == ""  # --quiet
    assert "initial local rate 0.02" in out and "initial local rate 0.5" in out
    assert "> 4" in out and "rounds to 99.9%" in out and "speed-up" in out and "\x1b" not in out
    records = strict(compare_folder / "metrics.jsonl")
    assert len(records) == 2 * 2 * 2 * 4
    cells = {(record["method"], record["initial_local_rate"], record["seed"]) for record in records}
    assert cells == {(m, r, s) for m in ("fedavg", "SL") for r in (0.02, 0.5) for s in (0, 1)}
    summary = read_summary(compare_folder)
    assert summary["status"] == "finished" and len(summary["cells"]) == 4
    for cell in summary["cells"]:
        assert len(cell["final_accuracy"]["values"]) == 2
        assert cell["rounds_to_target"] == {"median": None, "values": [None, None], "text": "> 4"}
    assert {path.name for path in compare_folder.iterdir()} == {
        *("config.toml", "metrics.jsonl", "plots", "summary.json", "timing.jsonl")
    }


def test_a_run_of_a_comparison_is_the_run_alone(compare_folder, tmp_path):
    alone = [
        "run",
        *TINY,
        "--no-evaluate-clients",
        "--rounds",
        "4",
        "--method",
        "SL",
        "--local-rate",
        "0.5",
        "--seed",
        "1",
    ]
    assert main([*alone, "--out", str(tmp_path / "alone")]) == 0
    together = [
        record
        for record in read_records(compare_folder)
        if (record["method"], record["initial_local_rate"], record["seed"]) == ("SL", 0.5, 1)
    ]
    for a, b in zip(read_records(tmp_path / "alone"), together, strict=True):
        assert (a["examples"], a["local_steps"]) == (b["examples"], b["local_steps"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["local_rate"] == pytest.approx(b["local_rate"], rel=1e-3)


def test_an_existing_run_folder_is_refused_unless_told(run_folder, capsys):
    before = (run_folder / "metrics.jsonl").read_text()
    assert main([*RUN, "--out", str(run_folder)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (run_folder / "metrics.jsonl").read_text() == before


def test_the_demo_overwrites_only_itself(tmp_path, monkeypatch, capsys):
    def only_prepare(config, *, preset, overwrite, quiet, resume):
        folder = prepare_folder(config.folder, config, preset=preset, overwrite=overwrite)
        seconds = {"total": 0.0, "first_chunks_with_compilation": 0.0}
        return {"seconds": seconds, "folder": folder, "strategy": {"used": "vectorized"}, "processes": 1}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedhyper_jax.shell.compare.compare", only_prepare)
    monkeypatch.setattr("fedhyper_jax.shell.report.print_comparison", lambda summary: None)
    command = ["compare", "--preset", "demo", "--quiet"]
    assert main(command) == 0
    assert read_notes("runs/demo") == {"command": "compare", "preset": "demo"}
    assert main(command) == 0
    assert main([*command, "--rounds", "3"]) == 2  # no longer the demo
    assert "holds a run already" in capsys.readouterr().err
    assert main([*command, "--rounds", "3", "--overwrite"]) == 0
    assert read_notes("runs/demo") == {"command": "compare"}
    assert main(command) == 2  # and what is there now is not the demo's


def test_debug_runs_without_compilation_and_gives_the_same(compare_folder, tmp_path):
    debug = ["run", *TINY, "--strategy", "debug", "--rounds", "1", "--no-evaluate-clients", "--method", "fedavg"]
    assert main([*debug, "--local-rate", "0.02", "--out", str(tmp_path / "debug")]) == 0
    (eager,), compiled = read_records(tmp_path / "debug"), read_records(compare_folder)[0]
    assert (compiled["method"], compiled["initial_local_rate"], compiled["seed"]) == ("fedavg", 0.02, 0)
    assert eager["loss"] == pytest.approx(compiled["loss"], rel=1e-4)


def test_diverging_clients_are_reported(tmp_path, capsys):
    arguments = [
        *TINY,
        "--no-evaluate-clients",
        "--rounds",
        "2",
        "--method",
        "fedavg",
        "--local-rate",
        "3e38",
        "--out",
        str(tmp_path / "new"),
    ]
    assert main(["run", *arguments]) == 0
    assert "8 client updates were not finite and left out" in capsys.readouterr().out
    assert read_summary(tmp_path / "new")["left_out"] == 8
    assert all(record["client_rate_median"] is None for record in strict(tmp_path / "new" / "metrics.jsonl"))


FEDHYPER = ("--method", "G+CL")

BAD = {
    "unknown command": (["paint"], "unknown command 'paint'; known: run, compare, plot, data, methods"),
    "unknown option": (["run", "--clinets", "4"], "unknown option '--clinets'; did you mean --clients? see `fedhyper"),
    "not a number": (["run", "--rounds", "many"], "--rounds must be an integer, got 'many'; see `fedhyper run --help`"),
    "missing value": (["run", "--rounds"], "--rounds must be an integer, got nothing"),
    "data": (["run", "--data", "digit"], "unknown data set 'digit'; did you mean digits? known: digits, fashion"),
    "model": (["run", "--model", "mpl"], "unknown model 'mpl'; did you mean mlp? known: logistic, mlp, cnn"),
    "model setting": (["run", "--model", "logistic", "--hidden", "3"], "model 'logistic' has no setting hidden"),
    "model shape": (["run", "--model", "cnn", "--channels", "2", "2", "2", "2"], "cannot be halved 4 times"),
    "method": (["run", "--method", "GCL"], "unknown method 'GCL'; did you mean CL? known: fedavg, G, SL, CL"),
    "methods": (["compare", "--methods", "fedavg", "H"], "unknown method 'H'"),
    "methods twice": (["compare", "--methods", "G", "G"], "methods must be one or more different values"),
    "no rates": (["compare", "--local-rates"], "local_rates must be one or more different values"),
    "seeds": (["compare", "--seeds", "0"], "seeds must be a number ≥ 1"),
    "seed": (["run", "--seed", "-1"], "seeds must be integers from 0"),
    "partitioner": (
        ["run", "--partitioner", "dirichet"],
        "unknown partitioner 'dirichet'; did you mean dirichlet? known: iid, dirichlet, shards, quantity_skew\n",
    ),
    "by user": (
        ["data", "--partitioner", "by_user"],
        "partitioner 'by_user' goes by users, and examples of 'digits' have none; use iid, dirichlet, shards or quant",
    ),
    "alpha": (["run", "--alpha", "-1"], "alpha must be finite and > 0, got -1.0"),
    "clients": (["run", "--clients", "5000"], "use fewer clients"),
    "strategy": (["run", "--strategy", "fast"], "unknown strategy 'fast'; known: vectorized, sequential, debug"),
    "debug": (["compare", "--strategy", "debug"], "use it with `fedhyper run`"),
    "preset": (["compare", "--preset", "dmeo"], "unknown preset 'dmeo'; did you mean demo? known: demo, fashion_mnist"),
    "two": (["run", "--preset", "demo", "--config", "x"], "give --config or --preset, not both"),
    "rate": (["run", "--local-rate", "-0.1"], "local_rate must be finite and > 0, got -0.1"),
    "rate nan": (["run", "--local-rate", "nan"], "local_rate must be finite and > 0, got nan"),
    "rates": (["compare", "--local-rates", "0.1", "inf"], "local_rate must be finite and > 0, got inf"),
    "global rate": (["run", "--method", "fedavg", "--global-rate", "0"], "global_rate must be finite and > 0"),
    "hyper rate": (["run", *FEDHYPER, "--hyper-rate", "-1"], "hyper_rate must be finite and ≥ 0"),
    "bounds": (["run", *FEDHYPER, "--local-bounds", "0.2", "0.3"], "local_rate must lie inside local_bounds"),
    "absolute": (
        ["run", *FEDHYPER, "--local-rate", "0.01", "--local-bounds", "absolute"],
        "use local_bounds='relative'",
    ),
    "bounds name": (
        ["run", *FEDHYPER, "--local-bounds", "wide"],
        "unknown local_bounds 'wide'; known: relative, absolute",
    ),
    "cohort": (["run", "--cohort-size", "101"], "cohort_size must be at most the population"),
    "rounds": (["run", "--rounds", "0"], "rounds must be an integer ≥ 1, got 0"),
    "work": (["run", "--local-steps", "1", "--local-epochs", "1"], "give local_epochs or local_steps, not both"),
    "replacement": (["run", "--with-replacement"], "with_replacement goes with local_steps"),
    "batch": (["run", "--batch-size", "0"], "batch_size must be an integer ≥ 1"),
    "target": (["run", "--target", "80"], "target must lie in (0, 1] for the accuracy, got 80.0; 0.8 is 80 %"),
    "hold out": (["run", "--hold-out", "1"], "hold_out must lie in [0, 1), got 1.0"),
    "optimizer": (["run", "--server-optimizer", "adm"], "unknown server_optimizer 'adm'; did you mean adam? known:"),
    "optimizer rate": (["run", "--server-optimizer-rate", "-1"], "server_optimizer_rate must be finite and > 0"),
    "no such option": (
        ["run", "--method", "fedprox+G", "--options", "proximal_wieght", "1"],
        "unknown option 'proximal_wieght' of fedprox+G; did you mean proximal_weight? known: global_bounds",
    ),
    "option of another": (
        ["run", "--method", "scaffold", "--options", "proximal_weight", "1"],
        "proximal_weight is of fedprox, not of scaffold; known: global_rate",
    ),
    "unused setting": (
        ["compare", "--methods", "fedavg", "scaffold", "--hyper-rate", "0.5"],
        "hyper_rate is of G, SL, CL, not of any of fedavg, scaffold; known: global_rate",
    ),
    "unused global rate": (["run", "--method", "fedexp", "--global-rate", "2"], "fedexp takes no global_rate: "),
    "option with a flag": (
        ["run", "--options", "hyper_rate", "0.5"],
        "hyper_rate is a setting of its own, not one of options; use --hyper-rate",
    ),
    "weighting as option": (["run", "--method", "feddyn", "--options", "weighting", "uniform"], "use --weighting"),
    "option and no value": (["run", "--options", "proximal_weight"], "--options must be names and values in turn"),
    "word for a number": (
        ["run", "--method", "fedprox", "--options", "proximal_weight", "large"],
        "option proximal_weight must be a number, got 'large'",
    ),
    "number for a word": (
        ["run", *FEDHYPER, "--options", "client_rates", "1"],
        "option client_rates must be a word, got 1.0",
    ),
    "way of a product": (
        ["run", *FEDHYPER, "--options", "normalise", "cosin"],
        "unknown normalise 'cosin'; did you mean cosine? known: cosine, squared_norm, debiased",
    ),
    "number for a way": (
        ["run", *FEDHYPER, "--options", "normalise", "1"],
        "unknown normalise 1.0; known: cosine, squared_norm",
    ),
    "word for a bound": (
        ["run", *FEDHYPER, "--options", "max_change", "small"],
        "max_change must be a real number, got 'small'",
    ),
    "nothing to debias": (
        ["run", *FEDHYPER, "--options", "normalise", "debiased"],
        "CL sees the gradients of one client; use",
    ),
    "half an integer": (
        ["run", "--method", "plateau_local", "--options", "patience", "2.5"],
        "patience must be an integer ≥ 1, got 2.5",
    ),
    "two rules": (["run", "--method", "G+fedexp"], "both set the global rate"),
    "two server steps": (
        ["run", "--method", "fedadam", "--server-optimizer", "momentum"],
        "fedadam and the argument server_optimizer both set the server optimizer",
    ),
    "method twice": (["run", "--method", "fedprox+fedprox"], "names one twice"),
    "scaled mechanic": (
        ["run", "--method", "fedavg", "--server-optimizer", "mechanic", "--server-optimizer-rate", "2"],
        "server_optimizer 'mechanic' finds its own step, and server_optimizer_rate scales it; leave it out",
    ),
    "mechanic and a rule": (
        ["run", "--method", "fedprox+fedexp", "--server-optimizer", "mechanic"],
        "server_optimizer 'mechanic' finds its own step, and fedexp scales it",
    ),
    "mechanic and the authors": (
        ["run", "--method", "reference_G", "--server-optimizer", "mechanic"],
        "server_optimizer 'mechanic' finds its own step, and reference_G scales it",
    ),
    "iid alpha": (
        ["run", "--partitioner", "iid", "--alpha", "0.1"],
        "partitioner 'iid' takes no alpha, got 0.1; leave it out",
    ),
    "which method": (["methods", "scafold"], "unknown method 'scafold'; did you mean scaffold? known: fedavg, G, SL"),
    "a page of one": (["methods", "scaffold", "--markdown"], "leave the name out"),
    "weighting": (["run", "--weighting", "size"], "unknown weighting 'size'; known: examples, uniform"),
    "no files": (
        ["compare", "--data", "fashion_mnist", "--data-folder", "/nowhere"],
        "apt-get install dataset-fashion",
    ),
    "source": (
        ["run", "--data", "fashion_mnist", "--data-source", "web"],
        "unknown source 'web'; known: auto, idx, tfds",
    ),
    "no source": (["run", "--data-source", "idx"], "data set 'digits' takes no source"),
    "no folder": (["run", "--data-folder", "/tmp"], "data set 'digits' takes no folder"),
    "no config": (["run", "--config", "nowhere.toml"], "cannot read the configuration nowhere.toml"),
    "plot": (["plot", "nowhere"], "nowhere is not a run folder"),
    "plot what": (["plot"], "`fedhyper plot` needs a folder; see `fedhyper plot --help`"),
    "data picture": (["data", "--out", "picture.nonsense"], "nonsense"),
    "data name": (["data", "--data", "digit"], "unknown data set 'digit'"),
}


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD)
def test_mistakes_are_one_line_and_status_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, message = arguments
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.startswith("fedhyper: error: ") and captured.err.count("\n") == 1
    assert captured.err.count("--help") <= 1 and "──" not in captured.err and "--- " not in captured.err
    assert not pathlib.Path("runs").exists()  # refused before anything was made


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nround = 3", "unknown key 'round' in [run]; did you mean rounds? known: rounds"),
        ("[run]\nrounds = 'three'", "run.rounds must be an integer, got 'three'"),
        ("rounds =", "is not valid TOML"),
        ("command = 'compare'", "is a configuration of `fedhyper compare`"),
    ],
)
def test_mistakes_in_a_file_are_one_line_and_status_2(text, message, tmp_path, capsys):
    (tmp_path / "job.toml").write_text(text)
    assert main(["run", "--config", str(tmp_path / "job.toml")]) == 2
    error = capsys.readouterr().err
    assert message in error and "job.toml" in error and error.count("\n") == 1


def test_options_override_the_file_which_overrides_defaults(tmp_path):
    (tmp_path / "job.toml").write_text(
        "[run]\nrounds = 2\ncohort_size = 2\n[data]\nclients = 10\n[model]\nhidden = [4]\n"
    )
    given = [f"--config={tmp_path / 'job.toml'}", "--cohort-size", "3", "--out", str(tmp_path / "out"), "--quiet"]
    config = parse_settings("run", RunArguments, given)[0].settings
    assert (config.run.rounds, config.run.cohort_size, config.data.clients, config.run.seed) == (2, 3, 10, 0)


def test_varying_a_run_leaves_it_alone(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = str(run_folder / "config.toml")
    parsed, _ = parse_settings("run", RunArguments, ["--config", config, "--seed", "7"])
    assert parsed.settings.folder == "runs/digits-G+CL-0.05-seed7"
    assert parsed.settings.data == load_config(config).data and parsed.settings.run.rounds == 3
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    shutil.copy(config, "copy.toml")  # still names the folder of the run
    for file in (config, "copy.toml"):
        assert main(["run", "--config", file, "--rounds", "2", "--overwrite", "--quiet"]) == 2
        error = capsys.readouterr().err
        assert "--overwrite with --config replaces only what --out names; add --out" in error and error.count("\n") == 1
    assert main(["run", "--config", "copy.toml", "--rounds", "2", "--quiet"]) == 2
    assert f"{run_folder} holds a run already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    parsed, _ = parse_settings("run", RunArguments, ["--config", config, "--overwrite", f"--out={run_folder}"])
    assert parsed.overwrite and parsed.settings.folder == str(run_folder)


@pytest.mark.parametrize(
    ("begun", "options", "message"),
    [
        (False, [], "nothing is recorded in 'a run' yet"),
        (True, [], "the last checkpoint will be done again; go on with: fedhyper run --resume 'a run'"),
        (True, ["--checkpoint-every", "0"], "is in 'a run'; without checkpoints (--checkpoint-every 0) it can"),
    ],
)
def test_ctrl_c_names_the_folder(begun, options, message, tmp_path, monkeypatch, capsys):
    def interrupted(config, **settings):
        if begun:
            pathlib.Path(config.folder).mkdir()
            (pathlib.Path(config.folder) / "summary.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedhyper_jax.shell.train.train", interrupted)
    assert main(["run", "--out", "a run", *options]) == 130
    error = capsys.readouterr().err
    assert error.startswith("fedhyper: interrupted; ") and message in error and error.count("\n") == 1


def test_data_alone_starts_from_the_preset_of_that_name():
    parsed, preset = parse_settings("compare", CompareArguments, ["--data", "fashion_mnist"])
    assert parsed.settings == PRESETS["fashion_mnist"] and preset == "fashion_mnist"
    parsed, preset = parse_settings("compare", CompareArguments, ["--data", "fashion_mnist", "--seeds", "1"])
    assert parsed.settings.work == PRESETS["fashion_mnist"].work and preset is None


def test_data_reports_and_lists(tmp_path, capsys):
    assert main(["data", "--clients", "10", "--partitioner", "shards", "--out", str(tmp_path / "new" / "p.png")]) == 0
    assert (tmp_path / "new" / "p.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "shards(num_clients=10" in printed and "effective classes" in printed
    assert main(["data", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9 and lines[0].startswith("digits: here")
    assert any("looked in" in line for line in lines if line.startswith("cifar100"))


def test_synthetic_clients_own_their_examples(tmp_path):
    arguments = ["--data", "synthetic_logistic", "--partitioner", "by_user", "--clients", "6", "--cohort-size", "2"]
    arguments += ["--rounds", "1", "--local-steps", "2", "--hold-out", "0.2", "--quiet", "--out", str(tmp_path / "a")]
    arguments += ["--model", "logistic", "--strategy", "sequential"]
    assert main(["run", *arguments]) == 0
    summary = read_summary(tmp_path / "a")
    assert summary["data"].startswith("synthetic") and 0 <= summary["client_accuracy"]["mean"] <= 1


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "--help"], ["methods", "--help"], ["data", "-h"]])
def test_help_is_on_standard_output(arguments, capsys):
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "usage: fedhyper" in captured.out and captured.err == ""


def test_processes_share_out_the_methods_of_a_comparison_not_its_cohorts(monkeypatch):
    config = dataclasses.replace(
        preset_config("demo", "compare"), run=RunSettings(strategy="sharded(sequential)", out="nowhere")
    )
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"strategy 'sharded\(sequential\)'.*--processes 1"):
        compare(config)
