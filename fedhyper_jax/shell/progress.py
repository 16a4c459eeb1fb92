"""The progress bar of long work: rounds done, rounds a second, time left."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedhyper_jax.engine import Progress as RoundsDone


class ProgressBar:
    """A bar on standard error, and the clock of the work; a callback for `simulation.run` and `sweep`.

    Work has parts, one a compiled program. The first chunk of a part compiles; neither the speed shown nor the steady
    seconds count it.

    Args:
      total_rounds: over all parts.
      parts: how many compiled programs there will be.
      quiet: show nothing, keep time only.
      unit: what a round of the work is called.

    Example:
      >>> with ProgressBar(total_rounds=10, parts=1, quiet=True) as bar:
      ...     bar.start_part("fedavg")
      >>> bar.steady_rounds
      0
    """

    def __init__(self, *, total_rounds: int, parts: int, quiet: bool, unit: str = "rounds"):
        self.total_rounds, self.parts, self.unit = total_rounds, parts, unit
        self.rounds_done = self.parts_started = self.steady_rounds = 0
        self.first_chunk_seconds, self.steady_seconds = 0.0, 0.0
        self._compiles = True  # the next chunk does
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._task = self._bar.add_task("", total=total_rounds, speed="")

    def __enter__(self) -> "ProgressBar":
        self._start = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._bar.update(self._task, description="done", speed=self._speed())
        self._bar.stop()

    @property
    def elapsed(self) -> float:
        """Seconds since the bar was entered."""
        return time.perf_counter() - self._start

    def start_part(self, description: str, rounds_done: int = 0) -> None:
        """Says that the next compiled program begins, and how many of its rounds an earlier process did."""
        self.parts_started += 1
        self.rounds_done += rounds_done
        self._compiles = True
        self._bar.update(self._task, description=description, completed=self.rounds_done, speed="compiling")

    def describe(self, description: str) -> None:
        """Says what the part is doing now."""
        self._bar.update(self._task, description=description)

    def __call__(self, done: RoundsDone) -> None:
        """Takes note of a chunk of rounds."""
        rounds = done.rounds_done - done.first_round
        self.rounds_done += rounds
        if self._compiles:
            self._compiles = False
            self.first_chunk_seconds += done.seconds
        else:
            self.steady_seconds += done.seconds
            self.steady_rounds += rounds
        self._bar.update(self._task, completed=self.rounds_done, speed=self._speed())

    @property
    def rounds_per_second(self) -> float | None:
        """Speed without compilation; None before it is known."""
        return self.steady_rounds / self.steady_seconds if self.steady_rounds else None

    def _speed(self) -> str:
        speed = self.rounds_per_second
        if speed is None:
            return "measuring"
        left = self.total_rounds - self.rounds_done
        if not left:
            return f"{speed:.3g} {self.unit}/s"
        compiling = self.first_chunk_seconds / self.parts_started * (self.parts - self.parts_started)
        minutes, seconds = divmod(round(left / speed + compiling), 60)
        return f"{speed:.3g} {self.unit}/s, ETA {minutes}:{seconds:02d}"


def chunk_length(rounds: int, longest: int = 10) -> int:
    """Rounds per compiled call: a divisor of ``rounds`` if a fair one exists, so that no last chunk compiles anew.

    Example:
      >>> chunk_length(60), chunk_length(64), chunk_length(53), chunk_length(3)
      (10, 8, 10, 1)
    """
    fair = [length for length in range(1, longest + 1) if rounds % length == 0 and rounds > length]
    return max(fair) if fair and (max(fair) >= longest // 2 or rounds <= longest) else min(longest, rounds)
