"""One device a core where it is asked for, and a warning to those who leave cores idle."""

import os
import warnings
from types import SimpleNamespace

import jax
import pytest

from fedhyper_jax import IdleCoresWarning, data, fedavg, run, use_all_cores
from fedhyper_jax.engine import cores, diagnoses
from fedhyper_jax.shell.cli import main
from tests.helpers import in_a_new_process, logistic_loss, logistic_params, without_pictures

DEVICES = "import fedhyper_jax as fh, jax; print(fh.use_all_cores(), jax.device_count(), fh.use_all_cores())"


@pytest.mark.product  # the example of `use_all_cores` runs in a process of its own, and a page of the guide does
def test_a_device_a_core():
    here = diagnoses.number_of_cores()
    assert in_a_new_process(DEVICES).split() == [str(here)] * 3


@pytest.mark.product
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be pinned here")
def test_a_device_for_the_one_core_that_a_process_is_pinned_to():
    pin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    assert in_a_new_process(pin + DEVICES).split() == ["1", "1", "1"]


def test_too_late(monkeypatch):
    jax.devices()
    monkeypatch.setattr(cores, "number_of_cores", lambda: 7)
    with pytest.raises(RuntimeError, match=r"wants 7 CPU devices, but JAX is already in use with 1; .*restart"):
        use_all_cores()


@pytest.fixture
def impatient(monkeypatch):
    """A machine of four cores whose users have no time."""
    monkeypatch.setattr(diagnoses, "_warned", False)
    monkeypatch.setattr(diagnoses, "_PATIENCE", 0.0)
    monkeypatch.setattr(diagnoses, "number_of_cores", lambda: 4)


def train(federation, **settings):
    algorithm = fedavg(logistic_loss, work=data.local_steps(1, 4), local_rate=0.1, **settings)
    state = algorithm.init(logistic_params())
    return run(algorithm, jax.random.key(0), state, federation, rounds=3, cohort_size=2, rounds_per_chunk=1)


def test_a_long_run_on_one_of_several_cores_says_so_once(federation, impatient):
    with pytest.warns(IdleCoresWarning, match=r"of the 4 cores.*use_all_cores.*sharded\(chunked\(5\)\)") as caught:
        train(federation)
        train(federation)
    assert [warning.filename for warning in caught] == [__file__]


def test_who_is_left_in_peace(monkeypatch):
    """Short runs, accelerators, several devices, one core."""

    def hears(**machine):
        monkeypatch.setattr(diagnoses, "_warned", False)
        settings = {"number_of_cores": 4, "default_backend": "cpu", "device_count": 1, "seconds": 40.0, **machine}
        monkeypatch.setattr(diagnoses, "number_of_cores", lambda: settings["number_of_cores"])
        monkeypatch.setattr(jax, "default_backend", lambda: settings["default_backend"])
        monkeypatch.setattr(jax, "device_count", lambda: settings["device_count"])
        watch = diagnoses.watch_idle_cores()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                watch(SimpleNamespace(seconds=settings["seconds"]))
        return len(caught)

    assert hears() == 1
    quiet = [{"seconds": 20.0}, {"default_backend": "gpu"}, {"device_count": 2}, {"number_of_cores": 1}]
    assert [hears(**machine) for machine in quiet] == [0, 0, 0, 0]


def test_commands_are_left_in_peace(impatient, tmp_path, monkeypatch):
    """Theirs is the number of processes that was asked for."""
    without_pictures(monkeypatch)
    arguments = ["run", "--rounds", "2", "--strategy", "sequential", "--processes", "1", "--quiet"]
    arguments += ["--model", "logistic", "--local-steps", "1", "--no-evaluate-clients"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert not [warning for warning in caught if warning.category is IdleCoresWarning]
