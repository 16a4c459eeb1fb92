"""Real processes that are killed or interrupted; `python experiments/fifty_kills.py` does it at length."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from experiments import fifty_kills
from fedhyper_jax.shell.records import read_records, read_summary
from tests.helpers import product

TINY = fifty_kills.TINY.split()
WITHOUT_PICTURES = (
    "import sys; from fedhyper_jax.shell import cli, train; train.plot_folder = lambda folder: []; sys.exit(cli.main())"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The processes started here compile a program once, and draw nothing."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    monkeypatch.setattr(fifty_kills, "FEDHYPER", [sys.executable, "-c", WITHOUT_PICTURES])


@pytest.mark.parametrize("times", [1, product(3)])
def test_a_run_that_is_killed_during_a_save(times, tmp_path, capsys):
    """In processes of their own, as commands run: this one has been through many tests."""
    arguments = ["run", *TINY, *fifty_kills.SETTINGS["run"].split(), "--rounds", "40", "--checkpoint-every", "1"]
    whole, folder = tmp_path / "undisturbed", tmp_path / "killed"
    log, draw = subprocess.DEVNULL, random.Random(0)
    assert fifty_kills.start([*arguments, "--out", str(whole)], log).wait(300) == 0
    process, done = fifty_kills.start([*arguments, "--out", str(folder)], log), 0
    for number in range(times):
        fifty_kills.kill_somewhere(process, folder, done + 2, number == 0, draw)
        assert done <= fifty_kills.rounds_done(folder) < 40
        done = fifty_kills.rounds_done(folder)
        process = fifty_kills.start(["run", "--resume", str(folder), "--quiet"], log)
    assert process.wait(300) == 0
    assert fifty_kills.compare_folders(folder, whole), capsys.readouterr().out


@pytest.fixture
def interruptible():
    """Shells start what runs in the background deaf to Ctrl-C, and processes inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.product  # test_resume.py interrupts a run in process
def test_ctrl_c_stops_several_processes_and_they_go_on(tmp_path, monkeypatch, interruptible):
    """The launcher alone is told; the number of processes comes back by itself."""
    monkeypatch.delenv("FEDHYPER_PROCESSES")
    arguments = ["run", *TINY, "--strategy", "sequential", "--rounds", "4000", "--processes", "2"]
    folder = tmp_path / "run"
    with open(tmp_path / "log", "w+") as log:
        process = fifty_kills.start([*arguments, "--out", str(folder)], log)
        fifty_kills.wait_for(lambda: fifty_kills.rounds_done(folder) >= 10, process, 200, pause=0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        log.seek(0)
        said = log.read()
    assert "of 4000 rounds are done and saved; go on with: fedhyper run --resume" in said
    assert read_summary(folder)["status"] == "unfinished"
    done = fifty_kills.rounds_done(folder)
    assert 10 <= done < 4000 and len(read_records(folder)) == done
    again = subprocess.run(
        [*fifty_kills.FEDHYPER, "run", "--resume", str(folder), "--quiet"], capture_output=True, text=True, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert [record["round"] for record in read_records(folder)] == list(range(4000))
    assert (read_summary(folder)["status"], read_summary(folder)["processes"]) == ("finished", 2)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is of Linux")
def test_processes_end_with_a_launcher_that_is_killed():
    program = (
        "import functools, os, subprocess, time; from fedhyper_jax.shell.launch import _in_new_process as start; "
        "child = subprocess.Popen(['sleep', '100'], preexec_fn=functools.partial(start, set(), os.getpid())); "
        "print(child.pid, flush=True); time.sleep(100)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    child = int(launcher.stdout.readline())
    assert _runs(child)
    launcher.kill()
    launcher.communicate()
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_half_a_checkpoint_is_what_a_kill_during_a_save_leaves(tmp_path):
    """That the script sees it."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".round-00000003.ckpt.tmp").write_bytes(b"half")
    (tmp_path / "checkpoints" / "round-00000002.ckpt").write_bytes(os.urandom(3))
    assert fifty_kills.half_written(tmp_path) and fifty_kills.rounds_done(tmp_path) == 2
