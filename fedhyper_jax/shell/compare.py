"""Several methods from several initial local rates with several seeds; what `fedhyper compare` does."""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedhyper_jax.engine import Progress, place, sweep, wait_for_all
from fedhyper_jax.shell.cache import cache_use
from fedhyper_jax.shell.config import CompareConfig, ConfigError, GridConfig
from fedhyper_jax.shell.experiment import Experiment, build_experiment
from fedhyper_jax.shell.plots import plot_folder
from fedhyper_jax.shell.progress import ProgressBar, chunk_length
from fedhyper_jax.shell.records import (
    Record,
    append_records,
    environment,
    group_records,
    history_records,
    order_records,
    prepare_folder,
    read_records,
    write_summary,
)
from fedhyper_jax.shell.report import summarise_cells, summarise_records
from fedhyper_jax.shell.strategy import choose_strategy
from fedhyper_jax.tasks import Measure


def compare(
    config: CompareConfig, *, preset: str | None = None, overwrite: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """Runs every method from every initial local rate with every seed, and leaves a run folder behind.

    All rates and seeds of a method are one compiled program, see `sweep`. Several processes share the methods out; the
    first one draws and sums up.

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
      >>> from fedhyper_jax.shell.config import GridConfig, RunSettings
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     grid = GridConfig(methods=("fedavg", "G"), local_rates=(0.1,), seeds=1)
      ...     settings = RunSettings(rounds=3, strategy="sequential", out=folder)
      ...     summary = compare(CompareConfig(compare=grid, run=settings))
      >>> [cell["method"] for cell in summary["cells"]]
      ['fedavg', 'G']
    """
    start = time.perf_counter()
    if jax.process_count() > 1 and str(config.run.strategy).startswith("sharded"):
        raise ConfigError(
            f"strategy {config.run.strategy!r} divides a cohort between processes, but those of a comparison "
            "share out its methods; leave 'sharded' away, or give --processes 1"
        )
    experiment = build_experiment(config)
    first = jax.process_index() == 0
    folder = pathlib.Path(config.folder)
    if first:
        prepare_folder(folder, config, preset=preset, overwrite=overwrite)
    grid, rounds = config.compare, config.run.rounds
    own_methods = grid.methods[jax.process_index() :: jax.process_count()]
    origin = {
        "command": "compare",
        "methods": list(grid.methods),
        "local_rates": list(grid.local_rates),
        "seeds": list(grid.seed_list),
        "rounds": rounds,
        **experiment.facts,
        "environment": environment(),
    }
    if first:
        write_summary(folder, {"status": "unfinished", **origin})
    wait_for_all("the folder is there")
    total, quiet = rounds * len(own_methods), quiet or not first
    with ProgressBar(total_rounds=total, parts=len(own_methods), quiet=quiet) as bar:
        bar.describe("choosing a strategy")

        def one_round(strategy: str):
            return functools.partial(_sweep_method(grid.methods[0], config, experiment, strategy), rounds=1)

        # Processes share out the methods; the devices of one alone share its cohorts.
        devices = jax.device_count() if jax.process_count() == 1 else 1
        strategy, choice = choose_strategy(config, one_round, rounds=rounds * len(own_methods), devices=devices)
        for method in own_methods:
            bar.start_part(method)
            record = functools.partial(_record, method, grid, folder)
            _sweep_method(method, config, experiment, strategy)(
                rounds=rounds, rounds_per_chunk=chunk_length(rounds), callbacks=[record, bar]
            )
        bar.describe("waiting for the other processes")
        wait_for_all("all methods are done")
    if not first:
        return {"status": "finished", **origin}
    if jax.process_count() > 1:
        order_records(folder, grid.methods)
    plot_folder(folder)
    cells = summarise_comparison(read_records(folder), config, experiment.task.measure)
    summary = {
        "status": "finished",
        "cells": cells,
        "strategy": choice,
        "processes": jax.process_count(),
        "compilation_cache": cache_use(),
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


def _sweep_method(method: str, config: CompareConfig, experiment: Experiment, strategy: str) -> Callable:
    """``run(rounds=…, …)`` of a method from all initial local rates with all seeds."""
    grid = config.compare
    starts = [experiment.start(seed) for seed in grid.seed_list]
    return functools.partial(
        sweep,
        lambda local_rate: experiment.make_algorithm(method, local_rate, strategy=strategy),
        {"local_rate": jnp.asarray(grid.local_rates)},
        jnp.stack([key for _, key in starts]),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *[params for params, _ in starts]),
        place(strategy, experiment.task.data),
        cohort_size=config.run.cohort_size,
        evaluate=experiment.evaluate,
        evaluation_data=place(strategy, experiment.evaluation_data),
        eval_every=config.run.eval_every,
        participation=experiment.participation,
    )


def _record(method: str, grid: GridConfig, folder: pathlib.Path, done: Progress) -> None:
    runs, records = len(grid.local_rates) * len(grid.seed_list), []
    for i, local_rate in enumerate(grid.local_rates):
        for j, seed in enumerate(grid.seed_list):
            history = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], done.history)
            labels = {"method": method, "initial_local_rate": local_rate, "seed": seed}
            # the runs share the chunk's time: seconds over all records add up to it
            records += history_records(history, done.seconds / runs, **labels)
    append_records(folder, records)


def summarise_comparison(records: list[Record], config: CompareConfig, measure: Measure) -> list[dict[str, Any]]:
    """The summaries of all cells from the records alone."""
    cells = {
        cell: [summarise_records(run, measure) for run in runs.values()]
        for cell, runs in group_records(records).items()
    }
    return summarise_cells(cells, config.run.rounds, measure)
