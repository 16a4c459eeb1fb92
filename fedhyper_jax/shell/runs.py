"""Run folders read back: the configuration, the model, its parameters and what was recorded."""

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from fedhyper_jax.base import Model, Params
from fedhyper_jax.shell.checkpoint import load_parameters
from fedhyper_jax.shell.config import CompareConfig, Config, ConfigError, load_config
from fedhyper_jax.shell.records import CONFIG, PARAMETERS, Record, column, group_records, read_records, read_summary
from fedhyper_jax.shell.tasks import make_model

History = dict[str, np.ndarray]
"""Arrays over rounds by the names of ``metrics.jsonl``, as float64; NaN where nothing was measured."""


class Run(NamedTuple):
    """A run folder, read back by `load_run`.

    Attributes:
      config: of the command that made the folder.
      model: the model, ready to be applied.
      params: its final parameters; None of a comparison, which keeps none, and of a run that is not finished.
      history: arrays over the rounds so far, by name; of a comparison a dict of these by (method, initial local rate,
        seed).
      summary: ``summary.json``; its ``status`` is "finished" or "unfinished".
    """

    config: Config
    model: Model
    params: Params | None
    history: History | dict[tuple[str, float, int], History]
    summary: dict[str, Any]

    def __repr__(self) -> str:
        compared = isinstance(self.config, CompareConfig)
        methods = self.config.compare.methods if compared else [self.config.method.name]
        first = next(iter(self.history.values())) if compared else self.history
        runs = f"{len(self.history)} runs of " if compared else ""
        return (
            f"<Run: {', '.join(methods)} on {self.config.data.name}, {runs}{len(first['round'])} rounds, "
            f"{self.summary.get('status', 'unfinished')}>"
        )


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Reads a run folder of `fedhyper run` or `fedhyper compare`, finished or not.

    Args:
      folder: the run folder.

    Returns:
      A `Run`: configuration, model, parameters, history and summary.

    Raises:
      ValueError: not a run folder, one without a single record, or a damaged one; a `ConfigError` of one line.

    Example:
      >>> import tempfile
      >>> import fedhyper_jax as fh
      >>> from fedhyper_jax.shell.config import DataConfig, MethodConfig, ModelConfig, RunConfig, SimulationConfig
      >>> from fedhyper_jax.shell.train import train
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     settings = SimulationConfig(rounds=2, strategy="sequential", out=folder)
      ...     method, model = MethodConfig(name="G"), ModelConfig(name="logistic")
      ...     data = DataConfig(evaluate_clients=False)
      ...     summary = train(RunConfig(data=data, model=model, method=method, run=settings))
      ...     run = fh.load_run(folder)
      >>> run
      <Run: G on digits, 2 rounds, finished>
      >>> run.history["accuracy"].shape
      (2,)
      >>> run.model.apply(run.params, np.zeros((5, 8, 8, 1), np.float32)).shape
      (5, 10)
    """
    folder = pathlib.Path(folder)
    records = read_records(folder)  # (refuses what is no run folder)
    config = load_config(folder / CONFIG)
    try:
        summary = read_summary(folder)
        model = make_model(config.model, summary["num_outputs"])
    except KeyError as error:
        raise ConfigError(f"{folder} has no readable summary.json: {error} is missing") from error
    if isinstance(config, CompareConfig):
        history = {
            (method, rate, seed): _history(run)
            for (method, rate), runs in group_records(records).items()
            for seed, run in runs.items()
        }
    else:
        history = _history(records)
    finished = summary.get("status") == "finished" and (folder / PARAMETERS).is_dir()
    return Run(config, model, load_parameters(folder) if finished else None, history, summary)


_LABELS = ("method", "initial_local_rate", "seed")


def _history(records: list[Record]) -> History:
    names = dict.fromkeys(name for record in records for name in record if name not in _LABELS)
    return {name: column(records, name) for name in names}
