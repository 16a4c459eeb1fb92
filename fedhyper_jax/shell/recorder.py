"""Files that are written while rounds run: records, checkpoints, and how long it took; how Ctrl-C ends a run."""

import hashlib
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from fedhyper_jax.engine import History, Progress
from fedhyper_jax.shell.checkpoint_file import write_checkpoint
from fedhyper_jax.shell.config import Config, ConfigError
from fedhyper_jax.shell.progress import chunk_length
from fedhyper_jax.shell.records import TIMING, Record, append_records
from fedhyper_jax.shell.resume import Place

KEPT = 2
"""Checkpoints that stay: should the newest be damaged, there is the one before it."""

_ONE_AND_THE_SAME = 1.0
"""Seconds within which interrupts count once: a terminal and `launch` may both pass the same one on."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after a checkpoint was written."""


class Stop:
    """Makes the first Ctrl-C a request that is granted after the rounds under way; a second one acts at once.

    Args:
      enabled: False leaves Ctrl-C as it is.
      notify: called at the request.
    """

    def __init__(self, *, enabled: bool = True, notify: Callable[[], Any] = lambda: None):
        # only the main thread of a program may say what a signal does
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._notify = notify
        self._when: float | None = None

    @property
    def asked(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._when is not None

    def __enter__(self) -> "Stop":
        if self._enabled:
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._enabled:
            signal.signal(signal.SIGINT, self._before)

    def _request(self, number, frame) -> None:
        if not self.asked:
            self._when = time.monotonic()
            self._notify()
        elif time.monotonic() - self._when > _ONE_AND_THE_SAME:
            raise KeyboardInterrupt


class Recorder:
    """Writes records after each chunk of rounds, and a checkpoint now and then; a callback of `run` and `sweep`.

    Args:
      place: where to.
      records: ``records(history)`` are the records of a chunk.
      every: rounds from one checkpoint to the next, and after the last; 0 writes none.
      notes: what each checkpoint says besides its round and its records.
      stop: may ask for an end.

    Raises:
      Interrupted: from the call, where `stop` asked for it and the checkpoint is written.
    """

    def __init__(
        self,
        place: Place,
        records: Callable[[History], list[Record]],
        *,
        every: int,
        notes: dict[str, Any],
        stop: Stop,
    ):
        self.place: Place = place
        self.every: int = every
        self.notes: dict[str, Any] = notes
        self.stop: Stop = stop
        self._records = records
        self._bytes, self._digest = 0, hashlib.sha256()

    def __call__(self, done: Progress) -> None:
        """Takes note of a chunk of rounds."""
        append_records(self.place.metrics.parent, self._records(done.history))
        if not self.every:
            return
        due = done.first_round // self.every < done.rounds_done // self.every
        if due or self.stop.asked or done.rounds_done == done.total_rounds:
            self._save(done)
        if self.stop.asked and done.rounds_done < done.total_rounds:
            raise Interrupted(f"{done.rounds_done} of {done.total_rounds} rounds are done and saved")

    def _save(self, done: Progress) -> None:
        with open(self.place.metrics, "rb") as file:
            file.seek(self._bytes)
            added = file.read()
        self._bytes += len(added)
        self._digest.update(added)
        records = {"bytes": self._bytes, "sha256": self._digest.hexdigest()}
        notes = {"rounds_done": done.rounds_done, "total_rounds": done.total_rounds, "records": records, **self.notes}
        write_checkpoint(self.place.path(done.rounds_done), done.state, notes)
        for path in self.place.paths()[KEPT:]:
            path.unlink()


def append_timing(folder: str | os.PathLike[str], done: Progress, **labels: Any) -> None:
    """Adds a line to ``timing.jsonl``: which rounds a chunk was, and the seconds that it took.

    They stand apart from the records, so that a run leaves the same records however fast it was.
    """
    record = {**labels, "first_round": done.first_round, "rounds_done": done.rounds_done, "seconds": done.seconds}
    with open(pathlib.Path(folder) / TIMING, "ab", buffering=0) as file:
        file.write(json.dumps(record).encode() + b"\n")


def rounds_per_chunk(config: Config) -> int:
    """Rounds of a compiled call; no more than from one checkpoint to the next.

    Raises:
      ConfigError: ``checkpoint_every`` below 0.
    """
    every = config.run.checkpoint_every
    if every < 0:
        raise ConfigError(f"checkpoint_every must be a number of rounds, or 0 for none, got {every}")
    return chunk_length(config.run.rounds, min(10, every) if every else 10)
