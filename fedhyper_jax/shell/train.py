"""One run of one method, from its configuration to its run folder; what `fedhyper run` does."""

import time
from typing import Any

import jax

from fedhyper_jax.engine import Progress, parse_strategy, place, run, simulate
from fedhyper_jax.shell.cache import cache_use
from fedhyper_jax.shell.checkpoint import save_parameters
from fedhyper_jax.shell.config import RunConfig
from fedhyper_jax.shell.experiment import build_experiment
from fedhyper_jax.shell.plots import plot_folder
from fedhyper_jax.shell.progress import ProgressBar, chunk_length
from fedhyper_jax.shell.records import (
    PARAMETERS,
    append_records,
    environment,
    history_records,
    prepare_folder,
    read_records,
    write_summary,
)
from fedhyper_jax.shell.report import summarise_records
from fedhyper_jax.shell.strategy import choose_strategy


def train(
    config: RunConfig, *, preset: str | None = None, overwrite: bool = False, quiet: bool = True
) -> dict[str, Any]:
    """Runs a configuration and leaves a run folder behind.

    One of several processes of a run does its share of the work, and only the first one touches the folder.

    Args:
      config: what to run.
      preset: name of the preset that it is, unchanged.
      overwrite: whether an earlier run in the folder is replaced.
      quiet: no progress bar.

    Returns:
      The summary, as in ``summary.json``.

    Raises:
      ConfigError: a configuration that cannot be used, or a folder that is not to be touched.

    Example:
      >>> import tempfile
      >>> from fedhyper_jax.shell.config import SimulationConfig
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     summary = train(RunConfig(run=SimulationConfig(rounds=3, strategy="sequential", out=folder)))
      >>> summary["status"], summary["rounds"]
      ('finished', 3)
    """
    start = time.perf_counter()
    first = jax.process_index() == 0
    experiment = build_experiment(config)
    folder = prepare_folder(config.folder, config, preset=preset, overwrite=overwrite) if first else None
    origin = {
        "command": "run",
        "method": config.method.name,
        "initial_local_rate": config.method.local_rate,
        "seed": config.run.seed,
        **experiment.facts,
        "environment": environment(),
    }
    if first:
        write_summary(folder, {"status": "unfinished", **origin})
    params, key = experiment.start(config.run.seed)

    def make_algorithm(strategy: str):
        return experiment.make_algorithm(config.method.name, config.method.local_rate, strategy=strategy)

    def one_round(strategy: str):
        algorithm, data = make_algorithm(strategy), place(strategy, experiment.task.data)
        state = algorithm.init(params)
        return lambda: simulate(
            algorithm,
            key,
            state,
            data,
            rounds=1,
            cohort_size=config.run.cohort_size,
            participation=experiment.participation,
        )

    def record(done: Progress) -> None:
        if first:
            append_records(folder, history_records(done.history, done.seconds))

    with ProgressBar(total_rounds=config.run.rounds, parts=1, quiet=quiet or not first) as bar:
        bar.start_part("choosing a strategy")
        strategy, choice = choose_strategy(config, one_round, rounds=config.run.rounds)
        algorithm = make_algorithm(strategy)
        bar.describe(config.method.name)
        state, _ = run(
            algorithm,
            key,
            algorithm.init(params),
            place(strategy, experiment.task.data),
            rounds=config.run.rounds,
            cohort_size=config.run.cohort_size,
            evaluate=experiment.evaluate,
            evaluation_data=place(strategy, experiment.evaluation_data),
            eval_every=config.run.eval_every,
            participation=experiment.participation,
            rounds_per_chunk=chunk_length(config.run.rounds),
            callbacks=[record, bar],
            compiles=parse_strategy(strategy).compiles,
        )
    if not first:
        return {"status": "finished", **origin}
    save_parameters(folder / PARAMETERS, jax.device_get(algorithm.evaluated_params(state)))
    plot_folder(folder)
    measured = summarise_records(read_records(folder), experiment.task.measure)
    summary = {
        "status": "finished",
        **measured,
        "strategy": choice,
        "processes": jax.process_count(),
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
    return summary
