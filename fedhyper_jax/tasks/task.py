"""A task: what is learned and how it is measured."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array

from fedhyper_jax.base import Examples, LossFunction, Model
from fedhyper_jax.tasks.metrics import MetricsFunction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """The metric that a task reports first: its direction, what guessing achieves, and what counts as reached.

    Attributes:
      name: of the metric, as the task's metrics function calls it.
      higher_is_better: its direction; where it is False, 0 is perfect, else 1.
      guessing: value of the best guess that knows nothing of the inputs.
      guessing_loss: loss of that guess.
      target: value whose rounds are counted.
      unit: for people; "%" shows the hundredfold.

    Raises:
      ValueError: a target that cannot be reached.

    Example:
      >>> accuracy = accuracy_of_classes(10)
      >>> accuracy.state(final=0.12, best=0.9, loss=9.0), accuracy.state(final=0.9, best=0.9, loss=0.3)
      ('diverged', 'ok')
    """

    name: str
    higher_is_better: bool
    guessing: float
    guessing_loss: float
    target: float
    unit: str = ""

    def __post_init__(self) -> None:
        if self.higher_is_better and not 0 < self.target <= 1:
            raise ValueError(f"target must lie in (0, 1] for the {self.title}, got {self.target!r}; 0.8 is 80 %")
        if not (math.isfinite(self.target) and self.target > 0):
            raise ValueError(
                f"target must be finite and > 0 for the {self.title}, got {self.target!r}; guessing has "
                f"{self.guessing:.3g}"
            )

    @property
    def title(self) -> str:
        """The name as people write it."""
        return self.name.replace("_", " ")

    def with_target(self, target: float) -> "Measure":
        """The same measure with another target."""
        return dataclasses.replace(self, target=float(target))

    def best(self, values: Sequence[float]) -> float:
        """The best of some values."""
        return max(values) if self.higher_is_better else min(values)

    def state(self, *, final: float | None, best: float | None, loss: float | None) -> str:
        """How a run ended.

        Args:
          final: value at its end; None where it is not finite.
          best: best value that it ever had.
          loss: at its end; None where it is not finite.

        Returns:
          "near chance": less than 15 % of the way from guessing to perfection; "collapsed": it lost a quarter of what
          it once had (of the value, or of an error's distance from guessing); "diverged": either of these with a loss
          above twice that of guessing or not finite, or a final value that is not finite; else "ok".
        """
        if final is None or best is None:
            return "diverged"
        if self.higher_is_better:
            chance = final < self.guessing + 0.15 * (1 - self.guessing)
            collapsed = final < 0.75 * best
        else:
            chance = final > 0.85 * self.guessing
            collapsed = self.guessing - final < 0.75 * (self.guessing - best)
        if (chance or collapsed) and (loss is None or loss > 2 * self.guessing_loss):
            return "diverged"
        return "near chance" if chance else "collapsed" if collapsed else "ok"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """All that a run needs but the method: data, model, loss, metrics, and what chance achieves.

    Attributes:
      name: of what is learned, such as "classification".
      data: the federated training data (`ClientData`).
      test: the server's test examples.
      inputs: one batch of inputs, of which only shape and dtype matter: for ``model.init``.
      model: the model.
      num_outputs: of the model, per example or per position.
      loss_fn: its loss.
      metrics_fn: its metrics, one value an example.
      measure: the metric that is reported first.
    """

    name: str
    data: Any
    test: Examples
    inputs: Array
    model: Model
    num_outputs: int
    loss_fn: LossFunction
    metrics_fn: MetricsFunction
    measure: Measure


def accuracy_of_classes(num_classes: int) -> Measure:
    """Accuracy among classes that are equally likely to a guesser.

    Example:
      >>> accuracy_of_classes(4).guessing
      0.25
    """
    return Measure(
        name="accuracy",
        higher_is_better=True,
        guessing=1 / num_classes,
        guessing_loss=math.log(num_classes),
        target=0.8,
        unit="%",
    )


def accuracy_of_symbols(symbols: np.ndarray, vocabulary: int) -> Measure:
    """Accuracy of the next symbol of texts: the guesser knows how often each occurs, and names the most frequent one.

    Args:
      symbols: integers below ``vocabulary``, of any shape; those to be predicted.
      vocabulary: number of symbols.

    Example:
      >>> measure = accuracy_of_symbols(np.array([[0, 0, 1, 2]]), 3)
      >>> measure.guessing, round(measure.guessing_loss, 3)
      (0.5, 1.04)
    """
    shares = np.bincount(np.asarray(symbols).ravel(), minlength=vocabulary) / np.size(symbols)
    seen = shares[shares > 0]
    return Measure(
        name="accuracy",
        higher_is_better=True,
        guessing=float(shares.max()),
        guessing_loss=float(-np.sum(seen * np.log(seen))),
        target=0.4,
        unit="%",
    )


def error_of_targets(train_targets: np.ndarray, test_targets: np.ndarray) -> Measure:
    """Mean squared error of numbers: the guesser names the mean of the training targets whatever the inputs.

    Args:
      train_targets: (examples, *shape).
      test_targets: (examples, *shape), on which the error is measured.

    Example:
      >>> measure = error_of_targets(np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]]))
      >>> measure.guessing, measure.guessing_loss, measure.higher_is_better
      (2.0, 1.0, False)
    """
    offsets = np.asarray(test_targets, float) - np.asarray(train_targets, float).mean(axis=0)
    guessing = float(np.mean(np.sum(np.square(offsets).reshape(len(offsets), -1), axis=1)))
    return Measure(
        name="squared_error",
        higher_is_better=False,
        guessing=guessing,
        guessing_loss=guessing / 2,
        target=0.6 * guessing,
    )
