"""A run that was stopped and resumed leaves what one that was never stopped leaves, byte for byte."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import threading
import time

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fedhyper_jax.shell import compare as shell_compare
from fedhyper_jax.shell import resume
from fedhyper_jax.shell import train as shell_train
from fedhyper_jax.shell.checkpoint import load_parameters
from fedhyper_jax.shell.cli import main
from fedhyper_jax.shell.config import ConfigError, load_config
from fedhyper_jax.shell.plots import plot_folder
from fedhyper_jax.shell.records import read_records, read_summary
from fedhyper_jax.shell.resume import claim, newest, run_place
from fedhyper_jax.shell.runs import load_run
from tests.helpers import product

from .conftest import empty_pictures

TINY = ["--model", "logistic", "--clients", "12", "--cohort-size", "3", "--local-steps", "2", "--batch-size", "4"]
TINY += ["--no-evaluate-clients", "--quiet", "--strategy", "sequential", "--rounds", "10", "--checkpoint-every", "4"]
# chunks of two rounds, checkpoints after 4, 8 and 10; momentum, rows a client and a rate of its own are in the state
RUN = ["run", *TINY, "--method", "scaffold+G", "--server-optimizer", "momentum", "--eval-every", "3"]
COMPARE = ["compare", *TINY, "--methods", "fedavg", "G+SL", "--local-rates", "0.02", "0.3", "--seeds", "2"]


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Programs are compiled once for all tests here, and nothing is drawn."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    with empty_pictures():
        yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def killed(after, part=1, signal_number=None):
    """Inside, a process ends, as it were, when so many rounds of the part are recorded; or it gets the signal."""

    class Bar(shell_train.ProgressBar):
        parts_started = 0

        def start_part(self, *arguments, **options):
            super().start_part(*arguments, **options)
            self.parts_started += 1

        def __call__(self, done):
            super().__call__(done)
            if done.rounds_done == after and self.parts_started == part:
                if signal_number is None:
                    raise Killed
                os.kill(os.getpid(), signal_number)

    with pytest.MonkeyPatch.context() as patch:
        for module in (shell_train, shell_compare):
            patch.setattr(module, "ProgressBar", Bar)
        with contextlib.nullcontext() if signal_number else pytest.raises(Killed):
            yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main([*RUN, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparisons") / "undisturbed"
    assert main([*COMPARE, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """``stopped_once(after)`` is the folder of a run that died there."""

    @functools.cache
    def stop(after):
        folder = tmp_path_factory.mktemp("stopped") / "run"
        with killed(after):
            main([*RUN, "--out", str(folder)])
        return folder

    return stop


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """``stopped(after)`` is a copy of it."""
    return lambda after: shutil.copytree(stopped_once(after), tmp_path / "run")


def contents(folder, below=""):
    """Every file of a folder by name."""
    files = sorted(path for path in (folder / below).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def parameters(folder):
    """The arrays, in the order of their names; the files of orbax have time stamps in them."""
    leaves = jax.tree_util.tree_leaves_with_path(load_parameters(folder))
    return {jax.tree_util.keystr(path): bytes(leaf) for path, leaf in leaves}


def same_results(given, expected):
    assert (given / "metrics.jsonl").read_bytes() == (expected / "metrics.jsonl").read_bytes()
    if (expected / "parameters").exists():
        assert parameters(given) == parameters(expected)
    timed = ("seconds", "compilation_cache", "environment", "strategy")
    summaries = [{k: v for k, v in read_summary(folder).items() if k not in timed} for folder in (given, expected)]
    assert summaries[0] == summaries[1]
    assert not (given / "checkpoints").exists()


# (the others, and what comes before the first checkpoint, are where records and checkpoints are damaged or moved)
@pytest.mark.parametrize("after", [10, *map(product, (2, 6, 8))])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(stopped, undisturbed, after, capsys):
    """Before the first checkpoint, between two, at one, and when all rounds are done but nothing is summed up."""
    folder = stopped(after)
    assert read_summary(folder)["status"] == "unfinished" and len(read_records(folder)) == after
    assert main(["run", "--resume", str(folder), "--quiet"]) == 0
    same_results(folder, undisturbed)
    assert "cannot be used" not in capsys.readouterr().err


def test_checkpoints_are_written_as_asked_and_two_are_kept(stopped):
    folder = stopped(10)
    assert [path.name for path in run_place(folder).paths()] == ["round-00000010.ckpt", "round-00000008.ckpt"]
    notes = newest(run_place(folder)).notes
    assert notes["rounds_done"] == 10 and notes["strategy"]["used"] == "sequential"
    assert notes["records"]["bytes"] == (folder / "metrics.jsonl").stat().st_size


def test_no_checkpoints_if_none_are_wanted(tmp_path):
    with killed(5):
        main([*RUN, "--checkpoint-every", "0", "--out", str(tmp_path / "run")])
    assert not run_place(tmp_path / "run").paths()


def test_resuming_a_finished_run_says_so_and_changes_nothing(undisturbed, capsys):
    before = contents(undisturbed)
    assert main(["run", "--resume", str(undisturbed)]) == 0
    assert "is finished; nothing is left to do" in capsys.readouterr().out
    assert contents(undisturbed) == before
    assert shell_train.train(load_config(undisturbed / "config.toml"), resume=True) == read_summary(undisturbed)


def test_a_comparison_goes_on_method_by_method(tmp_path, compared):
    """The second method stopped between two checkpoints, when the first one was done."""
    with killed(6, part=2):
        main([*COMPARE, "--out", str(tmp_path / "c")])
    methods = [record["method"] for record in read_records(tmp_path / "c")]
    assert methods == ["fedavg"] * 40 + ["G+SL"] * 24
    assert main(["compare", "--resume", str(tmp_path / "c"), "--quiet"]) == 0
    same_results(tmp_path / "c", compared)


def test_the_order_of_records_does_not_depend_on_chunks(compared):
    order = [(r["method"], r["initial_local_rate"], r["seed"], r["round"]) for r in read_records(compared)]
    grid = [(m, b, s, t) for m in ("fedavg", "G+SL") for b in (0.02, 0.3) for s in (0, 1) for t in range(10)]
    assert order == grid


@pytest.mark.parametrize("command", [pytest.param(RUN, id="run"), product(COMPARE, id="compare")])
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(tmp_path, capsys, command, request):
    """Asked for after 4 rounds, granted after the next chunk, although no checkpoint was due there."""
    folder = tmp_path / "it's a run"
    handler = signal.getsignal(signal.SIGINT)
    with killed(4, signal_number=signal.SIGINT):
        assert main([*command, "--out", str(folder)]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    error = capsys.readouterr().err
    assert "fedhyper: interrupted; 6 of 10 rounds are done and saved; go on with: fedhyper" in error
    assert f"--resume '{tmp_path}/it'\"'\"'s a run'\n" in error
    assert [path.name for path in sorted(folder.rglob("*.ckpt"))] == ["round-00000004.ckpt", "round-00000006.ckpt"]
    assert main([command[0], "--resume", str(folder), "--quiet"]) == 0
    same_results(folder, request.getfixturevalue("undisturbed" if command is RUN else "compared"))


def test_a_second_ctrl_c_acts_at_once():
    from fedhyper_jax.shell.recorder import Stop

    told = []
    with Stop(notify=lambda: told.append(1)) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same one, by way of the launcher
        assert stop.asked and told == [1]
        stop._when -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    thread = threading.Thread(target=lambda: Stop().__enter__())  # where signals cannot be had
    thread.start()
    thread.join()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)


def foreign(path):
    path.write_bytes(b"\x80\x04 something else")


@pytest.mark.parametrize("damage", [cut, empty, flip, foreign])
def test_every_damage_of_a_checkpoint_is_noticed(stopped, damage, capsys):
    folder = stopped(10)
    damage(run_place(folder).path(10))
    assert newest(run_place(folder)).notes["rounds_done"] == 8
    assert "round-00000010.ckpt cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [flip, *map(product, (cut, empty, foreign))])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(stopped, undisturbed, damage, capsys):
    folder = stopped(10)
    damage(run_place(folder).path(10))
    (folder / "checkpoints" / ".round-00000012.ckpt.tmp").write_bytes(b"half")  # killed during a save
    assert main(["run", "--resume", str(folder), "--quiet"]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "round-00000010.ckpt cannot be used" in error
    assert error.endswith("; going back to the one before it\n")
    same_results(folder, undisturbed)


def test_damaged_records_are_noticed_too(stopped, undisturbed, capsys):
    """Records that no checkpoint's digest fits begin anew."""
    folder = stopped(10)
    text = (folder / "metrics.jsonl").read_text().replace('"round": 1,', '"round": 9,')
    (folder / "metrics.jsonl").write_text(text)
    assert main(["run", "--resume", str(folder), "--quiet"]) == 0
    later, first = capsys.readouterr().err.splitlines()
    for line, instead in ((later, "going back to the one before it"), (first, "starting anew")):
        assert line.endswith(f"are not those that it was written with; {instead}")
    same_results(folder, undisturbed)


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.split("\n")


def test_another_run_is_refused_with_the_difference(stopped, capsys, monkeypatch):
    folder = stopped(6)
    before = contents(folder)
    lines = refusal(capsys, "run", "--resume", folder, "--rounds", 20, "--local-rate", 0.2)
    assert "cannot be resumed" in lines[0]
    assert lines[1:3] == ["  method.local_rate: 0.1 → 0.2", "  run.rounds: 10 → 20"]
    assert "leave --overwrite out" in refusal(capsys, "run", "--resume", folder, "--overwrite")[0]
    assert "leave --preset out" in refusal(capsys, "run", "--resume", folder, "--preset=demo")[0]
    assert "leave --out out" in refusal(capsys, "run", "--resume", folder, "--out", "elsewhere")[0]
    assert "of `fedhyper run`, not of" in refusal(capsys, "compare", "--resume", folder)[0]
    assert "is not a run folder" in refusal(capsys, "run", "--resume", folder.parent)[0]

    config = folder / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("seed = 0\n", "seed = 5\n").replace("clients = 12", "clients = 13"))
    lines = refusal(capsys, "run", "--resume", folder)
    assert {"  data.clients: 12 → 13", "  run.seed: 0 → 5"} < set(lines)
    config.write_text(text)
    monkeypatch.setattr(resume, "data_digest", lambda data: "other")
    monkeypatch.setattr(resume.jax, "__version__", "9.9")
    lines = refusal(capsys, "run", "--resume", folder)
    assert any(line.startswith("  SHA-256 of the data: '") and line.endswith("→ 'other'") for line in lines)
    assert any(line.startswith("  jax: '") and line.endswith("→ '9.9'") for line in lines)
    assert contents(folder) == before


def test_equal_options_and_a_moved_folder_whose_name_looks_like_a_pattern(
    stopped, undisturbed, tmp_path, drawn_quickly
):
    folder = pathlib.Path(shutil.move(stopped(6), tmp_path / "r[1]*"))
    arguments = ["--rounds", "10", "--out", str(folder), "--processes", "1", "--quiet"]
    assert main(["run", "--resume", str(folder), *arguments]) == 0
    same_results(folder, undisturbed)
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in undisturbed.iterdir())
    assert load_run(folder).params is not None
    assert all(path.parent == folder / "plots" and path.is_file() for path in plot_folder(folder))


def test_negative_rounds_between_checkpoints_are_refused(capsys, tmp_path):
    lines = refusal(capsys, *RUN, "--checkpoint-every", "-1", "--out", tmp_path / "new")
    assert "checkpoint_every must be a number of rounds, or 0 for none, got -1" in lines[0]
    assert not (tmp_path / "new").exists()


def test_a_folder_in_use_is_left_alone(stopped, capsys, monkeypatch):
    folder = stopped(6)
    before = contents(folder)
    monkeypatch.setattr(resume, "_PATIENCE", 0.2)
    with claim(folder):
        assert "is being written to by another process" in refusal(capsys, "run", "--resume", folder)[0]
        assert "is being written to" in refusal(capsys, *RUN, "--overwrite", "--out", folder)[0]
    assert contents(folder) == before
    with claim(folder):  # who lets go in time is waited for
        monkeypatch.setattr(resume, "_PATIENCE", 5.0)
        threading.Timer(0.3, lambda: None).start()
    start = time.monotonic()
    with claim(folder):
        assert time.monotonic() - start < 1


def test_records_of_a_run_hold_no_seconds(undisturbed):
    assert all("seconds" not in record for record in read_records(undisturbed))
    timing = [json.loads(line) for line in (undisturbed / "timing.jsonl").read_text().splitlines()]
    assert [(chunk["first_round"], chunk["rounds_done"]) for chunk in timing] == [(t, t + 2) for t in range(0, 10, 2)]
    assert all(chunk["seconds"] > 0 for chunk in timing)


def test_the_claim_of_nothing_is_granted(tmp_path):
    with claim(tmp_path / "nowhere"):
        pass
    assert not pathlib.Path(tmp_path / "nowhere").exists()
    with pytest.raises(ConfigError, match=r"cannot be resumed.*\n  a: 1 → 2"):
        resume.check_same("x", {"a": 1}, {"a": 2})
