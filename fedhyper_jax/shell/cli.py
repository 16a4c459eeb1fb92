"""The command line ``fedhyper``: `run`, `compare`, `plot`, `data`, `methods` and `bench`.

Mistakes of the user are one line on standard error and exit status 2; a traceback is a defect of this package.
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeVar

import tyro

from fedhyper_jax.engine import IdleCoresWarning
from fedhyper_jax.shell.config import (
    COMMANDS,
    CompareConfig,
    Config,
    ConfigError,
    DataConfig,
    RunConfig,
    load_config,
    one_line,
)
from fedhyper_jax.shell.presets import PRESETS, preset_config

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

_T = TypeVar("_T")
_MARKERS = (tyro.conf.OmitArgPrefixes,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Common:
    config: str | None = None
    """TOML file whose values the options below override."""
    preset: str | None = None
    """Named configuration to start from: demo or fashion_mnist. --data NAME alone starts from the preset NAME."""
    overwrite: bool = False
    """Replace an earlier run in the run folder."""
    resume: str | None = None
    """Run folder of a run that was stopped: go on from its last checkpoint, with its own settings."""
    quiet: bool = False
    """No progress bar."""
    processes: int | None = None
    """Processes that share the work; by default one a core on CPU, one with an accelerator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run(_Common):
    settings: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=RunConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compare(_Common):
    settings: Annotated[CompareConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompareConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plot:
    folder: Annotated[str, tyro.conf.Positional]
    """Run folder of `fedhyper run` or `fedhyper compare`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Data:
    list: bool = False
    """List the known data sets and where they were looked for."""
    out: str | None = None
    """Picture of the division to write; its suffix chooses the format."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Methods:
    name: Annotated[str | None, tyro.conf.Positional] = None
    """Print all about this method, or several joined by '+'; without a name all are listed."""
    markdown: bool = False
    """Print the page docs/methods.md instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Launch:
    processes: int | None = None
    """Processes to start here, each pinned to a core of its own; by default one a core."""
    cluster: bool = False
    """Join the job that srun, mpirun, Kubernetes or a TPU pod started this command in, instead of starting anything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bench:
    jobs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Jobs to measure, each in a process of its own; all if none is named."""
    methods: tuple[str, ...] = ("fedavg", "G", "SL", "CL")
    """Methods to run in turn; the others' costs are relative to fedavg."""
    cohort_size: int | None = None
    """Clients a round; each job has its own default."""
    strategy: str | None = None
    """How a cohort is run, for all jobs; each job has its own default."""
    rounds: int | None = None
    """Rounds in a timed program; each job has its own default."""
    repeats: int = 7
    """How often each method's program is timed."""
    processes: int | None = None
    """Processes that share a job's work; by default one a core on CPU, one with an accelerator."""
    out: str | None = None
    """JSON file to write."""
    list: bool = False
    """List the jobs and stop."""
    quiet: bool = False
    """Do not say which job is being measured."""


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
            raise ConfigError(f"unknown command {arguments[0]!r}; known: {', '.join(commands)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IdleCoresWarning)  # one process is what was asked for here
            commands[arguments[0]](arguments[1:])
    except ConfigError as error:
        print(f"fedhyper: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        how = str(interrupt) or "what was recorded so far is in the run folder"
        print(f"fedhyper: interrupted; {how}", file=sys.stderr)
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
    parsed, preset = _parse_settings("run", _Run, arguments)
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
    parsed, preset = _parse_settings("compare", _Compare, arguments)
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


def _is_finished(parsed: _Common) -> bool:
    """Whether a run that is to be resumed has nothing left to do; says so."""
    if parsed.resume is None:
        return False
    from fedhyper_jax.shell.resume import finished_summary

    finished = finished_summary(parsed.resume) is not None
    if finished:
        print(f"{parsed.resume} is finished; nothing is left to do, and nothing was changed")
    return finished


@contextlib.contextmanager
def _says_how_to_go_on(command: str, parsed: _Common) -> Iterator[None]:
    """Gives Ctrl-C a message with the command that resumes the run."""
    from fedhyper_jax.shell.records import SUMMARY

    try:
        yield
    except KeyboardInterrupt as interrupt:
        folder = parsed.settings.folder
        if parsed.settings.run.checkpoint_every and (pathlib.Path(folder) / SUMMARY).exists():
            done = str(interrupt) or "what came after the last checkpoint will be done again"
            command = f"fedhyper {command} --resume {shlex.quote(os.fspath(folder))}"
            raise KeyboardInterrupt(f"{done}; go on with: {command}") from interrupt
        raise


def _in_processes(command: str, arguments: Sequence[str], parsed: _Common, *, most: int) -> None:
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
    from fedhyper_jax.shell.cache import use_cache

    use_cache()


def _is_first() -> bool:
    import jax

    return jax.process_index() == 0


def _launch(arguments: Sequence[str]) -> None:
    from fedhyper_jax.shell import launch

    position = next((index for index, argument in enumerate(arguments) if argument in _LAUNCHED), None)
    parsed = _parse(_Launch, arguments[:position], "launch", None)
    if position is None:
        raise ConfigError(f"launch what? name a command after the options: {', '.join(_LAUNCHED)}")
    command, *rest = arguments[position:]
    if parsed.cluster:
        launch.join_cluster()
    elif parsed.processes is not None:
        rest = [*rest, "--processes", str(parsed.processes)]
    _LAUNCHED[command](rest)


def _plot(arguments: Sequence[str]) -> None:
    parsed = _parse(_Plot, arguments, "plot", None)
    from fedhyper_jax.shell.plots import plot_folder

    for path in plot_folder(parsed.folder):
        print(path)


def _data(arguments: Sequence[str]) -> None:
    parsed = _parse(_Data, arguments, "data", None)
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
    parsed = _parse(_Methods, arguments, "methods", None)
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
    parsed = _parse(_Bench, arguments, "bench", None)
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


def _parse_settings(command: str, cls: type[_T], arguments: Sequence[str]) -> tuple[_T, str | None]:
    """The parsed arguments, and the name of the preset that they leave unchanged, if any.

    The options' defaults come from the configuration file or the preset, so these are looked for first.
    """
    config, preset, data, resume = (
        _peek(arguments, option) for option in ("--config", "--preset", "--data", "--resume")
    )
    if resume is not None:
        return _parse_resumed(command, cls, arguments, resume), None
    if config is not None and preset is not None:
        raise ConfigError("give --config or --preset, not both")
    if config is None and preset is None and data in PRESETS:
        preset = data
    if config is not None:
        default = load_config(config, command)
    elif preset is not None:
        default = preset_config(preset, command)
    else:
        default = COMMANDS[command]()
    # tyro makes a flag of each entry of a table that is not empty, so the methods' options are put aside
    parsed = _parse(cls, arguments, command, cls(settings=_with_options(default, {})))
    options = {**default.method.options, **parsed.settings.method.options}
    options = {name: value for name, value in options.items() if value != "None"}
    parsed = dataclasses.replace(parsed, settings=_with_options(parsed.settings, options))
    unchanged = preset is not None and parsed.settings == preset_config(preset, command)
    return parsed, preset if unchanged else None


def _parse_resumed(command: str, cls: type[_T], arguments: Sequence[str], folder: str) -> _T:
    """The parsed arguments of ``--resume``: the settings are the folder's, and options may only repeat them."""
    from fedhyper_jax.shell.records import CONFIG, read_notes

    for option in ("--config", "--preset", "--overwrite"):
        if any(argument.split("=", 1)[0] == option for argument in arguments):
            raise ConfigError(f"--resume goes on with the settings in {folder}; leave {option} out")
    if read_notes(folder) is None:
        raise ConfigError(f"{folder} is not a run folder: there is no {CONFIG} of fedhyper in it")
    kept = load_config(pathlib.Path(folder) / CONFIG, command)
    parsed = _parse(cls, arguments, command, cls(settings=_with_options(kept, {})))
    given = _with_options(parsed.settings, {**kept.method.options, **parsed.settings.method.options})
    if given != kept:
        from fedhyper_jax.shell.resume import check_same, settings_of

        check_same(folder, settings_of(kept), settings_of(given))
        if given.folder != kept.folder and pathlib.Path(given.folder) != pathlib.Path(folder):
            raise ConfigError(f"--resume goes on in {folder}; leave --out out")
    return dataclasses.replace(
        parsed, settings=dataclasses.replace(kept, run=dataclasses.replace(kept.run, out=folder))
    )


def _with_options(config: Config, options: dict[str, float | str]) -> Config:
    return dataclasses.replace(config, method=dataclasses.replace(config.method, options=options))


def _peek(arguments: Sequence[str], option: str) -> str | None:
    """The value of an option before the arguments are parsed; the last one counts, as it does in parsing."""
    value = None
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"{option}="):
            value = argument.split("=", 1)[1]
    return value


def _parse(cls: type[_T], arguments: Sequence[str], command: str, default: Any) -> _T:
    """Parses with tyro, whose boxes of several lines become one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            settings = {} if default is None else {"default": default}
            return tyro.cli(cls, args=list(arguments), prog=f"fedhyper {command}", config=_MARKERS, **settings)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise ConfigError(f"{_first_paragraph(errors.getvalue())}; see `fedhyper {command} --help`") from None


def _first_paragraph(box: str) -> str:
    """The text in a box of tyro's before its first rule or empty line."""
    lines = []
    for line in box.splitlines()[1:]:
        text = line.strip("│ ").strip()
        if not text or set(text) <= set("─╰╯"):
            break
        lines.append(text)
    return " ".join(lines).rstrip(".") or "the arguments could not be parsed"


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
