"""What a run observed: the numbers of its rounds, as trees and as columns."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool

from fedhyper_jax import _repr
from fedhyper_jax.base import SHARES, TOLD, RoundInfo


class History(NamedTuple):
    """Observations of a run; every leaf has a leading axis of rounds, after those of the runs of a sweep.

    Attributes:
      info: what the rounds observed of themselves.
      evaluation: by name, what was evaluated of the parameters after the round; NaN where not evaluated.
      evaluated: whether the parameters after the round were evaluated.
    """

    info: RoundInfo
    evaluation: dict[str, Array]
    evaluated: Bool[Array, " rounds"]

    def __repr__(self) -> str:
        axes = _repr.shape(self.info.round)
        told, evaluated = dict(self.evaluation), _repr.known(self.evaluated)
        if evaluated is not None and axes:  # (the same rounds in all runs)
            rounds = np.flatnonzero(evaluated.reshape(-1, axes[-1]).any(axis=0))
            told = {name: values[..., rounds] for name, values in told.items() if _repr.shape(values) == axes}
        told = {**told, **{name: getattr(self.info, name) for name in TOLD}}
        return _repr.over_rounds(f"History: {_repr.runs(axes[:-1])}{axes[-1] if axes else '?'} rounds", told)

    def columns(self) -> dict[str, np.ndarray]:
        r"""One row a round: 1-D arrays by name, as ``pandas.DataFrame(history.columns())`` and ``csv`` take them.

        First ``round`` (from 0), then what was evaluated (NaN where it was not), then every other number of
        `RoundInfo` and the shares that records have. Of a sweep the rows are those of run after run, and two more
        columns say whose: ``setting`` and ``seed``, by their numbers. Runs under one ``vmap`` have one, ``run``.

        Returns:
          By name an array (rows,).

        Raises:
          ValueError: leading axes of more kinds, or a metric that is called like another column.

        Example:
          >>> import csv, sys
          >>> import jax, numpy as np
          >>> from fedhyper_jax.methods import fedavg
          >>> from fedhyper_jax.data import local_steps, pack
          >>> from fedhyper_jax.engine.simulation import simulate
          >>> data = pack({"x": np.array([1.0, 3.0])}, [[0], [1]])
          >>> algorithm = fedavg(lambda w, b: (w - b["x"]) ** 2 / 2, work=local_steps(1, 1), local_rate=0.5)
          >>> _, history = simulate(algorithm, jax.random.key(0), algorithm.init(0.0), data, rounds=2, cohort_size=2)
          >>> columns = history.columns()
          >>> some = {name: columns[name].tolist() for name in ("round", "client_loss", "participants")}
          >>> writer = csv.writer(sys.stdout, lineterminator="\n")
          >>> _ = writer.writerow(some), writer.writerows(zip(*some.values()))
          round,client_loss,participants
          0,2.5,2
          1,1.0,2
        """
        numbers = {name: np.asarray(values) for name, values in self.info._asdict().items()}
        for share, (part, whole) in SHARES.items():
            total = numbers[whole]
            numbers[share] = np.where(total > 0, numbers[part] / np.maximum(total, 1), np.nan)
        rounds = numbers.pop("round")
        *axes, _ = rounds.shape
        names = {0: (), 1: ("run",), 2: ("setting", "seed")}.get(len(axes))
        if names is None:
            raise ValueError(f"columns takes histories with at most two axes before rounds, got shape {rounds.shape}")
        whose = dict(zip(names, np.indices(rounds.shape)[: len(axes)], strict=True))
        taken = sorted(set(self.evaluation) & {*whose, "round", *numbers})
        if taken:
            raise ValueError(f"the metric {taken[0]!r} is called like a column of every history; call it otherwise")
        columns = {**whose, "round": rounds, **self.evaluation, **numbers}
        return {name: np.asarray(values).reshape(-1) for name, values in columns.items()}

    def with_gaps(self, where: Callable) -> "History":
        """NaN where not evaluated, for `_missing` is not while ``jax_debug_nans`` looks for NaN."""
        with jax.debug_nans(False):
            values = {name: where(self.evaluated, value, np.nan) for name, value in self.evaluation.items()}
        return self._replace(evaluation=values)
