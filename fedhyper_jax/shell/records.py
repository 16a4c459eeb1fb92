"""The run folder: what is written, when, and how it is read back.

``config.toml`` first, then ``metrics.jsonl`` chunk by chunk as rounds are done, ``summary.json`` at the start (status
"unfinished") and again at the end, ``parameters/`` and ``plots/`` last. A killed run leaves whole lines, and
``checkpoints/`` to go on from, see `resume`; a finished one removes them. A comparison keeps the records of each method
beside its checkpoints until all are done. What a clock says stands in ``timing.jsonl`` and under ``seconds`` in
``summary.json`` alone, so that the same run leaves the same ``metrics.jsonl``.
"""

import json
import math
import os
import pathlib
import platform
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from fedhyper_jax.engine import History
from fedhyper_jax.shell.config import COMMANDS, Config, ConfigError, to_toml
from fedhyper_jax.shell.files import written_whole

CONFIG, METRICS, SUMMARY, PARAMETERS, PLOTS = "config.toml", "metrics.jsonl", "summary.json", "parameters", "plots"
TIMING, CHECKPOINTS = "timing.jsonl", "checkpoints"
_NOTES = "command", "preset"

Record = dict[str, Any]


def prepare_folder(
    folder: str | os.PathLike[str], config: Config, *, preset: str | None = None, overwrite: bool = False
) -> pathlib.Path:
    """Makes a run folder and writes its ``config.toml``.

    Args:
      folder: to be made; an empty one will do.
      config: what is going to run.
      preset: its name, where the configuration is a preset as it stands.
      overwrite: whether an earlier run there is replaced. Only what a run writes is deleted.

    Returns:
      The folder.

    Raises:
      ConfigError: the folder holds a run and ``overwrite`` is false, or something else, which is never deleted.

    Example:
      >>> import tempfile
      >>> from fedhyper_jax.shell.config import RunConfig
      >>> with tempfile.TemporaryDirectory() as parent:
      ...     sorted(path.name for path in prepare_folder(parent + "/new", RunConfig()).iterdir())
      ['config.toml']
    """
    folder = pathlib.Path(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; choose another folder with --out")
        if folder.is_dir() and any(folder.iterdir()):
            if read_notes(folder) is None:
                raise ConfigError(
                    f"{folder} is not empty and not a run folder (no {CONFIG} of fedhyper in it), so nothing in it is "
                    "touched; choose another folder with --out"
                )
            if not overwrite:
                raise ConfigError(f"{folder} holds a run already; choose another folder with --out, or add --overwrite")
            for name in (METRICS, SUMMARY, PARAMETERS, PLOTS, TIMING, CHECKPOINTS):
                _remove(folder / name)
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / CONFIG, to_toml(config, preset=preset))
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another folder with --out") from error
    return folder


def _remove(path: pathlib.Path) -> None:
    """Removes a file, a link or a folder; what cannot be removed is an error before the run, not after it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_notes(folder: str | os.PathLike[str]) -> dict[str, str] | None:
    """Command and preset in the ``config.toml`` of a run folder; None for any other folder.

    Read without the strict check of keys, so that folders of other versions are recognised too.
    """
    import tomllib

    try:
        table = tomllib.loads((pathlib.Path(folder) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return None
    command = table.get("command")
    is_run_folder = isinstance(command, str) and command in COMMANDS
    return {note: table[note] for note in _NOTES if note in table} if is_run_folder else None


def plain(value: Any) -> Any:
    """A number as JSON has it: None for NaN and infinities, and for float32 the shortest decimals that give it back.

    Example:
      >>> plain(np.float32(0.1)), plain(np.float64("nan")), plain(np.int32(3))
      (0.1, None, 3)
    """
    if not isinstance(value, np.generic | float | int) or isinstance(value, bool):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if not math.isfinite(value):
        return None
    return float(str(value)) if isinstance(value, np.generic) else value


def history_records(history: History, **labels: Any) -> list[Record]:
    """One record a round of a `History` without other leading axes.

    Args:
      history: of some rounds of one run, as NumPy arrays.
      **labels: go into each record, first.

    Returns:
      Per round the columns of `History.columns`, without the ``test_`` of what was evaluated (so ``accuracy``, ``loss``
      and ``client_accuracy_*``), and None where they are not finite.
    """
    columns = history.columns()
    names = [name.removeprefix("test_") if name in history.evaluation else name for name in columns]
    return [
        labels | {name: plain(value) for name, value in zip(names, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]


def share(part: int, whole: int) -> float | None:
    """The share of some in all; None of nothing."""
    return part / whole if whole else None


def append_records(folder: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Appends records to ``metrics.jsonl`` in one write that has reached the disk when this returns.

    Unbuffered, so that it is one write indeed and several processes may append to one file.
    """
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    with open(pathlib.Path(folder) / METRICS, "ab", buffering=0) as file:
        file.write(lines.encode())
        os.fsync(file.fileno())


def join_records(folder: str | os.PathLike[str], methods: Sequence[str]) -> None:
    """Makes ``metrics.jsonl`` of what a comparison recorded of each method: run after run, in the order of the grid.

    The order within a method is by initial local rate and seed as they first appear, whatever the chunks were.
    """
    place: dict[Any, int] = {}

    def position(record: Record) -> tuple[int, int]:
        cell = (record["initial_local_rate"], record["seed"])
        return methods.index(record["method"]), place.setdefault(cell, len(place))

    records = sorted(read_records(folder), key=position)  # sorting is stable
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    _replace(pathlib.Path(folder) / METRICS, text)


def _metrics_text(folder: pathlib.Path) -> str:
    """The records of a run; of a comparison that is not finished, those of its methods one after the other."""
    if (folder / METRICS).exists():
        return (folder / METRICS).read_text(encoding="utf-8")
    parts = [path.read_text(encoding="utf-8") for path in sorted((folder / CHECKPOINTS).glob(f"*/{METRICS}"))]
    return "".join(part[: part.rfind("\n") + 1] for part in parts)


def read_records(folder: str | os.PathLike[str]) -> list[Record]:
    """The records of a run folder; a last line that a killed run left half written is dropped.

    Raises:
      ConfigError: not a run folder, no record in it, or a line in its midst that is not JSON.
    """
    folder = pathlib.Path(folder)
    if read_notes(folder) is None:
        raise ConfigError(f"{folder} is not a run folder: it has no {CONFIG} written by fedhyper")
    try:
        lines = _metrics_text(folder).split("\n")
    except OSError:
        lines = []
    except UnicodeDecodeError as error:
        raise ConfigError(f"{folder / METRICS} is damaged: {error}") from None
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is empty or half a record
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{folder / METRICS} is damaged in line {number}: {error}") from None
        needed = (
            ("round", "initial_local_rate", "seed") if isinstance(record, dict) and "method" in record else ("round",)
        )
        if not isinstance(record, dict) or any(name not in record for name in needed):
            raise ConfigError(f"{folder / METRICS} is damaged in line {number}: not a record of a round")
        records.append(record)
    if not records:
        raise ConfigError(f"{folder} has no records yet: not one chunk of its rounds was done")
    return records


def group_records(records: list[Record]) -> dict[tuple[str, float], dict[int, list[Record]]]:
    """Records of a comparison by (method, initial local rate), then by seed, in the order they were written."""
    groups: dict[tuple[str, float], dict[int, list[Record]]] = {}
    for record in records:
        cell = groups.setdefault((record["method"], record["initial_local_rate"]), {})
        cell.setdefault(record["seed"], []).append(record)
    return groups


def write_summary(folder: str | os.PathLike[str], summary: dict[str, Any]) -> None:
    """Writes ``summary.json`` as a whole or not at all."""
    _replace(pathlib.Path(folder) / SUMMARY, json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_summary(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The summary of a run folder; empty where there is none that can be read."""
    try:
        summary = json.loads((pathlib.Path(folder) / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def environment() -> dict[str, Any]:
    """Versions and devices that a result depends on."""
    import fedhyper_jax

    devices = jax.devices()
    return {
        "fedhyper_jax": fedhyper_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})",
    }


def column(records: Sequence[Record], name: str) -> np.ndarray:
    """One field of records as float64, NaN for None."""
    return np.array([math.nan if record.get(name) is None else record[name] for record in records], float)


def _replace(path: pathlib.Path, text: str) -> None:
    with written_whole(path) as file:
        file.write(text)
