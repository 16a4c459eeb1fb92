"""Going on with a run that was stopped: which checkpoint, whether it is of this very run, and the folder made ready.

A place holds the checkpoints of one run, or of one method of a comparison, and the records that go with them. A
checkpoint knows how many bytes of the records belong to it, and their SHA-256; what came after it is done again. Given
the same configuration, data, versions and devices, a resumed run leaves the bytes of one that was never stopped: states
come back bit by bit, rounds are cut into the same compiled programs, and cohorts and batches follow from the run's key
and the number of the round.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jaxlib
import numpy as np

from fedhyper_jax.base import PyTree
from fedhyper_jax.engine import wait_for_all
from fedhyper_jax.shell._toml import table_of
from fedhyper_jax.shell.checkpoint_file import Checkpoint, DamagedCheckpoint, read_checkpoint, restore
from fedhyper_jax.shell.config import CompareConfig, Config, ConfigError
from fedhyper_jax.shell.records import CHECKPOINTS, CONFIG, METRICS, prepare_folder, read_summary

NOT_A_RESULT = ("run.out", "data.folder")
"""Settings that may differ: the folder may have been moved, and the data are known by their digest."""

_PATIENCE = 10.0
"""Seconds that the processes of a killed run are given to let go of its folder."""


class Place(NamedTuple):
    """Where the checkpoints and the records of one run are, or of one method of a comparison."""

    checkpoints: pathlib.Path
    metrics: pathlib.Path

    def path(self, rounds_done: int) -> pathlib.Path:
        """The checkpoint after so many rounds."""
        return self.checkpoints / f"round-{rounds_done:08d}.ckpt"

    def paths(self) -> list[pathlib.Path]:
        """All checkpoints, the newest first."""
        return sorted(self.checkpoints.glob("round-*.ckpt"), reverse=True)


def run_place(folder: pathlib.Path) -> Place:
    """The place of a run."""
    return Place(folder / CHECKPOINTS, folder / METRICS)


def method_places(folder: pathlib.Path, methods: Sequence[str]) -> dict[str, Place]:
    """The place of each method of a comparison, so that any process may go on with any of them."""
    folders = {method: folder / CHECKPOINTS / f"{index:02d}-{method}" for index, method in enumerate(methods)}
    return {method: Place(below, below / METRICS) for method, below in folders.items()}


def made_of(config: Config, data: PyTree) -> dict[str, Any]:
    """All that a result depends on to the last bit, by name.

    Args:
      config: the configuration.
      data: arrays that the run sees: of training and of evaluation.
    """
    # The processes of a comparison divide methods between them, those of a run its cohorts.
    devices = jax.local_devices() if isinstance(config, CompareConfig) else jax.devices()
    import fedhyper_jax

    known = {
        **{name: value for name, value in _flat(table_of(config)).items() if name not in NOT_A_RESULT},
        "SHA-256 of the data": data_digest(data),
        "fedhyper_jax": fedhyper_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "devices": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})",
        "jax_enable_x64": jax.config.jax_enable_x64,
        "jax_default_matmul_precision": jax.config.jax_default_matmul_precision,
        "jax_default_prng_impl": jax.config.jax_default_prng_impl,
        "jax_threefry_partitionable": jax.config.jax_threefry_partitionable,
        "$XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    return json.loads(json.dumps(known))  # as it is read back


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def data_digest(data: PyTree) -> str:
    """Hex SHA-256 of all arrays of a tree, with their names, shapes and types.

    Example:
      >>> data_digest({"x": np.zeros(3)}) == data_digest({"x": np.zeros(3)}) != data_digest({"x": np.ones(3)})
      True
    """
    digest, seen = hashlib.sha256(), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if id(leaf) not in seen:  # clients that are evaluated on what they train on share its arrays
            is_key = isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            values = np.ascontiguousarray(jax.random.key_data(leaf) if is_key else leaf)
            seen[id(leaf)] = hashlib.sha256(values.reshape(-1).view(np.uint8).data).hexdigest()
        shape, dtype = np.shape(leaf), getattr(leaf, "dtype", type(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {shape} {dtype} {seen[id(leaf)]}\n".encode())
    return digest.hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line a name whose value differs: old → new.

    Example:
      >>> differences({"run.rounds": 60, "jax": "0.10.2"}, {"run.rounds": 80, "jax": "0.10.2", "run.seed": 1})
      ['run.rounds: 60 → 80', 'run.seed: not given → 1']
    """

    def text(values: dict[str, Any], name: str) -> str:
        return repr(values[name]) if values.get(name) is not None else "not given"

    names = dict.fromkeys([*before, *now])
    return [f"{name}: {text(before, name)} → {text(now, name)}" for name in names if before.get(name) != now.get(name)]


def check_same(folder: str | os.PathLike[str], before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to go on with something else.

    Raises:
      ConfigError: something differs; one line each after the first.
    """
    lines = differences(before, now)
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise ConfigError(
            f"{os.fspath(folder)} cannot be resumed, since the result would be another; make these what they were, or "
            f"start anew with another --out (old → new):{listed}"
        )


def settings_of(config: Config) -> dict[str, Any]:
    """A configuration by the names of its settings, less those that change no result."""
    table = json.loads(json.dumps(_flat(table_of(config))))
    return {name: value for name, value in table.items() if name not in NOT_A_RESULT}


def newest(place: Place, *, quiet: bool = False) -> Checkpoint | None:
    """The newest checkpoint that is whole and whose records are there; None without one.

    One that cannot be used is named on standard error, and the one before it is taken.
    """
    paths = place.paths()
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
            _check_records(place.metrics, checkpoint.notes["records"])
        except (DamagedCheckpoint, OSError) as error:
            if not quiet:
                instead = "starting anew" if path == paths[-1] else "going back to the one before it"
                print(f"fedhyper: checkpoint {path} cannot be used: {error}; {instead}", file=sys.stderr)
        else:
            return checkpoint
    return None


def _check_records(metrics: pathlib.Path, expected: dict[str, Any]) -> None:
    with open(metrics, "rb") as file:
        content = file.read(expected["bytes"])
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise DamagedCheckpoint(f"the records in {metrics} are not those that it was written with")


def cut_back(place: Place, checkpoint: Checkpoint | None) -> None:
    """Takes a place back to a checkpoint, or to nothing: later records go, and files that cannot be used."""
    kept = -1 if checkpoint is None else checkpoint.notes["rounds_done"]
    place.checkpoints.mkdir(parents=True, exist_ok=True)
    for path in place.checkpoints.glob("*"):
        # later checkpoints, half-written ones, and the mark of a method that is done
        if path.is_file() and path != place.metrics and (path.suffix != ".ckpt" or path > place.path(kept)):
            path.unlink()
    if checkpoint is None:
        place.metrics.unlink(missing_ok=True)
    else:
        with open(place.metrics, "rb+") as file:
            file.truncate(checkpoint.notes["records"]["bytes"])
            os.fsync(file.fileno())


def restored(checkpoint: Checkpoint, like: PyTree) -> PyTree:
    """The state of a checkpoint.

    Raises:
      ConfigError: of another algorithm than ``like``, although all that is known of it is the same.
    """
    try:
        return restore(checkpoint, like)
    except ValueError as error:
        raise ConfigError(f"the checkpoint cannot be resumed: {error}") from error


def finished_summary(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; None of any other folder."""
    summary = _summary_so_far(folder)
    return summary if summary.get("status") == "finished" else None


def _summary_so_far(folder: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        summary = read_summary(folder)
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def recorded_processes(folder: str | os.PathLike[str]) -> int | None:
    """How many processes began a run."""
    processes = _summary_so_far(folder).get("processes")
    return processes if isinstance(processes, int) and processes > 0 else None


def recorded_strategy(
    folder: str | os.PathLike[str], checkpoints: Sequence[Checkpoint | None]
) -> dict[str, Any] | None:
    """The strategy that a run was begun with, see `choose_strategy`; None where none was chosen yet."""
    of_checkpoints = [checkpoint.notes["strategy"] for checkpoint in checkpoints if checkpoint is not None]
    return of_checkpoints[0] if of_checkpoints else _summary_so_far(folder).get("strategy")


@contextlib.contextmanager
def opened(
    config: Config,
    places: Sequence[Place],
    known: dict[str, Any],
    *,
    preset: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[list[Checkpoint | None]]:
    """The run folder of a configuration, new or cut back to its last checkpoints, and nobody else's while it is open.

    To be entered by all processes of a run; the first one does the work, and the others wait for it.

    Args:
      config, preset, overwrite: as in `prepare_folder`.
      places: in the folder.
      known: see `made_of`.
      resume: go on with what is there.

    Yields:
      The checkpoint that each place goes on from, or None.

    Raises:
      ConfigError: the folder is in use, not to be touched, or cannot be resumed.
    """
    folder = pathlib.Path(config.folder)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            if not resume:
                with claim(folder):
                    prepare_folder(folder, config, preset=preset, overwrite=overwrite)
            stack.enter_context(claim(folder))
            checkpoints = [newest(place) for place in places]
            for checkpoint in checkpoints:
                if checkpoint is not None:
                    check_same(folder, checkpoint.notes["made_of"], known)
            for place, checkpoint in zip(places, checkpoints, strict=True):
                cut_back(place, checkpoint)
            wait_for_all("the folder is ready")
        else:
            wait_for_all("the folder is ready")
            checkpoints = [newest(place, quiet=True) for place in places]
        yield checkpoints


@contextlib.contextmanager
def claim(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Nobody else writes to a run folder while this lasts; ends with the process, however that ends.

    Raises:
      ConfigError: somebody else has claimed it and does not let go.
    """
    try:
        import fcntl

        file = open(pathlib.Path(folder) / CONFIG, "rb+")
    except (ImportError, OSError):  # Windows; or nothing there to claim
        yield
        return
    with file:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{os.fspath(folder)} is being written to by another process; wait until it ends, or stop it"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield


def clear(folder: pathlib.Path) -> None:
    """Removes the checkpoints of a finished run, whose records and parameters are where they belong."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
