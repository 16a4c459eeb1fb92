"""Typed configurations: what `fedhyper run` and `fedhyper compare` do, as frozen dataclasses with TOML in and out.

Field names without a prefix are the flags of the command line (``rounds`` is ``--rounds``). Names and numbers are
checked where they are used, before anything is compiled.
"""

import dataclasses
import os
import pathlib
import tomllib
from collections.abc import Sequence
from typing import Annotated, Any

import tomli_w
import tyro

from fedhyper_jax.shell._toml import from_table, table_of
from fedhyper_jax.shell.deployment import DeploymentConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line and names the remedy."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line; indented lines become a list with commas."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ", ".join(lines).replace(":, ", ": ")


def any_of(names: Sequence[str]) -> str:
    """Names as a message offers them.

    Example:
      >>> any_of(["iid", "shards", "by_user"])
      'iid, shards or by_user'
    """
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


AUTO = "auto"
"""The strategy that is chosen by timing throw-away rounds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data, and how they are divided over the clients."""

    name: Annotated[str, tyro.conf.arg(name="data")] = "digits"
    """Images: digits, fashion_mnist, mnist, cifar10 or cifar100. Vectors: synthetic_logistic; procedural_logistic makes
    its clients when they are drawn. Text: synthetic_text. Regression: diabetes."""
    clients: int = 100
    """Number of clients."""
    partitioner: str | None = None
    """iid, quantity_skew; dirichlet and shards where examples have labels; by_user where they have users, as those of
    synthetic_logistic and synthetic_text do. None: by_user if possible, else dirichlet, else iid."""
    alpha: float = 0.5
    """Of dirichlet: concentration; small is skewed."""
    shards_per_client: int = 2
    """Of shards: how many each client gets."""
    distribution: str = "lognormal"
    """Of quantity_skew: lognormal or power."""
    skew: float = 1.0
    """Of quantity_skew: how unequal; 0 is equal."""
    min_examples: int = 1
    """Of dirichlet and quantity_skew: examples every client has at least."""
    partition_seed: int = 0
    """Of the division (and of made-up data); separate from seed, so that seeds share one division."""
    hold_out: float = 0.0
    """Fraction of each client's examples kept for evaluating clients; 0 evaluates them on what they train on."""
    evaluate_clients: bool = True
    """Whether the clients are evaluated one by one besides the test set; not with procedural_logistic."""
    source: Annotated[str | None, tyro.conf.arg(name="data-source")] = None
    """Of fashion_mnist and mnist: idx, tfds or auto."""
    folder: Annotated[str | None, tyro.conf.arg(name="data-folder")] = None
    """Where the files of the data set are, if not in a usual place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model. Settings left out take the model's own defaults."""

    name: Annotated[str, tyro.conf.arg(name="model")] = "mlp"
    """logistic or mlp, of images cnn or resnet18 too; of text char_lstm and no other."""
    hidden: tuple[int, ...] | None = None
    """Of mlp and cnn: sizes of the hidden dense layers; of char_lstm: size of each of its layers, one number."""
    embedding: int | None = None
    """Of char_lstm: size of a character's vector."""
    layers: int | None = None
    """Of char_lstm: number of layers."""
    channels: tuple[int, ...] | None = None
    """Of cnn: outputs of each convolution."""
    kernel_size: int | None = None
    """Of cnn: height and width of the kernels."""
    width: int | None = None
    """Of resnet18: channels of the first stage."""
    groups: int | None = None
    """Of resnet18: groups of every normalisation."""
    compute_dtype: str | None = None
    """bfloat16: products inside the model in that type; parameters, rates and inner products stay float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkConfig:
    """A client's work in a round: epochs or a number of steps; ten epochs, as in the paper, if neither is given."""

    local_epochs: int | None = None
    """Visits to each of the client's examples."""
    local_steps: int | None = None
    """Local steps, the same for every client."""
    batch_size: int = 32
    """Examples a step."""
    with_replacement: bool = False
    """With local_steps: draw each batch anew instead of walking through reshuffled epochs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """Settings that methods share. None leaves a setting to the method, whose defaults `fedhyper methods NAME` prints.

    Of several methods each gets those settings that it takes; one that none of them takes is refused.
    """

    global_rate: float | None = None
    """Initial global rate; None: the method's own default, mostly 1."""
    hyper_rate: float | None = None
    """Of G, SL, CL and fathom: how strongly rates follow their hypergradients; None: the method's own default."""
    global_bounds: str | tuple[float, float] | None = None
    """Of G: absolute (1/3, 3), the default, relative to the initial rate, or two numbers."""
    local_bounds: str | tuple[float, float] | None = None
    """Of SL, CL: relative to the initial rate (a tenth to ten times), the default, absolute (0.1, 10), two numbers."""
    decay_factor: float | None = None
    """Of decay_global and decay_local: factor a round; None: the method's own default, 0.995."""
    options: dict[str, float | str] = dataclasses.field(default_factory=dict)
    """Other options of the methods; names and values alternate: proximal_weight 0.01. The value None removes an option
    that the configuration file or the preset sets."""
    server_optimizer: str = "sgd"
    """sgd, momentum, adam, adam_corrected, adagrad, yogi, dog or mechanic; the global rate multiplies its update."""
    server_optimizer_rate: float | None = None
    """Its own rate; None: 0.01 for adam, adam_corrected, adagrad and yogi, 1 for the others."""
    client_optimizer: str = "sgd"
    """sgd or momentum; the local rate multiplies its update."""
    weighting: str = "examples"
    """Of clients in the average: examples or uniform."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig(MethodSettings):
    """Which method, and its rates. Without either, `retained_gain` finds the rates by itself."""

    name: Annotated[str, tyro.conf.arg(name="method")] = "retained_gain"
    """A name that `fedhyper methods` lists, or several joined by '+': G+SL, fedprox+G, scaffold+fedexp."""
    local_rate: float = 0.1
    """Initial local rate. retained_gain measures its own, and minds this one with `--options start given` only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long, with how many clients a round, and where the results go."""

    rounds: int = 50
    """Number of rounds."""
    cohort_size: int = 10
    """Clients a round."""
    eval_every: int = 1
    """Rounds from one evaluation to the next."""
    target: float | None = None
    """Rounds are counted until the mean of three evaluations in a row reaches this accuracy (or error, of a
    regression). None: the task's own, 0.8 for classification."""
    strategy: str = "auto"
    """How clients are run, which changes speed only: vectorized, sequential, chunked(c), debug; auto times them."""
    checkpoint_every: int = 10
    """Rounds from one checkpoint to the next; a stopped run goes on from its last one with --resume. 0: none."""
    out: str | None = None
    """Run folder; below runs/ and named by what is run if not given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationConfig(RunSettings):
    """How long, with how many clients a round, from which seed, and where the results go."""

    seed: int = 0
    """Of the initial parameters, the cohorts and the batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Methods, initial local rates and seeds that are compared."""

    methods: tuple[str, ...] = ("fedavg", "G", "SL", "CL", "G+SL", "G+CL")
    """Methods, see `fedhyper methods`; fedavg is what the others' speed-up is measured against."""
    local_rates: tuple[float, ...] = (0.01, 0.1)
    """Initial local rates."""
    seeds: int | tuple[int, ...] = 3
    """One number n stands for the seeds 0 to n-1; several are the seeds themselves."""

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds one by one."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run of one method.

    Example:
      >>> config = RunConfig(method=MethodConfig(name="SL", local_rate=0.01))
      >>> config.folder
      'runs/digits-SL-0.01-seed0'
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    work: WorkConfig = WorkConfig()
    method: MethodConfig = MethodConfig()
    run: SimulationConfig = SimulationConfig()
    deployment: DeploymentConfig = dataclasses.field(default_factory=DeploymentConfig)

    @property
    def folder(self) -> str:
        """Where the results go."""
        return self.run.out or f"runs/{self.data.name}-{self.method.name}-{self.method.local_rate}-seed{self.run.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Several methods from several initial local rates, with several seeds each.

    Example:
      >>> CompareConfig(compare=GridConfig(seeds=2)).compare.seed_list
      (0, 1)
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    work: WorkConfig = WorkConfig()
    method: MethodSettings = MethodSettings()
    run: RunSettings = RunSettings()
    deployment: DeploymentConfig = dataclasses.field(default_factory=DeploymentConfig)
    compare: GridConfig = GridConfig()

    @property
    def folder(self) -> str:
        """Where the results go."""
        return self.run.out or f"runs/compare-{self.data.name}"


Config = RunConfig | CompareConfig
COMMANDS: dict[str, type] = {"run": RunConfig, "compare": CompareConfig}
"""Configurations by the command that takes them; a file says which it is for in its first line."""


def command_of(config: Config) -> str:
    """The command that a configuration is for."""
    return next(command for command, cls in COMMANDS.items() if isinstance(config, cls))


def to_toml(config: Config, *, preset: str | None = None) -> str:
    """A configuration as TOML; `from_toml` gives it back exactly.

    Args:
      config: for either command.
      preset: name of the preset that this is, unchanged; a note for the reader of the file.

    Example:
      >>> print(to_toml(RunConfig()).splitlines()[0])
      command = "run"
      >>> from_toml(to_toml(RunConfig())) == RunConfig()
      True
    """
    notes = {"command": command_of(config), **({"preset": preset} if preset else {})}
    return tomli_w.dumps({**notes, **table_of(config)})


def from_toml(text: str, command: str | None = None, *, source: str = "the configuration") -> Config:
    r"""Reads a configuration; what the file leaves out takes its default.

    Args:
      text: TOML.
      command: "run" or "compare", for a text that does not say so itself.
      source: what messages call the text.

    Raises:
      ConfigError: not TOML, unknown keys (the known ones are listed), wrong types, another command's configuration.

    Example:
      >>> from_toml('command = "run"\n[run]\nrounds = 7').run.rounds
      7
    """
    try:
        table: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from None
    table.pop("preset", None)
    named = table.pop("command", command)
    if not isinstance(named, str) or named not in COMMANDS:
        raise ConfigError(f"{source} must say what it is for: its first line is one of command = 'run' or 'compare'")
    if command is not None and named != command:
        raise ConfigError(f"{source} is a configuration of `fedhyper {named}`, not of `fedhyper {command}`")
    try:
        return from_table(COMMANDS[named], table)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def load_config(path: str | os.PathLike[str], command: str | None = None) -> Config:
    """Reads the configuration file at ``path``, see `from_toml`.

    Raises:
      ConfigError: no such file, or whatever `from_toml` refuses.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the configuration {os.fspath(path)}: {reason}") from None
    return from_toml(text, command, source=os.fspath(path))
