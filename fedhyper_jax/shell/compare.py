"""Several methods from several initial local rates with several seeds; what `fedhyper compare` does."""

import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedhyper_jax.engine import History, sweep, sweep_shapes, wait_for_all
from fedhyper_jax.methods import Family
from fedhyper_jax.shell.algorithms import compared_families
from fedhyper_jax.shell.cache import cache_use
from fedhyper_jax.shell.checkpoint_file import Checkpoint
from fedhyper_jax.shell.config import CompareConfig, ConfigError, GridConfig
from fedhyper_jax.shell.experiment import Experiment, build_experiment, simulation_arguments
from fedhyper_jax.shell.plots import plot_folder
from fedhyper_jax.shell.progress import ProgressBar
from fedhyper_jax.shell.recorder import Recorder, Stop, append_timing, rounds_per_chunk
from fedhyper_jax.shell.records import (
    METRICS,
    Record,
    environment,
    group_records,
    history_records,
    join_records,
    read_records,
    write_summary,
)
from fedhyper_jax.shell.report import summarise_cells, summarise_records
from fedhyper_jax.shell.resume import (
    Place,
    clear,
    finished_summary,
    made_of,
    method_places,
    opened,
    recorded_strategy,
    restored,
)
from fedhyper_jax.shell.strategy import choose_strategy
from fedhyper_jax.tasks import Measure


def compare(
    config: CompareConfig,
    *,
    preset: str | None = None,
    overwrite: bool = False,
    quiet: bool = True,
    resume: bool = False,
) -> dict[str, Any]:
    """Runs every method from every initial local rate with every seed, and leaves a run folder behind.

    All rates and seeds of a method run side by side, see `sweep`. Methods that differ in hyper rates alone share one
    compiled program, see `method_families`. Several processes divide the methods between them; the first one draws and
    sums up.

    Args:
      config: what to compare.
      preset: name of the preset that it is, unchanged.
      overwrite: whether an earlier run in the folder is replaced.
      quiet: no progress bar.
      resume: go on from the last checkpoint of each method in the folder, in any number of processes. A finished
        comparison is left as it is.

    Returns:
      The summary, as in ``summary.json``: what was run, and ``cells``, see `summarise_cells`.

    Raises:
      ConfigError: a configuration that cannot be used, or a folder that is not to be touched or cannot be resumed.
      Interrupted: Ctrl-C, after a checkpoint.

    Example:
      >>> import tempfile
      >>> from fedhyper_jax.shell.config import DataConfig, GridConfig, ModelConfig, RunSettings
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     grid = GridConfig(methods=("fedavg", "G"), local_rates=(0.1,), seeds=1)
      ...     settings = RunSettings(rounds=3, strategy="sequential", out=folder)
      ...     model, data = ModelConfig(name="logistic"), DataConfig(evaluate_clients=False)
      ...     summary = compare(CompareConfig(data=data, model=model, compare=grid, run=settings))
      >>> [cell["method"] for cell in summary["cells"]]
      ['fedavg', 'G']
    """
    start = time.perf_counter()
    _check_strategy(config)
    finished = finished_summary(config.folder) if resume else None
    if finished is not None:
        return finished
    rounds_per_chunk(config)  # refuses
    experiment = build_experiment(config)
    folder, grid = pathlib.Path(config.folder), config.compare
    places = method_places(folder, grid.methods)
    known = made_of(config, (experiment.task.data, experiment.evaluation_data))
    first = jax.process_index() == 0
    origin = _origin(config, experiment)
    with opened(config, list(places.values()), known, preset=preset, overwrite=overwrite, resume=resume) as checkpoints:
        earlier = recorded_strategy(folder, checkpoints) if resume else None
        if first:
            (folder / METRICS).unlink(missing_ok=True)  # joined anew from those of the methods
            write_summary(folder, {"status": "unfinished", "strategy": earlier, **origin})
        from_where = dict(zip(places, checkpoints, strict=True))
        families = _own_families(compared_families(config))
        programs = functools.cache(functools.partial(_program, config, experiment))
        total_rounds = config.run.rounds * sum(len(family.hyper_rates) for family in families)
        with ProgressBar(total_rounds=total_rounds, programs=len(families), quiet=quiet or not first) as bar:
            choice = _choice(config, families, programs, bar) if earlier is None else earlier
            if first:
                write_summary(folder, {"status": "unfinished", "strategy": choice, **origin})
            notes = {"made_of": known, "strategy": choice}
            for family in families:
                for method in family.hyper_rates:
                    program = programs(family, choice["used"])
                    _method(method, program, config, places[method], from_where[method], notes, bar)
            bar.describe("waiting for the other processes")
            _wait_for_methods(list(places.values()) if first else [])
            wait_for_all("all methods are done")
        if not first:
            return {"status": "finished", **origin}
        join_records(folder, grid.methods)
        plot_folder(folder)
        summary = {
            "status": "finished",
            "cells": summarise_comparison(read_records(folder), config, experiment.task.measure),
            "strategy": choice,
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
        clear(folder)
    return summary


def _check_strategy(config: CompareConfig) -> None:
    if jax.process_count() > 1 and str(config.run.strategy).startswith("sharded"):
        raise ConfigError(
            f"strategy {config.run.strategy!r} divides a cohort between processes, but those of a comparison "
            "divide its methods between them; leave 'sharded' away, or give --processes 1"
        )


def _origin(config: CompareConfig, experiment: Experiment) -> dict[str, Any]:
    """Facts that a summary states from the start."""
    return {
        "command": "compare",
        "methods": list(config.compare.methods),
        "local_rates": list(config.compare.local_rates),
        "seeds": list(config.compare.seed_list),
        "rounds": config.run.rounds,
        **experiment.facts,
        "processes": jax.process_count(),
        "environment": environment(),
    }


def divided_families(families: Sequence[Family], processes: int) -> list[list[Family]]:
    """The methods of all families, divided over processes; a family may be divided too.

    Compiling a family's program counts as much as a method's rounds: on short comparisons it takes longer, on long ones
    less. No process is given more than needs be.

    Args:
      families: see `method_families`.
      processes: how many.

    Returns:
      The families of each process; of fewer processes where more of them would not be done sooner.

    Example:
      >>> from fedhyper_jax.methods import method_families
      >>> families = method_families(["fedavg", "G", "SL", "CL", "G+SL", "G+CL"])
      >>> [[list(family.hyper_rates) for family in own] for own in divided_families(families, 2)]
      [[['fedavg', 'G', 'SL', 'G+SL']], [['CL', 'G+CL']]]
      >>> [[list(family.hyper_rates) for family in own] for own in divided_families(families, 3)]
      [[['fedavg', 'G']], [['SL', 'G+SL']], [['CL', 'G+CL']]]
    """
    for most in itertools.count(2):
        shares = _shares(families, most)
        if len(shares) <= processes:
            return shares


def _shares(families: Sequence[Family], most: int) -> list[list[Family]]:
    """Families cut so that none has more than ``most`` methods and programs together."""
    shares, room = [], 0
    for family in families:
        left = list(family.hyper_rates.items())
        while left:
            if room < 2:
                shares.append([])
                room = most
            taken, left = left[: room - 1], left[room - 1 :]
            shares[-1].append(Family(family.name, dict(taken)))
            room -= 1 + len(taken)
    return shares


def _own_families(families: Sequence[Family]) -> list[Family]:
    """Those of this process."""
    shares = divided_families(families, jax.process_count())
    return shares[jax.process_index()] if jax.process_index() < len(shares) else []


class _Program(NamedTuple):
    """What runs all methods of a family; compiled once, since one function makes all their algorithms."""

    family: Family
    arguments: dict[str, Any]  # of `sweep`

    def of(self, method: str) -> dict[str, Any]:
        """Arguments of `sweep` for a method from all initial local rates with all seeds."""
        settings = self.arguments["settings"]
        hyper_rates = self.family.hyper_rates[method]
        constant = {name: jnp.full_like(settings["local_rate"], rate) for name, rate in hyper_rates.items()}
        return {**self.arguments, "settings": {**settings, **constant}}


def _program(config: CompareConfig, experiment: Experiment, family: Family, strategy: str) -> _Program:
    grid = config.compare
    starts = [experiment.start(seed) for seed in grid.seed_list]

    def make_algorithm(local_rate, **hyper_rates):
        given = {"hyper_rate": hyper_rates} if hyper_rates else {}
        return experiment.make_algorithm(family.name, local_rate, strategy=strategy, **given)

    arguments = {
        **simulation_arguments(config, experiment, strategy),
        "make_algorithm": make_algorithm,
        "settings": {"local_rate": jnp.asarray(grid.local_rates)},
        "keys": jnp.stack([key for _, key in starts]),
        "params": jax.tree.map(lambda *leaves: jnp.stack(leaves), *[params for params, _ in starts]),
    }
    return _Program(family, arguments)


def _choice(
    config: CompareConfig, families: Sequence[Family], programs: Callable[[Family, str], _Program], bar: ProgressBar
) -> dict[str, Any]:
    """The strategy, and how it was chosen."""
    family, *_ = families or compared_families(config)  # (a process without methods helps to agree)
    method, *_ = family.hyper_rates

    def one_round(strategy: str):
        arguments = programs(family, strategy).of(method)
        return functools.partial(sweep, **arguments, rounds=1, rounds_per_chunk=rounds_per_chunk(config))

    # Processes divide methods between them; the devices of one alone divide its cohorts.
    devices = jax.device_count() if jax.process_count() == 1 else 1
    rounds = max(1, bar.total_rounds)
    return choose_strategy(config, one_round, bar, program=family.name, rounds=rounds, devices=devices)


def _method(
    method: str,
    program: _Program,
    config: CompareConfig,
    where: Place,
    checkpoint: Checkpoint | None,
    notes: dict[str, Any],
    bar: ProgressBar,
) -> None:
    """Runs the rounds of a method that are left, from all initial local rates with all seeds."""
    rounds, every, folder = config.run.rounds, config.run.checkpoint_every, pathlib.Path(config.folder)
    done = 0 if checkpoint is None else checkpoint.notes["rounds_done"]
    bar.start_part(method, rounds_done=done, program=program.family.name)
    if done < rounds:
        arguments = program.of(method)
        states = None
        if checkpoint is not None:
            shapes = sweep_shapes(*(arguments[name] for name in ("make_algorithm", "settings", "params")))
            states = restored(checkpoint, shapes)
        with Stop(enabled=every > 0, notify=lambda: bar.describe("stopping")) as stop:
            records = functools.partial(_records, method, config.compare)
            recorder = Recorder(where, records, every=every, notes=notes, stop=stop)
            timing = functools.partial(append_timing, folder, method=method)
            sweep(
                **arguments,
                rounds=rounds,
                rounds_per_chunk=rounds_per_chunk(config),
                callbacks=[timing, recorder, bar],
                states=states,
            )
    _done_mark(where).touch()


def _done_mark(where: Place) -> pathlib.Path:
    return where.checkpoints / "done"


def _wait_for_methods(places: list[Place]) -> None:
    """Waits until all methods are done; in Python, so that Ctrl-C ends it, which a wait in C++ would not let happen."""
    while not all(_done_mark(where).exists() for where in places):
        time.sleep(0.05)


def _records(method: str, grid: GridConfig, history: History) -> list[Record]:
    records = []
    for i, local_rate in enumerate(grid.local_rates):
        for j, seed in enumerate(grid.seed_list):
            one = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], history)
            records += history_records(one, method=method, initial_local_rate=local_rate, seed=seed)
    return records


def summarise_comparison(records: list[Record], config: CompareConfig, measure: Measure) -> list[dict[str, Any]]:
    """The summaries of all cells from the records alone."""
    cells = {
        cell: [summarise_records(run, measure) for run in runs.values()]
        for cell, runs in group_records(records).items()
    }
    return summarise_cells(cells, config.run.rounds, measure)
