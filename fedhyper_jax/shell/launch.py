"""Several processes for one run: on CPU one pinned to each core; under a cluster's launcher those that it started.

XLA's own threads do not help the small steps of local training; a process a core does. The processes are one program
(``jax.distributed``): each trains its part of every cohort, one sum a round joins them, and the first one writes the
run folder. Nothing here imports JAX before a process is pinned.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from fedhyper_jax.engine import pinnable_cores
from fedhyper_jax.shell.config import ConfigError

_COORDINATOR, _INDEX, _COUNT = "_FEDHYPER_COORDINATOR", "_FEDHYPER_INDEX", "_FEDHYPER_COUNT"
_ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_plugins", "libtpu")
_COMMAND = [sys.executable, "-m", "fedhyper_jax.shell.cli"]
_PATIENCE = 10.0
"""Seconds that processes are given to end by themselves."""


def default_processes(cohort_size: int) -> int:
    """How many processes a command starts by itself: on CPU one a core, but no more than there are clients a round.

    1 where an accelerator's plugin for JAX is installed (unless JAX_PLATFORMS says cpu), where processes cannot be
    pinned, and in a process that was itself started as one of several. ``$FEDHYPER_PROCESSES`` overrides it.
    """
    asked = os.environ.get("FEDHYPER_PROCESSES")
    if asked and not is_member():
        if not asked.isdecimal() or int(asked) < 1:
            raise ConfigError(f"$FEDHYPER_PROCESSES must be a number ≥ 1, got {asked!r}; unset it for one a core")
        return int(asked)
    platforms = os.environ.get("JAX_PLATFORMS", "").lower()
    accelerated = any(importlib.util.find_spec(plugin) for plugin in _ACCELERATORS) and platforms != "cpu"
    if is_member() or accelerated or platforms not in ("", "cpu"):
        return 1
    return max(1, min(len(pinnable_cores()), cohort_size))


in_cluster: bool = False
"""Whether this process has joined a cluster's job."""


def is_member() -> bool:
    """Whether this process was started by `launch`."""
    return _COORDINATOR in os.environ


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs a command line in several processes, each pinned to a core of its own, and waits for them.

    Args:
      arguments: of ``fedhyper``, the command first.
      processes: how many; beyond the number of cores several share one.

    Returns:
      The exit status of the first process; of another one if that failed by itself.

    Raises:
      ConfigError: fewer than one process.
    """
    if processes < 1:
        raise ConfigError(f"processes must be at least 1, got {processes}; leave it out for one a core")
    available = pinnable_cores()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        members, errors = [], []
        for index in range(processes):
            error = None if index == 0 else stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            pin = {available[index % len(available)]} if available else set()
            members.append(
                subprocess.Popen(
                    [*_COMMAND, *arguments],
                    env={
                        **os.environ,
                        _COORDINATOR: coordinator,
                        _INDEX: str(index),
                        _COUNT: str(processes),
                        "JAX_PLATFORMS": "cpu",
                    },
                    stdin=None if index == 0 else subprocess.DEVNULL,
                    stdout=None if index == 0 else subprocess.DEVNULL,
                    stderr=error,
                    preexec_fn=functools.partial(_in_new_process, pin, os.getpid()) if os.name == "posix" else None,
                )
            )
            errors.append(error)
        return _wait(members, errors)


def _in_new_process(pin: set[int], launcher: int) -> None:
    """Before the command starts: pins the process, and makes it end with the launcher, however that ends.

    Processes that outlive a killed launcher would go on writing to the run folder that is being resumed.
    """
    if pin:
        os.sched_setaffinity(0, pin)
    if _set_death_signal is not None:
        _set_death_signal(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it ended before we could ask
            os._exit(1)


_PR_SET_PDEATHSIG = 1
_set_death_signal = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def _wait(members: list[subprocess.Popen], errors: list) -> int:
    """Waits for all; when one fails or we are stopped, none is left behind."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while any(member.poll() is None for member in members):
            failed = [index for index, member in enumerate(members) if member.poll() not in (None, 0)]
            if failed:
                return _failure(members, errors, failed[0])
            time.sleep(0.05)
        failed = [index for index, member in enumerate(members) if member.returncode != 0]
        return _failure(members, errors, failed[0]) if failed else 0
    except KeyboardInterrupt:
        _interrupt(members)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        for member in members[1:]:
            member.kill()
        members[0].terminate()
        try:
            members[0].wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            members[0].kill()
        for member in members:
            member.wait()


def _interrupt(members: list[subprocess.Popen]) -> None:
    """Ctrl-C: all finish the rounds under way and write their checkpoints; a second one ends it at once.

    A terminal has told all of them, but not everybody who stops a program is a terminal.
    """
    for member in members:
        if member.poll() is None:
            member.send_signal(signal.SIGINT)
    members[0].wait()
    # Those of a run wait for the first one in vain now; those of a comparison have rounds of their own.
    deadline = time.monotonic() + _PATIENCE
    while any(member.poll() is None for member in members) and time.monotonic() < deadline:
        time.sleep(0.05)


def _failure(members, errors, index: int) -> int:
    """The exit status after a failure, whose cause is the first process's own words if it has any."""
    if index != 0:
        # The first one may be about to say the same of itself.
        with contextlib.suppress(subprocess.TimeoutExpired):
            members[0].wait(1.0)
        if members[0].poll() not in (None, 0):
            return members[0].returncode
        status = members[index].returncode
        errors[index].seek(0)
        lines = errors[index].read().strip().splitlines()
        reason = lines[-1] if lines else f"exit status {status}"
        print(f"fedhyper: error: process {index} of {len(members)} ended early: {reason}", file=sys.stderr)
        return status if status > 0 else 128 - status
    return members[0].returncode


def join() -> None:
    """Makes this process one of those that it was started with, if it was; must come before JAX is used.

    Raises:
      ConfigError: the others cannot be reached.
    """
    if not is_member():
        return
    import jax
    from jax.experimental import multihost_utils

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with _quiet_descriptors():
            jax.distributed.initialize(os.environ[_COORDINATOR], int(os.environ[_COUNT]), int(os.environ[_INDEX]))
            # gloo connects at the first message, and says so: of processes, and of devices
            multihost_utils.sync_global_devices("joined")
            _meet()
    except RuntimeError as error:
        raise ConfigError(f"cannot reach the other processes of this run: {str(error).splitlines()[0]}") from error
    sys.excepthook = _leave_after_a_traceback


def _meet() -> None:
    """A first sum over all devices."""
    import jax

    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    whole = jax.sharding.PartitionSpec()
    add_up = jax.shard_map(
        lambda: jax.lax.psum(jax.numpy.ones(()), "all"), mesh=mesh, in_specs=(), out_specs=whole, check_vma=False
    )
    jax.block_until_ready(jax.jit(add_up)())


def leave(status: int) -> None:
    """Ends this process at once if it is one of several and has failed.

    An orderly end of ``jax.distributed`` waits for the others, who may be waiting for this one.
    """
    if status and (is_member() or in_cluster):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _leave_after_a_traceback(*exception) -> None:
    sys.__excepthook__(*exception)
    leave(1)


@contextlib.contextmanager
def _quiet_descriptors():
    """Silences what C++ writes to standard output and error, such as gloo's list of peers."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(nowhere)


def join_cluster() -> None:
    """Makes this process one of a cluster's job: SLURM, Open MPI, Kubernetes or a TPU pod, as JAX recognises them.

    Raises:
      ConfigError: JAX recognises no cluster here.
    """
    global in_cluster
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            "no cluster was recognised; start this command through srun, mpirun or on a TPU pod, or give --processes: "
            f"{str(error).splitlines()[0]}"
        ) from error
    in_cluster, sys.excepthook = True, _leave_after_a_traceback
