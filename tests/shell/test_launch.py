"""Several processes for one run: the same numbers, one run folder, and no process left behind."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from fedhyper_jax.shell import launch
from fedhyper_jax.shell.cli import main
from fedhyper_jax.shell.config import ConfigError
from fedhyper_jax.shell.records import read_records, read_summary

ONE_DEVICE = os.environ["XLA_FLAGS"]
QUICK = ["--model", "logistic", "--clients", "12", "--no-evaluate-clients", "--rounds", "3", "--local-epochs", "1"]
RUN = ["run", *QUICK, "--quiet", "--cohort-size", "5", "--method", "G+SL", "--local-rate", "0.1"]
SEQUENTIAL = ["--strategy", "sequential"]  # which compiles in half the time


MEMBER = """
import sys
from fedhyper_jax.shell import cli, compare, launch, train

for module in (train, compare):  # one process draws: a second one would be refused
    module.plot_folder = lambda folder: (folder / "plots").mkdir()
status = cli.main(sys.argv[1:])
launch.join = lambda: None  # once is enough
sys.exit(status or cli.main({second!r}))
"""
"""What the processes run in which nothing is drawn: what they are told, and a second command."""


def command(arguments, before="pass"):
    """A command in a process of its own, whose processes get two devices each."""
    program = f"import sys; from fedhyper_jax.shell import cli, launch; {before}; sys.exit(cli.main())"
    environment = {**os.environ, "XLA_FLAGS": f"{ONE_DEVICE} --xla_force_host_platform_device_count=2"}
    del environment["FEDHYPER_PROCESSES"]
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder where a run and a comparison of two processes are, ``run`` and ``compare``."""
    folder = tmp_path_factory.mktemp("launched")
    grid = ["--methods", "fedavg", "SL", "--local-rates", "0.1", "--seeds", "1", "--quiet"]
    second = ["launch", "--processes", "2", "compare", *QUICK, *grid, *SEQUENTIAL, "--out", str(folder / "compare")]
    member = [sys.executable, "-c", MEMBER.format(second=second)]
    run = [*RUN, *SEQUENTIAL, "--processes", "2", "--out", str(folder / "run")]
    done = command(run, before=f"launch._COMMAND = {member!r}")
    assert done.returncode == 0, done.stderr
    assert "Gloo" not in done.stdout + done.stderr and done.stdout.count("2 processes") == 2
    return folder


def test_two_processes_of_two_devices_give_the_result_of_one(launched, tmp_path):
    """Five clients over four devices."""
    assert main([*RUN, *SEQUENTIAL, "--processes", "1", "--out", str(tmp_path / "one")]) == 0
    summary = read_summary(launched / "run")
    assert summary["processes"] == 2 and summary["strategy"]["used"] == "sharded(sequential)"
    assert summary["environment"]["device"].startswith("4 ×")
    given, expected = (read_records(folder) for folder in (launched / "run", tmp_path / "one"))
    assert [record["round"] for record in given] == [0, 1, 2]
    for a, b in zip(given, expected, strict=True):
        for name in b:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert (launched / "run" / "parameters").is_dir() and (launched / "run" / "plots").is_dir()


def test_a_comparison_shares_its_methods_out(launched):
    out = launched / "compare"
    methods = [record["method"] for record in read_records(out)]
    assert methods == ["fedavg"] * 3 + ["SL"] * 3  # as one process writes them
    assert [cell["method"] for cell in read_summary(out)["cells"]] == ["fedavg", "SL"]
    assert (out / "plots").is_dir()


@pytest.mark.product  # the launcher's own mistakes are below; one process is told as in test_cli.py
def test_mistakes_are_said_once(tmp_path):
    (tmp_path / "config.toml").write_text('command = "run"\n')
    done = command([*RUN, "--processes", "2", "--out", str(tmp_path)])
    assert done.returncode == 2 and done.stderr.count("fedhyper: error") == 1
    assert "holds a run already" in done.stderr


def test_when_one_process_fails_none_is_left_behind(capsys, tmp_path):
    failing = "import sys; print('out of luck', file=sys.stderr); sys.exit(3)"
    with (tmp_path / "error").open("w+") as error:
        started = [
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]),
            subprocess.Popen([sys.executable, "-c", failing], stderr=error),
        ]
        assert launch._wait(started, [None, error]) == 3
    assert all(member.poll() is not None for member in started)
    assert "process 1 of 2 ended early: out of luck" in capsys.readouterr().err


def test_the_number_of_processes(monkeypatch):
    monkeypatch.delenv("FEDHYPER_PROCESSES")
    monkeypatch.setattr(launch, "pinnable_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert launch.default_processes(10) == 4 and launch.default_processes(3) == 3
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert launch.default_processes(10) == 1
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert launch.default_processes(10) == 1
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launch.default_processes(10) == 4
    monkeypatch.setenv("FEDHYPER_PROCESSES", "7")
    assert launch.default_processes(3) == 7
    monkeypatch.setenv("FEDHYPER_PROCESSES", "many")
    with pytest.raises(ConfigError, match="must be a number"):
        launch.default_processes(3)


@pytest.fixture
def own_programs(tmp_path, monkeypatch):
    """A cache of compiled programs, empty, as a command in a process of its own finds it."""
    before = jax.config.jax_enable_compilation_cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def test_a_run_with_other_rates_compiles_nothing(own_programs, tmp_path):
    """Rates are data; so the second program is the first one, read from the cache."""
    counts = []
    run = [*RUN, "--cohort-size", "2"]
    for name, rate in (("first", "0.1"), ("second", "0.02")):
        assert main([*run, "--local-rate", rate, "--hyper-rate", rate, "--out", str(tmp_path / name)]) == 0
        counts.append(read_summary(tmp_path / name)["compilation_cache"])
    assert counts[0]["misses"] > 0
    assert counts[1]["misses"] == counts[0]["misses"] and counts[1]["hits"] > counts[0]["hits"]  # (of this process)
    choices = [read_summary(tmp_path / name)["strategy"] for name in ("first", "second")]
    assert choices[0]["used"] == choices[1]["used"] and choices[1]["timings"] == "of an earlier run"
    assert choices[0]["asked"] == "auto" and choices[0]["timings"]
    json.loads((tmp_path / "first" / "summary.json").read_text())  # nothing in it that only this session could read


def test_launch_starts_a_command_as_often_as_asked(monkeypatch):
    started = []
    monkeypatch.setattr(launch, "launch", lambda *arguments: started.append(arguments) or 0)
    assert main(["launch", "--processes", "3", "compare", *QUICK]) == main([*RUN, "--processes", "2"]) == 0
    assert started == [(["compare", *QUICK, "--processes", "3"], 3), ([*RUN, "--processes", "2"], 2)]


def test_launch_needs_a_command(capsys):
    assert main(["launch", "--processes", "2"]) == 2
    assert "launch what?" in capsys.readouterr().err
    assert main(["launch", "--processes", "0", *RUN]) == 2
    assert "processes must be at least 1" in capsys.readouterr().err
