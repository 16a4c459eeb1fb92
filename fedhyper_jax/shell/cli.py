"""The command line ``fedhyper``: `run`, `compare`, `plot`, `data`, `methods` and `bench`.

Mistakes of the user are one line on standard error and exit status 2; a traceback is a defect of this package.
"""

import contextlib
import os
import pathlib
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedhyper_jax import _validate
from fedhyper_jax.engine import IdleCoresWarning
from fedhyper_jax.shell.arguments import (
    BenchArguments,
    CompareArguments,
    DataArguments,
    LaunchArguments,
    MethodsArguments,
    PlotArguments,
    RunArguments,
    SharedArguments,
    parse,
    parse_settings,
)
from fedhyper_jax.shell.config import (
    CompareConfig,
    ConfigError,
    load_config,
    one_line,
)
from fedhyper_jax.shell.consoles import replace_what_cannot_be_shown

HELP = """\
usage: fedhyper COMMAND [OPTIONS]

Simulates federated learning with the FedHyper learning-rate schedulers and the methods they are compared with.

commands:
  run       one method, one seed: a run folder with metrics, parameters and plots
  compare   several methods from several initial local rates: a table and plots
  plot      draw the plots of a run folder again
  data      show how a data set is divided over the clients, or which sets are here
  methods   list the methods, or print all about one: equation, state, options
  launch    run another command in several processes, here or as a cluster started them
  bench     measure speed: compilation, client-steps a second, memory, what each scheduler costs

  fedhyper COMMAND --help   lists the options of a command
  fedhyper --version        prints the version

examples:
  fedhyper compare --preset demo
  fedhyper run --data synthetic_text --model char_lstm --hidden 64 --local-rate 1
  fedhyper run --data diabetes --model logistic --clients 30
  fedhyper compare --data fashion_mnist --local-rates 0.001 0.01
  fedhyper run --method G+SL --local-rate 0.01 --rounds 100 --out runs/first
  fedhyper run --method fedprox+G --options proximal_weight 0.01
  fedhyper run --resume runs/first
  fedhyper methods scaffold
  fedhyper data --clients 50 --alpha 0.1 --out partition.png
  fedhyper bench cnn --methods fedavg CL --out cnn.json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: what follows the program's name; those of the process if None.

    Returns:
      The exit status: 0, 2 for a mistake of the user, 130 where it was interrupted, 141 where its reader has gone.

    Example:
      >>> main(["paint"])  # prints: fedhyper: error: unknown command 'paint'; known: run, compare, plot, data, ...
      2
    """
    replace_what_cannot_be_shown()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "run": _run,
        "compare": _compare,
        "plot": _plot,
        "data": _data,
        "methods": _methods,
        "launch": _launch,
        "bench": _bench,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    if arguments[0] == "--version":
        import fedhyper_jax

        print(fedhyper_jax.__version__)
        return 0
    status = _status_of(commands, arguments)
    if status:
        from fedhyper_jax.shell.launch import leave

        leave(status)
    return status


def _status_of(commands: dict[str, Callable[[Sequence[str]], None]], arguments: Sequence[str]) -> int:
    """Runs a command; the exit status."""
    try:
        if arguments[0] not in commands:
            raise ConfigError(f"unknown command {arguments[0]!r}; {_validate.instead_of(arguments[0], commands)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IdleCoresWarning)  # one process is what was asked for here
            commands[arguments[0]](arguments[1:])
    except ConfigError as error:
        print(f"fedhyper: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print("; ".join(filter(None, ("fedhyper: interrupted", str(interrupt)))), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("out of memory|RESOURCE_EXHAUSTED", str(error), re.I)):
            raise
        print("fedhyper: error: not enough memory for this; use fewer rounds, clients, seeds or rates", file=sys.stderr)
        return 2
    except SystemExit as exit_:  # --help
        return int(exit_.code or 0)
    return 0


def _run(arguments: Sequence[str]) -> None:
    parsed, preset = parse_settings("run", RunArguments, arguments)
    run = parsed.settings.run
    if _is_finished(parsed):
        return
    _in_processes("run", arguments, parsed, most=1 if run.strategy == "debug" else run.cohort_size)
    from fedhyper_jax.shell.report import print_run
    from fedhyper_jax.shell.train import train

    with _says_how_to_go_on("run", parsed):
        summary = train(
            parsed.settings,
            preset=preset,
            overwrite=parsed.overwrite,
            quiet=parsed.quiet,
            resume=parsed.resume is not None,
        )
    if _is_first():
        print_run(summary)
        print(f"{_seconds(summary)}; {_how(summary)}; results in {parsed.settings.folder}")


def _compare(arguments: Sequence[str]) -> None:
    parsed, preset = parse_settings("compare", CompareArguments, arguments)
    if _is_finished(parsed):
        return
    _in_processes("compare", arguments, parsed, most=len(parsed.settings.compare.methods))
    from fedhyper_jax.shell.compare import compare
    from fedhyper_jax.shell.report import print_comparison

    with _says_how_to_go_on("compare", parsed):
        summary = compare(
            parsed.settings,
            preset=preset,
            overwrite=parsed.overwrite or (parsed.resume is None and _is_own_demo(parsed.settings, preset)),
            quiet=parsed.quiet,
            resume=parsed.resume is not None,
        )
    if _is_first():
        print_comparison(summary)
        print(f"{_seconds(summary)}; {_how(summary)}; summary and plots in {parsed.settings.folder}")


def _is_finished(parsed: SharedArguments) -> bool:
    """Whether a run that is to be resumed has nothing left to do; says so."""
    if parsed.resume is None:
        return False
    from fedhyper_jax.shell.resume import finished_summary

    finished = finished_summary(parsed.resume) is not None
    if finished:
        print(f"{parsed.resume} is finished; nothing is left to do, and nothing was changed")
    return finished


@contextlib.contextmanager
def _says_how_to_go_on(command: str, parsed: SharedArguments) -> Iterator[None]:
    """Gives Ctrl-C a message with the folder, and with the command that resumes the run."""
    from fedhyper_jax.shell.records import SUMMARY

    try:
        yield
    except KeyboardInterrupt as interrupt:
        folder = shlex.quote(os.fspath(parsed.settings.folder))
        if not (pathlib.Path(parsed.settings.folder) / SUMMARY).exists():
            how = f"nothing is recorded in {folder} yet"
        elif not parsed.settings.run.checkpoint_every:
            how = f"what was recorded is in {folder}; without checkpoints (--checkpoint-every 0) it cannot be resumed"
        else:
            done = str(interrupt) or "what came after the last checkpoint will be done again"
            how = f"{done}; go on with: fedhyper {command} --resume {folder}"
        raise KeyboardInterrupt(how) from interrupt


def _in_processes(command: str, arguments: Sequence[str], parsed: SharedArguments, *, most: int) -> None:
    """Runs the command in several processes and ends this one, or makes this one ready to do the work itself."""
    from fedhyper_jax.shell import launch

    if not (launch.is_member() or launch.in_cluster):
        processes = parsed.processes
        if processes is None and parsed.resume is not None:
            from fedhyper_jax.shell.resume import recorded_processes

            processes = recorded_processes(parsed.resume)
        processes = launch.default_processes(most) if processes is None else processes
        if processes != 1:
            raise SystemExit(launch.launch([command, *arguments], processes))
    launch.join()
    from fedhyper_jax.shell.cache import use_compilation_cache

    use_compilation_cache()


def _is_first() -> bool:
    import jax

    return jax.process_index() == 0


def _launch(arguments: Sequence[str]) -> None:
    from fedhyper_jax.shell import launch

    position = next((index for index, argument in enumerate(arguments) if argument in _LAUNCHED), None)
    parsed = parse(LaunchArguments, arguments[:position], "launch", None)
    if position is None:
        raise ConfigError(f"launch what? name a command after the options: {', '.join(_LAUNCHED)}")
    command, *rest = arguments[position:]
    if parsed.cluster:
        launch.join_cluster()
    elif parsed.processes is not None:
        rest = [*rest, "--processes", str(parsed.processes)]
    _LAUNCHED[command](rest)


def _plot(arguments: Sequence[str]) -> None:
    parsed = parse(PlotArguments, arguments, "plot", None)
    from fedhyper_jax.shell.plots import plot_folder

    for path in plot_folder(parsed.folder):
        print(path)


def _data(arguments: Sequence[str]) -> None:
    parsed = parse(DataArguments, arguments, "data", None)
    from fedhyper_jax.shell.datasets import build_partition, describe

    if parsed.list:
        for name, state in _known_data():
            print(f"{name}: {state}")
        return
    from fedhyper_jax.data import plot_partition

    try:
        dataset, partition = build_partition(parsed.data)
        report = describe(dataset, partition)
        if parsed.out is not None:
            pathlib.Path(parsed.out).absolute().parent.mkdir(parents=True, exist_ok=True)
            plot_partition(report, parsed.out)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(one_line(error)) from error
    print(f"{dataset!r}\n{report}")
    if parsed.out is not None:
        print(parsed.out)


def _methods(arguments: Sequence[str]) -> None:
    parsed = parse(MethodsArguments, arguments, "methods", None)
    from fedhyper_jax.methods import parse_method
    from fedhyper_jax.shell.method_pages import methods_page, print_method, print_methods

    if parsed.markdown and parsed.name is not None:
        raise ConfigError("--markdown prints the page of all methods; leave the name out")
    if parsed.markdown:
        print(methods_page(), end="")
    elif parsed.name is None:
        print_methods()
    else:
        try:
            names = parse_method(parsed.name)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for name in names:
            print_method(name)


_BENCH_SETTINGS = ("methods", "cohort_size", "strategy", "rounds", "repeats", "out")


def _bench(arguments: Sequence[str]) -> None:
    parsed = parse(BenchArguments, arguments, "bench", None)
    from fedhyper_jax.shell import launch
    from fedhyper_jax.shell.bench import JOBS, bench, check_bench, print_bench

    if parsed.list:
        for name, job in JOBS.items():
            print(f"{name}: {job.description}")
        return
    settings = {name: getattr(parsed, name) for name in _BENCH_SETTINGS}
    try:
        jobs = check_bench(parsed.jobs, **settings)
        if len(jobs) == 1 and not (launch.is_member() or launch.in_cluster):
            processes = launch.default_processes(parsed.cohort_size or JOBS[jobs[0]].cohort_size)
            processes = processes if parsed.processes is None else parsed.processes
            if processes != 1:
                raise SystemExit(launch.launch(["bench", *arguments], processes))
        launch.join()  # (no compilation cache: it would hide what compilation takes)
        results = bench(
            jobs,
            **settings,
            processes=parsed.processes,
            report=lambda line: None if parsed.quiet else print(line, file=sys.stderr, flush=True),
        )
    except ValueError as error:
        raise ConfigError(one_line(error)) from error
    if _is_first():
        print_bench(results)
        if parsed.out is not None:
            print(parsed.out)
    failed = [job for job in results["jobs"] if "error" in job]
    if failed:
        raise ConfigError("; ".join(f"{job['job']} was not measured: {job['error']}" for job in failed))


def _known_data() -> list[tuple[str, str]]:
    """Every known data set and whether it is here; nothing is downloaded."""
    from fedhyper_jax.data import LOADERS, sources

    tfds = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    states = {name: "here (ships with scikit-learn)" for name in ("digits", "diabetes")}
    states |= {name: "here (made up on demand)" for name in LOADERS if name.startswith(("synthetic", "procedural"))}
    for name in LOADERS:
        if name in states:
            continue
        searched: list[str] = []
        if name in ("fashion_mnist", "mnist"):
            files, searched = sources.locate_files(name, None)
            if files:
                states[name] = f"here ({files['train_images'].parent})"
                continue
        if (tfds / name).is_dir():
            states[name] = f"here ({tfds / name})"
        else:
            states[name] = f"not found; looked in {', '.join([*searched, str(tfds / name)])}"
    return [(name, states[name]) for name in LOADERS]


def _is_own_demo(config: CompareConfig, preset: str | None) -> bool:
    """Whether the folder holds the unchanged demo and is about to get it again: `make demo` can be repeated."""
    from fedhyper_jax.shell.records import CONFIG

    try:
        return preset == "demo" and load_config(pathlib.Path(config.folder) / CONFIG) == config
    except ConfigError:
        return False


def _how(summary: dict[str, Any]) -> str:
    processes = summary["processes"]
    return f"strategy {summary['strategy']['used']}" + (f", {processes} processes" if processes > 1 else "")


_LAUNCHED: dict[str, Callable[[Sequence[str]], None]] = {"run": _run, "compare": _compare, "bench": _bench}
"""Commands that several processes can share."""


def _seconds(summary: dict[str, Any]) -> str:
    seconds = summary["seconds"]
    first = next(value for name, value in seconds.items() if name.startswith("first_chunk"))
    return f"{seconds['total']:.1f} s, {first:.1f} s of it first chunks with compilation"


if __name__ == "__main__":
    sys.exit(main())
