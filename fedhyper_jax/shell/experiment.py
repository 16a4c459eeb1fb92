"""From a configuration to the objects that it names; what `fedhyper run` and `fedhyper compare` share."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from fedhyper_jax import _validate, models
from fedhyper_jax.base import FederatedAlgorithm, LossFunction, Model, Params
from fedhyper_jax.data import (
    LOADERS,
    PARTITIONERS,
    Dataset,
    FederatedData,
    LocalWork,
    Partition,
    check_cohort_size,
    hold_out,
    load,
    local_epochs,
    local_steps,
    make_partition,
    pack,
)
from fedhyper_jax.engine import agreed, divided, fastest, parse_strategy, strategy_candidates, time_strategies
from fedhyper_jax.methods import METHODS, make_method, method_options, parse_method
from fedhyper_jax.parts import server_optimizers
from fedhyper_jax.shell.cache import recall, remember
from fedhyper_jax.shell.config import (
    CompareConfig,
    Config,
    ConfigError,
    DataConfig,
    MethodSettings,
    ModelConfig,
    RunConfig,
    WorkConfig,
)
from fedhyper_jax.shell.records import environment
from fedhyper_jax.tasks import Evaluation, EvaluationData, losses, make_evaluation, metrics


def _rated(factory: Callable[[], optax.GradientTransformation], own_rate: float):
    """A server optimizer of rate 1 as a function of its own rate, None being the default."""
    return lambda rate: optax.chain(factory(), optax.scale(own_rate if rate is None else rate))


SERVER_OPTIMIZERS: dict[str, Callable[[float | None], optax.GradientTransformation | None]] = {
    "sgd": lambda rate: None if rate is None else optax.sgd(rate),
    "momentum": _rated(server_optimizers.momentum, 1.0),
    "adam": _rated(server_optimizers.adam, 0.01),
    "adam_corrected": _rated(functools.partial(server_optimizers.adam, bias_correction=True), 0.01),
    "adagrad": _rated(server_optimizers.adagrad, 0.01),
    "yogi": _rated(server_optimizers.yogi, 0.01),
    "dog": _rated(server_optimizers.dog, 1.0),
    "mechanic": _rated(server_optimizers.mechanic, 1.0),
}
"""Server optimizers by name: functions of their own rate or None; sgd without a rate is left to the method."""

CLIENT_OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1.0),
    "momentum": lambda: optax.sgd(1.0, momentum=0.9),
}
"""Client optimizers by name."""


AUTO = "auto"
"""The strategy that is chosen by timing throw-away rounds."""


class Experiment(NamedTuple):
    """Everything that a configuration names, ready to run.

    Attributes:
      dataset: examples before they are divided.
      partition: who owns which.
      data: the federated training data.
      model: the model.
      loss_fn: its loss.
      evaluate: see `make_evaluation`.
      evaluation_data: the server's test set and, if asked for, the clients' examples.
      make_algorithm: ``make_algorithm(method, local_rate, **options) -> FederatedAlgorithm``; the options replace the
        configuration's, and all may be traced.
      start: ``start(seed) -> (parameters, key of the run)``.
    """

    dataset: Dataset
    partition: Partition
    data: FederatedData
    model: Model
    loss_fn: LossFunction
    evaluate: Evaluation
    evaluation_data: EvaluationData
    make_algorithm: Callable[..., FederatedAlgorithm]
    start: Callable[[int], tuple[Params, Array]]


def build_experiment(config: Config) -> Experiment:
    """Loads, divides and assembles what a configuration names; nothing is compiled or run.

    Args:
      config: of a run or of a comparison.

    Returns:
      The `Experiment`. Every method and rate of the configuration has been made once, so that all are known to work.

    Raises:
      ConfigError: anything that the configuration gets wrong, or data that are not there; the message is one line.

    Example:
      >>> from fedhyper_jax.shell.config import RunConfig
      >>> experiment = build_experiment(RunConfig())
      >>> experiment.data.population, experiment.dataset.num_classes
      (100, 10)
    """
    try:
        _check_numbers(config)
        dataset, partition = build_partition(config.data)
        data = pack(dataset.train, partition.client_rows)
        clients = data
        if config.data.hold_out:
            data, clients = hold_out(data, config.data.hold_out, seed=config.data.partition_seed)
        check_cohort_size(config.run.cohort_size, data.population)
        model = make_model(config.model, dataset.num_classes)
        loss_fn = losses.cross_entropy(model)
        experiment = Experiment(
            dataset=dataset,
            partition=partition,
            data=data,
            model=model,
            loss_fn=loss_fn,
            evaluate=make_evaluation(metrics.classification(model)),
            evaluation_data=EvaluationData(
                test={name: jnp.asarray(array) for name, array in dataset.test.items()},
                clients=clients if config.data.evaluate_clients else None,
            ),
            make_algorithm=_algorithm_factory(loss_fn, config, data.population),
            start=functools.partial(_start, jax.jit(model.init), jnp.asarray(dataset.train["x"][:1])),
        )
        for method, local_rate in _cells(config):
            experiment.make_algorithm(method, local_rate)
        # shapes that the model refuses
        jax.eval_shape(lambda: experiment.start(0)[0])
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(one_line(error)) from error
    return experiment


def one_line(error: BaseException) -> str:
    """The message of an error on one line; indented lines become a list with commas."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ", ".join(lines).replace(":, ", ": ")


def build_partition(config: DataConfig) -> tuple[Dataset, Partition]:
    """Loads the data set of a configuration and divides its training examples.

    Raises:
      ValueError: unknown names, settings that the data set or the partitioner refuses.
      FileNotFoundError: files that are not there; the message says what to install.

    Example:
      >>> dataset, partition = build_partition(DataConfig(clients=20))
      >>> dataset.name, partition.num_clients
      ('digits', 20)
    """
    _validate.one_of(LOADERS, **{"data set": config.name})
    _validate.one_of(PARTITIONERS, partitioner=config.partitioner)
    taken = inspect.signature(LOADERS[config.name]).parameters
    settings = {}
    if config.source is not None:
        settings["source"] = config.source
    if config.folder is not None:
        # TensorFlow Datasets calls its folder data_dir
        settings["folder" if "folder" in taken and config.source != "tfds" else "data_dir"] = config.folder
    for setting, flag in (("source", "source"), ("folder", "folder"), ("data_dir", "folder")):
        if setting in settings and setting not in taken:
            raise ValueError(f"data set {config.name!r} takes no {flag}; leave it out")
    if "num_clients" in taken:  # made-up data, client by client
        settings |= {"num_clients": config.clients, "seed": config.partition_seed}
    dataset = load(config.name, **settings)

    partition = make_partition(
        config.partitioner,
        dataset.train["y"],
        config.clients,
        client_ids=dataset.train_client_ids,
        seed=config.partition_seed,
        **_partitioner_settings(config),
    )
    return dataset, partition


def _partitioner_settings(config: DataConfig) -> dict[str, Any]:
    """The settings that the partitioner takes; one that it does not take may not differ from its default."""
    taken = inspect.signature(PARTITIONERS[config.partitioner]).parameters
    settings = {}
    for name in ("alpha", "shards_per_client", "distribution", "skew", "min_examples"):
        value = getattr(config, name)
        if name in taken:
            settings[name] = value
        elif value != getattr(DataConfig, name):
            raise ValueError(f"partitioner {config.partitioner!r} takes no {name}, got {value!r}; leave it out")
    return settings


def make_model(config: ModelConfig, num_classes: int) -> Model:
    """The model of a configuration; settings that are None are left to the model."""
    _validate.one_of(models.MODELS, model=config.name)
    own = ("name", "compute_dtype")
    settings = {name: value for name, value in vars(config).items() if name not in own and value is not None}
    model = models.make_model(config.name, num_classes, **settings)
    return model if config.compute_dtype is None else models.compute_in(model, config.compute_dtype)


def make_work(config: WorkConfig) -> LocalWork:
    """The local work of a configuration."""
    if config.local_epochs is not None and config.local_steps is not None:
        raise ValueError(
            f"give local_epochs or local_steps, not both, got {config.local_epochs} and {config.local_steps}; "
            "--local-steps None takes one back"
        )
    if config.local_steps is not None:
        return local_steps(config.local_steps, config.batch_size, with_replacement=config.with_replacement)
    if config.with_replacement:
        raise ValueError("with_replacement goes with local_steps; epochs visit each example once")
    return local_epochs(10 if config.local_epochs is None else config.local_epochs, config.batch_size)


def _start(init: Callable[[Array, Array], Params], inputs: Array, seed: int) -> tuple[Params, Array]:
    init_key, run_key = jax.random.split(jax.random.key(seed))
    return init(init_key, inputs), run_key


def choose_strategy(
    config: Config, one_round: Callable[[str], Callable[[], Any]], *, rounds: int, devices: int | None = None
) -> tuple[str, dict[str, Any]]:
    """The strategy of a run.

    Args:
      config: whose strategy may be "auto"; then candidates are timed.
      one_round: see `time_strategies`.
      rounds: of the run that is to come.
      devices: that share a cohort; all of all processes if None.

    Returns:
      Its name, and what the run folder records of the choice.
    """
    asked, devices = config.run.strategy, jax.device_count() if devices is None else devices
    if asked != AUTO:
        used = divided(asked, devices)
        return used, {"asked": asked, "used": used}
    candidates = strategy_candidates(config.run.cohort_size, devices)
    question = _job_of(config)
    known = recall(question)
    position = int(agreed(candidates.index(known) if known in candidates else -1))
    if position >= 0:
        return candidates[position], {"asked": asked, "used": candidates[position], "timings": "of an earlier run"}
    timings = time_strategies(candidates, one_round, rounds=rounds)
    used = fastest(timings)
    if jax.process_index() == 0:
        remember(question, used)
    return used, {"asked": asked, "used": used, "timings": [timing._asdict() for timing in timings]}


def _job_of(config: Config) -> dict[str, Any]:
    """What the fastest strategy depends on: all but rates, seeds, the folder and how often is evaluated."""
    run, method = vars(config.run), vars(config.method)
    rates = ("local_rate", "options", *_OPTION_SETTINGS)
    return {
        "data": vars(config.data),
        "model": vars(config.model),
        "work": vars(config.work),
        "method": {name: value for name, value in method.items() if name not in rates},
        "run": {name: run[name] for name in ("rounds", "cohort_size")},
        "compare": vars(config.compare) if isinstance(config, CompareConfig) else None,
        "environment": environment(),
        "processes": jax.process_count(),
    }


def _algorithm_factory(loss_fn: LossFunction, config: Config, population: int) -> Callable[..., FederatedAlgorithm]:
    settings = config.method
    _validate.one_of(SERVER_OPTIMIZERS, server_optimizer=settings.server_optimizer)
    _validate.one_of(CLIENT_OPTIMIZERS, client_optimizer=settings.client_optimizer)
    names = list(dict.fromkeys(name for name, _ in _cells(config)))
    given = given_options(settings, names)
    if settings.server_optimizer == "mechanic":
        _check_step_of_its_own(settings, names)
    common = {
        "work": make_work(config.work),
        "population": population,
        "server_optimizer": SERVER_OPTIMIZERS[settings.server_optimizer](settings.server_optimizer_rate),
        "client_optimizer": CLIENT_OPTIMIZERS[settings.client_optimizer](),
        "weighting": settings.weighting,
        "strategy": "vectorized" if config.run.strategy == AUTO else parse_strategy(config.run.strategy),
        "schedule_rounds": max(2, config.run.rounds),
    }

    def make_algorithm(name: str, local_rate: Any, **options: Any) -> FederatedAlgorithm:
        taken = {option: value for option, value in given.items() if option in method_options(name)}
        return make_method(name, loss_fn, local_rate=local_rate, **{**common, **taken, **options})

    return make_algorithm


_OPTION_SETTINGS = ("global_rate", "hyper_rate", "global_bounds", "local_bounds", "decay_factor")
"""Settings that are options of methods; others stand in the table ``options``."""


def given_options(settings: MethodSettings, names: Sequence[str]) -> dict[str, Any]:
    """The options that a configuration gives, each taken by one of its methods at least.

    Args:
      settings: of the methods.
      names: of the methods, each a key of METHODS or several joined by '+'.

    Returns:
      Options by name, those that are settings of their own among them.

    Raises:
      ValueError: unknown methods; an option that none of them takes, or of the wrong kind.

    Example:
      >>> given_options(MethodSettings(hyper_rate=0.1, options={"proximal_weight": 0.01}), ["fedavg", "fedprox+G"])
      {'hyper_rate': 0.1, 'proximal_weight': 0.01}
    """
    taken = {option: default for name in names for option, default in method_options(name).items()}
    given = {name: value for name in _OPTION_SETTINGS if (value := getattr(settings, name)) is not None}
    for option, value in settings.options.items():
        if hasattr(MethodSettings, option):
            flag = option.replace("_", "-")
            raise ValueError(f"{option} is a setting of its own, not one of options; use --{flag}")
        given[option] = _as_kind_of(taken[option], value, option) if option in taken else value
    for option in given:
        if option not in taken:
            raise ValueError(_not_taken(option, names, taken))
    return given


def _as_kind_of(default: Any, value: float | str, option: str) -> float | int | str:
    """The value as an integer where the default is one; a word for a number, and the other way round, is refused."""
    if isinstance(default, str) != isinstance(value, str):
        kind = "a word" if isinstance(default, str) else "a number"
        raise ValueError(f"option {option} must be {kind}, got {value!r}; its default is {default!r}")
    return int(value) if isinstance(default, int) and float(value).is_integer() else value


def _not_taken(option: str, names: Sequence[str], taken: Iterable[str]) -> str:
    owners = [name for name, method in METHODS.items() if option in method.options]
    one = len(names) == 1
    problem = (
        f"{option} is of {', '.join(owners)}, not of {'' if one else 'any of '}{', '.join(names)}"
        if owners
        else f"unknown option {option!r} of {', '.join(names)}"
    )
    return f"{problem}; known: {', '.join(sorted(taken)) or 'none'}"


def _check_step_of_its_own(settings: MethodSettings, names: Sequence[str]) -> None:
    """Mechanic finds the sum of its own updates in the parameters, so nothing may scale them."""
    for setting in ("server_optimizer_rate", "global_rate"):
        if getattr(settings, setting) is not None:
            raise ValueError(f"server_optimizer 'mechanic' finds its own step, and {setting} scales it; leave it out")
    for name in names:
        for part in parse_method(name):
            if part == "G" or METHODS[part].kind in ("global rate", "authors' code"):
                raise ValueError(f"server_optimizer 'mechanic' finds its own step, and {part} scales it; use one")


def _cells(config: Config) -> list[tuple[str, float]]:
    """Every method with every initial local rate that the configuration asks for."""
    if isinstance(config, RunConfig):
        return [(config.method.name, config.method.local_rate)]
    return [(method, rate) for method in config.compare.methods for rate in config.compare.local_rates]


_MOST_SEEDS = 10_000


def _check_numbers(config: Config) -> None:
    """What no function further down would refuse, or only after much work."""
    run, method = config.run, config.method
    _validate.positive_integer(rounds=run.rounds, eval_every=run.eval_every, clients=config.data.clients)
    if not 0 < run.target_accuracy <= 1:
        raise ValueError(f"target_accuracy must lie in (0, 1], got {run.target_accuracy!r}; 0.8 is 80 %")
    if not 0 <= config.data.hold_out < 1:
        raise ValueError(f"hold_out must lie in [0, 1), got {config.data.hold_out!r}; 0 holds nothing out")
    for setting in ("decay_factor", "server_optimizer_rate"):
        if (value := getattr(method, setting)) is not None:
            _validate.positive(**{setting: value})
    if isinstance(config, RunConfig):
        seeds = (run.seed,)
    else:
        if isinstance(config.compare.seeds, int) and config.compare.seeds > _MOST_SEEDS:
            raise ValueError(f"seeds must be at most {_MOST_SEEDS} at once, got {config.compare.seeds}")
        seeds = config.compare.seed_list
        if run.strategy != AUTO and not parse_strategy(run.strategy).compiles:
            raise ValueError(f"strategy {run.strategy!r} runs without compilation; use it with `fedhyper run`")
        # (rates are float32: two that it cannot tell apart are one)
        rates = tuple(np.float32(rate) for rate in config.compare.local_rates)
        for name, values in (("methods", config.compare.methods), ("local_rates", rates)):
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"{name} must be one or more different values, got {list(getattr(config.compare, name))}"
                )
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must be a number ≥ 1 or different seeds, got {config.compare.seeds!r}")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seeds must be integers from 0 to 2**32 - 1, got {seed}")
    if not all(math.isfinite(rate) and rate > 0 for _, rate in _cells(config)):
        wrong = next(rate for _, rate in _cells(config) if not (math.isfinite(rate) and rate > 0))
        raise ValueError(f"local_rate must be finite and > 0, got {wrong!r}; give a positive number such as 0.1")
