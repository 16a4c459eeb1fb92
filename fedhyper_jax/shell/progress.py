"""The progress bar of long work: rounds done, rounds a second, time left."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedhyper_jax.engine import Progress as RoundsDone


class ProgressBar:
    """A bar on standard error, and the clock of the work; a callback for `simulation.run` and `sweep`.

    Work has parts, and several may be one compiled program. The first chunk of a program compiles; neither the speed
    shown nor the steady seconds count it.

    Args:
      total_rounds: over all parts.
      programs: how many compiled programs there will be.
      quiet: show nothing, keep time only.
      unit: what a round of the work is called.

    Example:
      >>> with ProgressBar(total_rounds=10, programs=1, quiet=True) as bar:
      ...     bar.start_part("fedavg")
      >>> bar.steady_rounds
      0
    """

    def __init__(self, *, total_rounds: int, programs: int, quiet: bool, unit: str = "rounds"):
        self.total_rounds: int = total_rounds
        self.programs: int = programs
        self.unit: str = unit
        self.rounds_done: int = 0
        self.steady_rounds: int = 0
        self.first_chunk_seconds: float = 0.0
        self.steady_seconds: float = 0.0
        self._program = ""
        self._compiled: set[str] = set()
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

    def start_part(self, description: str, rounds_done: int = 0, *, program: str | None = None) -> None:
        """Says that the next part begins.

        Args:
          description: what it is called.
          rounds_done: how many of its rounds an earlier process did.
          program: name of the program that it shares with other parts; one of its own if None.
        """
        self.rounds_done += rounds_done
        self._program = description if program is None else program
        speed = self._speed() if self._program in self._compiled else "compiling"
        self._bar.update(self._task, description=description, completed=self.rounds_done, speed=speed)

    def compiled(self, program: str, seconds: float) -> None:
        """Takes note that a program is compiled before its first chunk, and what that took."""
        self._compiled.add(program)
        self.first_chunk_seconds += seconds

    def describe(self, description: str) -> None:
        """Says what the part is doing now."""
        self._bar.update(self._task, description=description)

    def __call__(self, done: RoundsDone) -> None:
        """Takes note of a chunk of rounds."""
        rounds = done.rounds_done - done.first_round
        self.rounds_done += rounds
        if self._program not in self._compiled:
            self._compiled.add(self._program)
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
        compiled = len(self._compiled)
        to_compile = self.first_chunk_seconds / compiled * (self.programs - compiled)
        minutes, seconds = divmod(round(left / speed + to_compile), 60)
        return f"{speed:.3g} {self.unit}/s, ETA {minutes}:{seconds:02d}"


def chunk_length(rounds: int, longest: int = 10) -> int:
    """Rounds per compiled call: a divisor of ``rounds`` if a fair one exists, so that chunks are alike.

    Example:
      >>> chunk_length(60), chunk_length(64), chunk_length(53), chunk_length(3)
      (10, 8, 10, 1)
    """
    fair = [length for length in range(1, longest + 1) if rounds % length == 0 and rounds > length]
    return max(fair) if fair and (max(fair) >= longest // 2 or rounds <= longest) else min(longest, rounds)
