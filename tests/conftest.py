"""Shared fixtures: float64 on demand, small federations."""

import gc
import os

from experiments.xla_flags import QUICK, as_flags

# Compiling is most of the time that so small models take; `XLA_FLAGS= make test` compiles as users do.
os.environ.setdefault("XLA_FLAGS", as_flags(*QUICK))
# Commands started from tests are one process, unless a test says otherwise.
os.environ["FEDHYPER_PROCESSES"] = "1"
# Nothing that tests compile is worth keeping on disk; test_launch.py switches the cache on where it is the subject.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import chex
import jax
import numpy as np
import pytest

from fedhyper_jax.data import pack

# What a module leaves behind is collected at its end and never looked at again. Python's own rhythm, over the millions
# of objects that tracing makes, took a fifth of the time.
gc.disable()
# TPUs and GPUs multiply float32 in narrower types by default; what is compared here to 1e-5 must not be.
jax.config.update("jax_default_matmul_precision", "highest")

collect_ignore = ["reference/fedjax_traces.py"]  # a script for an environment of its own
if "device_count=4" not in os.environ["XLA_FLAGS"]:
    collect_ignore.append("engine/test_sharded.py")  # test_devices.py runs it, in a process with four devices


def pytest_addoption(parser):
    """``--all`` runs the full product too: every method with every strategy, dtype and sweep (``make test-all``)."""
    parser.addoption("--all", action="store_true", help="run the tests marked 'product' too")


def pytest_collection_modifyitems(config, items):
    """Without ``--all`` tests marked 'product' are left out; what stands for them is said where they are marked."""
    if not config.getoption("--all"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("product")])
        items[:] = [item for item in items if not item.get_closest_marker("product")]


@pytest.fixture(autouse=True)
def fresh_trace_counts():
    """chex counts traces by a function's name, across the parameters of a test."""
    chex.clear_trace_counter()


@pytest.fixture(autouse=True, scope="module")
def nothing_left():
    """Each compiled program holds memory maps; at the 65,530 that Linux allows a process, JAX dies of a SIGSEGV.

    Before that they stay, for many small ones serve the next module; and so does garbage, since to look for it takes a
    second a module.
    """
    yield
    if memory_maps() > 10_000:  # and before they fill the memory
        jax.clear_caches()
    if memory_maps() > 15_000:
        gc.unfreeze()
        gc.collect()
    gc.freeze()


def memory_maps() -> int:
    """How many this process holds, where that is known."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return 0


@pytest.fixture
def float64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def key():
    """The key of a run."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def ragged():
    """20 clients of 1 to 40 examples, 5 features, 3 classes, as (examples, rows of each client)."""
    rng = np.random.default_rng(7)
    sizes = np.concatenate([[1, 2, 40], rng.integers(3, 25, 17)])
    count = sizes.sum()
    labels = rng.integers(0, 3, count)
    inputs = rng.normal(size=(count, 5)) + np.eye(5)[labels]
    rows = np.split(rng.permutation(count), np.cumsum(sizes)[:-1])
    return {"x": inputs, "y": labels}, rows


@pytest.fixture(scope="session")
def federation(ragged):
    """The ragged federation in float32."""
    examples, rows = ragged
    with jax.enable_x64(False):
        return pack({"x": examples["x"].astype(np.float32), "y": examples["y"].astype(np.int32)}, rows)
