"""Several methods from several initial local rates with several seeds; what `fedhyper compare` does."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from fedhyper_jax.config import CompareConfig
from fedhyper_jax.experiment import Experiment, build_experiment
from fedhyper_jax.plots import plot_folder
from fedhyper_jax.progress import ProgressBar, chunk_length
from fedhyper_jax.records import (
    Record,
    append_records,
    environment,
    group_records,
    history_records,
    prepare_folder,
    read_records,
    write_summary,
)
from fedhyper_jax.report import summarise_cells, summarise_records
from fedhyper_jax.simulation import Progress
from fedhyper_jax.sweep import sweep


def compare(
    config: CompareConfig, *, preset: str | None = None, overwrite: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """Runs every method from every initial local rate with every seed, and leaves a run folder behind.

    All rates and seeds of a method are one compiled program, see `sweep`.

    Args:
      config: what to compare.
      preset: name of the preset that it is, unchanged.
      overwrite: whether an earlier run in the folder is replaced.
      quiet: no progress bar.

    Returns:
      The summary, as in ``summary.json``: what was run, and ``cells``, see `summarise_cells`.

    Raises:
      ConfigError: a configuration that cannot be used, or a folder that is not to be touched.

    Example:
      >>> import tempfile
      >>> from fedhyper_jax.config import GridConfig, RunSettings
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     grid = GridConfig(methods=("fedavg", "G"), local_rates=(0.1,), seeds=1)
      ...     summary = compare(CompareConfig(compare=grid, run=RunSettings(rounds=3, out=folder)))
      >>> [cell["method"] for cell in summary["cells"]]
      ['fedavg', 'G']
    """
    start = time.perf_counter()
    experiment = build_experiment(config)
    folder = prepare_folder(config.folder, config, preset=preset, overwrite=overwrite)
    grid, rounds = config.compare, config.run.rounds
    origin = {
        "command": "compare",
        "methods": list(grid.methods),
        "local_rates": list(grid.local_rates),
        "seeds": list(grid.seed_list),
        "rounds": rounds,
        "target_accuracy": config.run.target_accuracy,
        "data": experiment.dataset.name,
        "data_source": experiment.dataset.source,
        "num_classes": experiment.dataset.num_classes,
        "partition_digest": experiment.partition.digest,
        "environment": environment(),
    }
    write_summary(folder, {"status": "unfinished", **origin})
    with ProgressBar(total_rounds=rounds * len(grid.methods), parts=len(grid.methods), quiet=quiet) as bar:
        for method in grid.methods:
            bar.start_part(method)
            _sweep_method(method, config, experiment, folder, bar)
    plot_folder(folder)
    cells = summarise_comparison(read_records(folder), config, experiment.dataset.num_classes)
    summary = {
        "status": "finished",
        "cells": cells,
        "seconds": {
            "total": time.perf_counter() - start,
            "first_chunks_with_compilation": bar.first_chunk_seconds,
            "steady": bar.steady_seconds,
            "steady_rounds_per_second": bar.rounds_per_second,
            "runs_at_once": len(grid.local_rates) * len(grid.seed_list),
        },
        **origin,
    }
    write_summary(folder, summary)
    return summary


def _sweep_method(method: str, config: CompareConfig, experiment: Experiment, folder, bar: ProgressBar) -> None:
    grid = config.compare
    starts = [experiment.start(seed) for seed in grid.seed_list]

    def record(done: Progress) -> None:
        runs, records = len(grid.local_rates) * len(grid.seed_list), []
        for i, local_rate in enumerate(grid.local_rates):
            for j, seed in enumerate(grid.seed_list):
                history = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], done.history)
                labels = {"method": method, "initial_local_rate": local_rate, "seed": seed}
                # the runs share the chunk's time: seconds over all records add up to it
                records += history_records(history, done.seconds / runs, **labels)
        append_records(folder, records)

    sweep(
        lambda local_rate: experiment.make_algorithm(method, local_rate),
        {"local_rate": jnp.asarray(grid.local_rates)},
        jnp.stack([key for _, key in starts]),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *[params for params, _ in starts]),
        experiment.data,
        rounds=config.run.rounds,
        rounds_per_chunk=chunk_length(config.run.rounds),
        cohort_size=config.run.cohort_size,
        evaluate=experiment.evaluate,
        evaluation_data=experiment.evaluation_data,
        eval_every=config.run.eval_every,
        callbacks=[record, bar],
    )


def summarise_comparison(records: list[Record], config: CompareConfig, num_classes: int) -> list[dict[str, Any]]:
    """The summaries of all cells from the records alone."""
    target = config.run.target_accuracy
    cells = {
        cell: [summarise_records(run, target, num_classes) for run in runs.values()]
        for cell, runs in group_records(records).items()
    }
    return summarise_cells(cells, config.run.rounds)
