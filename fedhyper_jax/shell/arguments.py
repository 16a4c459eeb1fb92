"""The arguments of the commands: what each takes, and how a command line is read."""

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

from fedhyper_jax.shell.config import COMMANDS, CompareConfig, Config, ConfigError, DataConfig, RunConfig, load_config
from fedhyper_jax.shell.mistakes import mistake
from fedhyper_jax.shell.presets import PRESETS, preset_config

_T = TypeVar("_T")
_MARKERS = (tyro.conf.OmitArgPrefixes,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedArguments:
    """Arguments that `run` and `compare` share."""

    config: str | None = None
    """TOML file whose values the options below override; that of a run folder says all but where the results go."""
    preset: str | None = None
    """Named configuration to start from: demo or fashion_mnist. --data NAME alone starts from the preset NAME."""
    overwrite: bool = False
    """Replace an earlier run in the run folder; with --config, only one that --out names."""
    resume: str | None = None
    """Run folder of a run that was stopped: go on from its last checkpoint, with its own settings."""
    quiet: bool = False
    """No progress bar."""
    processes: int | None = None
    """Processes that share the work; by default one a core on CPU, one with an accelerator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunArguments(SharedArguments):
    """One method, one seed: a run folder with metrics, parameters and plots."""

    settings: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=RunConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareArguments(SharedArguments):
    """Several methods from several initial local rates: a table and plots."""

    settings: Annotated[CompareConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=CompareConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotArguments:
    """Draws the plots of a run folder again."""

    folder: Annotated[str, tyro.conf.Positional]
    """Run folder of `fedhyper run` or `fedhyper compare`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Shows how a data set is divided over the clients, or which sets are here."""

    list: bool = False
    """List the known data sets and where they were looked for."""
    out: str | None = None
    """Picture of the division to write; its suffix chooses the format."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodsArguments:
    """Lists the methods, or prints all about one: equation, state, options."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """Print all about this method, or several joined by '+'; without a name all are listed."""
    markdown: bool = False
    """Print the page docs/methods.md instead."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchArguments:
    """Runs another command in several processes, here or as a cluster started them."""

    processes: int | None = None
    """Processes to start here, each pinned to a core of its own; by default one a core."""
    cluster: bool = False
    """Join the job that srun, mpirun, Kubernetes or a TPU pod started this command in, instead of starting anything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """Measures speed: compilation, client-steps a second, memory, what each scheduler costs."""

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


def parse_settings(command: str, cls: type[_T], arguments: Sequence[str]) -> tuple[_T, str | None]:
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
        default = _to_vary(config, command)
    elif preset is not None:
        default = preset_config(preset, command)
    else:
        default = COMMANDS[command]()
    # tyro makes a flag of each entry of a table that is not empty, so the methods' options are put aside
    parsed = parse(cls, arguments, command, cls(settings=_with_options(default, {})))
    options = {**default.method.options, **parsed.settings.method.options}
    options = {name: value for name, value in options.items() if value != "None"}
    parsed = dataclasses.replace(parsed, settings=_with_options(parsed.settings, options))
    if config is not None and parsed.overwrite and _peek(arguments, "--out") is None:
        folder = parsed.settings.folder
        raise ConfigError(f"--overwrite with --config replaces only what --out names; add --out {folder}, or another")
    unchanged = preset is not None and parsed.settings == preset_config(preset, command)
    return parsed, preset if unchanged else None


def _to_vary(path: str, command: str) -> Config:
    """A configuration from its file; that of an earlier run without its folder, for another run goes elsewhere."""
    from fedhyper_jax.shell.records import CONFIG, SUMMARY

    config, file = load_config(path, command), pathlib.Path(path)
    if file.name == CONFIG and file.with_name(SUMMARY).exists():
        return dataclasses.replace(config, run=dataclasses.replace(config.run, out=None))
    return config


def _parse_resumed(command: str, cls: type[_T], arguments: Sequence[str], folder: str) -> _T:
    """The parsed arguments of ``--resume``: the settings are the folder's, and options may only repeat them."""
    from fedhyper_jax.shell.records import CONFIG, read_notes

    for option in ("--config", "--preset", "--overwrite"):
        if any(argument.split("=", 1)[0] == option for argument in arguments):
            raise ConfigError(f"--resume goes on with the settings in {folder}; leave {option} out")
    if read_notes(folder) is None:
        raise ConfigError(f"{folder} is not a run folder: there is no {CONFIG} of fedhyper in it")
    kept = load_config(pathlib.Path(folder) / CONFIG, command)
    parsed = parse(cls, arguments, command, cls(settings=_with_options(kept, {})))
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


def parse(cls: type[_T], arguments: Sequence[str], command: str, default: Any) -> _T:
    """Parses with tyro; what that says of a mistake, in several lines, is said in one."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            settings = {} if default is None else {"default": default}
            return tyro.cli(cls, args=list(arguments), prog=f"fedhyper {command}", config=_MARKERS, **settings)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
        raise ConfigError(mistake(cls, arguments, command)) from None
