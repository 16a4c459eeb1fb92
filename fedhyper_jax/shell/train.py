"""One run of one method, from its configuration to its run folder; what `fedhyper run` does."""

import functools
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fedhyper_jax.base import FederatedAlgorithm, Params
from fedhyper_jax.engine import parse_strategy, place, run
from fedhyper_jax.shell.cache import cache_use
from fedhyper_jax.shell.checkpoint import save_parameters
from fedhyper_jax.shell.checkpoint_file import Checkpoint
from fedhyper_jax.shell.config import RunConfig
from fedhyper_jax.shell.experiment import Experiment, build_experiment, simulation_arguments
from fedhyper_jax.shell.plots import plot_folder
from fedhyper_jax.shell.progress import ProgressBar
from fedhyper_jax.shell.recorder import Recorder, Stop, append_timing, rounds_per_chunk
from fedhyper_jax.shell.records import PARAMETERS, environment, history_records, read_records, write_summary
from fedhyper_jax.shell.report import summarise_records
from fedhyper_jax.shell.resume import (
    Place,
    clear,
    finished_summary,
    made_of,
    opened,
    recorded_strategy,
    restored,
    run_place,
)
from fedhyper_jax.shell.strategy import choose_strategy


def train(
    config: RunConfig,
    *,
    preset: str | None = None,
    overwrite: bool = False,
    quiet: bool = True,
    resume: bool = False,
) -> dict[str, Any]:
    """Runs a configuration and leaves a run folder behind.

    One of several processes of a run does its share of the work, and only the first one touches the folder.

    Args:
      config: what to run.
      preset: name of the preset that it is, unchanged.
      overwrite: whether an earlier run in the folder is replaced.
      quiet: no progress bar.
      resume: go on from the last checkpoint in the folder, or from round 0 where there is none. A finished run is left
        as it is.

    Returns:
      The summary, as in ``summary.json``.

    Raises:
      ConfigError: a configuration that cannot be used, or a folder that is not to be touched or cannot be resumed.
      Interrupted: Ctrl-C, after a checkpoint.

    Example:
      >>> import tempfile
      >>> from fedhyper_jax.shell.config import MethodConfig, ModelConfig, SimulationConfig
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     settings = SimulationConfig(rounds=3, strategy="sequential", out=folder)
      ...     method, model = MethodConfig(name="G", local_rate=0.05), ModelConfig(name="logistic")
      ...     config = RunConfig(method=method, model=model, run=settings)
      ...     summary = train(config)
      ...     again = train(config, resume=True)  # nothing is left to do
      >>> summary["status"], summary["rounds"], again == summary
      ('finished', 3, True)
    """
    start = time.perf_counter()
    finished = finished_summary(config.folder) if resume else None
    if finished is not None:
        return finished
    rounds_per_chunk(config)  # refuses
    experiment = build_experiment(config)
    folder, where = pathlib.Path(config.folder), run_place(pathlib.Path(config.folder))
    known = made_of(config, (experiment.task.data, experiment.evaluation_data))
    first = jax.process_index() == 0
    origin = _origin(config, experiment)
    with opened(config, [where], known, preset=preset, overwrite=overwrite, resume=resume) as (checkpoint,):
        earlier = recorded_strategy(folder, [checkpoint]) if resume else None
        if first:
            write_summary(folder, {"status": "unfinished", "strategy": earlier, **origin})
        with ProgressBar(total_rounds=config.run.rounds, programs=1, quiet=quiet or not first) as bar:
            program = functools.cache(functools.partial(_program, config, experiment))
            choice = _choice(config, program, bar) if earlier is None else earlier
            if first:
                write_summary(folder, {"status": "unfinished", "strategy": choice, **origin})
            notes = {"made_of": known, "strategy": choice}
            params = _rounds(config, program(choice["used"]), where, checkpoint, notes, bar)
        if not first:
            return {"status": "finished", **origin}
        _save_parameters(folder, params)
        plot_folder(folder)
        measured = summarise_records(read_records(folder), experiment.task.measure)
        summary = {
            "status": "finished",
            **measured,
            "strategy": choice,
            "compilation_cache": cache_use(),
            "seconds": {
                "total": time.perf_counter() - start,
                "first_chunk_with_compilation": bar.first_chunk_seconds,
                "steady": bar.steady_seconds,
                "steady_rounds_per_second": bar.rounds_per_second,
            },
            **origin,
        }
        write_summary(folder, summary)
        clear(folder)
    return summary


def _origin(config: RunConfig, experiment: Experiment) -> dict[str, Any]:
    """Facts that a summary states from the start."""
    return {
        "command": "run",
        "method": config.method.name,
        "initial_local_rate": config.method.local_rate,
        "seed": config.run.seed,
        **experiment.facts,
        "processes": jax.process_count(),
        "environment": environment(),
    }


class _Program(NamedTuple):
    """What runs the rounds by a strategy; compiled once."""

    algorithm: FederatedAlgorithm
    params: Params  # before round 0
    arguments: dict[str, Any]  # of `run`, but for the state and the number of rounds


def _program(config: RunConfig, experiment: Experiment, strategy: str) -> _Program:
    params, key = experiment.start(config.run.seed)
    arguments = {
        **simulation_arguments(config, experiment, strategy),
        "key": key,
        "rounds_per_chunk": rounds_per_chunk(config),
        "total_rounds": config.run.rounds,
        "compiles": parse_strategy(strategy).compiles,
    }
    algorithm = experiment.make_algorithm(config.method.name, config.method.local_rate, strategy=strategy)
    return _Program(algorithm, params, arguments)


def _choice(config: RunConfig, program: Callable[[str], _Program], bar: ProgressBar) -> dict[str, Any]:
    """The strategy, and how it was chosen."""

    def one_round(strategy: str):
        algorithm, params, arguments = program(strategy)
        return functools.partial(run, algorithm, state=algorithm.init(params), rounds=1, **arguments)

    return choose_strategy(config, one_round, bar, program=config.method.name, rounds=config.run.rounds)


def _rounds(
    config: RunConfig,
    program: _Program,
    where: Place,
    checkpoint: Checkpoint | None,
    notes: dict[str, Any],
    bar: ProgressBar,
) -> Params:
    """Runs the rounds that are left; the parameters at their end."""
    settings, folder = config.run, where.metrics.parent
    algorithm, params, arguments = program
    state = algorithm.init(params)
    if checkpoint is not None:
        state = place(notes["strategy"]["used"], restored(checkpoint, state))
    done = int(state.round)
    bar.start_part(config.method.name, rounds_done=done)
    if done == settings.rounds:  # stopped while the run folder was completed
        return algorithm.evaluated_params(state)
    with Stop(enabled=settings.checkpoint_every > 0, notify=lambda: bar.describe("stopping")) as stop:
        callbacks = [bar]
        if jax.process_index() == 0:
            recorder = Recorder(where, history_records, every=settings.checkpoint_every, notes=notes, stop=stop)
            callbacks = [functools.partial(append_timing, folder), recorder, bar]
        state, _ = run(algorithm, state=state, rounds=settings.rounds - done, callbacks=callbacks, **arguments)
    return algorithm.evaluated_params(state)


def _save_parameters(folder: pathlib.Path, params: Params) -> None:
    """Writes the final parameters, whatever a process that was killed meanwhile has left of them."""
    for left in (folder / PARAMETERS, *folder.glob(f"{PARAMETERS}.orbax-checkpoint-tmp*")):
        shutil.rmtree(left, ignore_errors=True)
    save_parameters(folder / PARAMETERS, jax.device_get(params))
