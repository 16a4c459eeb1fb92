"""Runs the tests of sharding in a process of its own, since the number of devices is fixed when JAX starts."""

import os
import pathlib
import subprocess
import sys

SHARDED = pathlib.Path(__file__).with_name("test_sharded.py")


def test_sharded_rounds_on_four_devices(request):
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    everything = ["--all"] if request.config.getoption("--all") else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-q", *everything, str(SHARDED)],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=600,
        cwd=SHARDED.parents[2],
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
