"""Things that users do to folders, files and numbers: one clear line each, and nothing lost."""

import json
import shutil

import pytest

from fedhyper_jax.shell.cli import main
from tests.helpers import without_pictures

TINY = "--rounds 2 --clients 5 --cohort-size 2 --local-steps 1 --batch-size 4 --no-evaluate-clients --quiet".split()
TINY += ["--model", "logistic", "--strategy", "sequential"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        assert main(["run", *TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def refusal(capsys, *arguments):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedhyper: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"5\n", "damaged in line 1: not a record"),
        (b'{"round": 0, "method": "G"}\n', "damaged in line 1: not a record"),
        (b'{"round": 0}\nnonsense\n', "damaged in line 2"),
        (b"\xff\xfe\n", "is damaged"),
    ],
)
def test_damaged_records_are_named(folder, capsys, text, message):
    (folder / "metrics.jsonl").write_bytes(text)
    assert message in refusal(capsys, "plot", folder)


def test_plots_need_a_place(folder, capsys):
    shutil.rmtree(folder / "plots", ignore_errors=True)
    (folder / "plots").write_text("in the way")
    assert "cannot write to" in refusal(capsys, "plot", folder)


def test_an_edited_configuration_is_no_reason_not_to_plot(folder, drawn_quickly):
    config = folder / "config.toml"
    config.write_text(config.read_text().replace('"absolute"', '"bogus"'))
    assert main(["plot", str(folder)]) == 0


def test_foreign_folders_are_recognised_and_kept(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("[command]\nx = 1\n")
    assert "not a run folder" in refusal(capsys, "plot", tmp_path)
    assert "not a run folder" in refusal(capsys, "run", *TINY, "--out", tmp_path, "--overwrite")
    assert "must say what it is for" in refusal(capsys, "run", "--config", tmp_path / "config.toml")
    assert (tmp_path / "config.toml").read_text() == "[command]\nx = 1\n"


def test_overwriting_replaces_whatever_stands_in_the_way_of_a_run(folder):
    shutil.rmtree(folder / "parameters")
    (folder / "parameters").write_text("a file")
    assert main(["run", *TINY, "--out", str(folder), "--overwrite"]) == 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"


def test_only_the_demo_itself_is_replaced_by_the_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text('command = "compare"\npreset = "demo"\n[run]\nrounds = 999\n')
    (folder / "metrics.jsonl").write_text("keep\n")
    assert "holds a run already" in refusal(capsys, "compare", "--preset", "demo")
    assert (folder / "metrics.jsonl").read_text() == "keep\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", *TINY, "--out", "a" * 300], "File name too long"),
        (["run", *TINY, "--data", "fashion_mnist", "--data-folder", "a" * 300], "File name too long"),
        (["run", *TINY, "--local-steps", "10000000000"], "must be below 2**31"),
        (["run", *TINY, "--local-rate", "1e-300"], "local_rate must lie in the range of float32, got 1e-300"),
        (["compare", *TINY, "--seeds", "3000000000"], "seeds must be at most"),
        (
            ["compare", *TINY, "--local-rates", "0.1", "0.100000000001"],
            "local_rates must be one or more different values",
        ),
    ],
)
def test_numbers_and_names_beyond_the_machine_are_refused(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *arguments)


def test_a_toml_integer_beyond_float_is_refused(tmp_path, capsys):
    (tmp_path / "c.toml").write_text('command = "run"\n[data]\nalpha = 1' + "0" * 400 + "\n")
    assert "data.alpha must be a number" in refusal(capsys, "run", "--config", tmp_path / "c.toml")


@pytest.mark.product  # test_report.py, from records
def test_two_evaluations_do_not_tell_rounds_to_target(tmp_path, capsys):
    """An accuracy above the target may not be reported as "never reached"."""
    grid = ["--methods", "fedavg", "--local-rates", "0.1", "--seeds", "1", "--target", "0.001"]
    assert main(["compare", *TINY, *grid, "--out", str(tmp_path / "c")]) == 0
    (cell,) = json.loads((tmp_path / "c" / "summary.json").read_text())["cells"]
    assert cell["rounds_to_target"]["text"] == "not measured (< 3 evaluations)"
    assert cell["speed_up"]["value"] is None
