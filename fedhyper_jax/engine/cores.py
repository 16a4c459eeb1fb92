"""The cores of this machine: a JAX device each, where a script or notebook asks for it; `launch` starts processes."""

import os

import jax


def pinnable_cores() -> list[int]:
    """The cores that this process may use; empty where processes cannot be pinned.

    Example:
      >>> all(isinstance(core, int) for core in pinnable_cores())
      True
    """
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def number_of_cores() -> int:
    """How many cores this process may use.

    Example:
      >>> number_of_cores() >= 1
      True
    """
    return len(pinnable_cores()) or os.cpu_count() or 1


def use_all_cores() -> int:
    """Gives JAX one CPU device a core, for strategies that divide a cohort between devices.

    XLA's own threads do not help steps as small as those of local training; a device a core and ``strategy=
    'sharded(chunked(5))'``, or ``'sharded(sequential)'`` for convolutions, does (docs/scaling.md has measurements). It
    must come before JAX is first used: at the top of a script or notebook. Accelerators and the default device stay as
    they are. The commands need no such call: they start a process a core.

    Returns:
      The number of CPU devices.

    Raises:
      RuntimeError: JAX is already in use with another number of CPU devices.

    Example:
      >>> import subprocess, sys  # a program of its own, where JAX has not started yet
      >>> program = "import fedhyper_jax as fh, jax; print(fh.use_all_cores() == jax.device_count('cpu'))"
      >>> subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
      'True'
    """
    number = number_of_cores()
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError as error:
        there = jax.local_device_count(backend="cpu")
        if there != number:
            raise RuntimeError(
                f"use_all_cores() wants {number} CPU devices, but JAX is already in use with {there}; call it before "
                "anything else uses JAX (in a notebook: restart the runtime, and call it in the first cell)"
            ) from error
    return number
