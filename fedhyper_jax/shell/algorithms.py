"""From a configuration to algorithms: optimizers, options of methods, and the parts that a deployment asks for."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import optax

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.data import LocalWork, local_epochs, local_steps
from fedhyper_jax.engine import parse_strategy
from fedhyper_jax.methods import METHODS, Family, make_method, method_families, method_options, parse_method
from fedhyper_jax.parts import server_optimizers
from fedhyper_jax.shell.config import AUTO, CompareConfig, Config, MethodSettings, RunConfig, WorkConfig
from fedhyper_jax.shell.deployment import make_failures, make_guard
from fedhyper_jax.shell.records import plain


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


def make_work(config: WorkConfig) -> LocalWork:
    """The local work of a configuration."""
    if config.local_epochs is not None and config.local_steps is not None:
        raise ValueError(
            f"give local_epochs or local_steps, not both, got {config.local_epochs} and {config.local_steps}; "
            "--local-steps None removes one"
        )
    if config.local_steps is not None:
        return local_steps(config.local_steps, config.batch_size, with_replacement=config.with_replacement)
    if config.with_replacement:
        raise ValueError("with_replacement goes with local_steps; epochs visit each example once")
    return local_epochs(10 if config.local_epochs is None else config.local_epochs, config.batch_size)


def rate_bounds(algorithm: FederatedAlgorithm) -> dict[str, list[float | None] | None]:
    """The bounds of both rates, as the state of an algorithm has them.

    Returns:
      ``{"global": [lower, upper], "local": [lower, upper]}``; None for a rate that has none, and for an infinite end.
      The local rate's are those of its rule on the server, else those of its rule on the clients.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> rate_bounds(make_method("G", loss_fn, work=local_steps(1, 1), local_rate=0.1))
      {'global': [0.33333334, 3.0], 'local': None}
    """
    # Rules see nothing of the parameters but their dtype.
    state = algorithm.init(np.float32(0))
    client_rule = getattr(state.client_rule, "rule", state.client_rule)
    local = next((rule for rule in (state.local_rate, client_rule) if hasattr(rule, "upper")), None)
    return {"global": _bounds_of(state.global_rate), "local": _bounds_of(local)}


def _bounds_of(rule: Any) -> list[float | None] | None:
    return [plain(np.asarray(rule.lower)[()]), plain(np.asarray(rule.upper)[()])] if hasattr(rule, "upper") else None


def algorithm_factory(loss_fn: LossFunction, config: Config, population: int) -> Callable[..., FederatedAlgorithm]:
    """``make_algorithm(method, local_rate, **options)`` with everything else as the configuration has it.

    Args:
      loss_fn: per-example losses.
      config: of a run or of a comparison.
      population: number of clients.

    Returns:
      The function; its options replace the configuration's, and all may be traced.

    Raises:
      ValueError: unknown names, options that no method takes.

    Example:
      >>> make_algorithm = algorithm_factory(lambda w, batch: (w - batch["x"]) ** 2, RunConfig(), 100)
      >>> float(make_algorithm("SL", 0.05).init(0.5).local_rate.rate)
      0.05...
    """
    settings, deployment = config.method, config.deployment
    _validate.one_of(SERVER_OPTIMIZERS, server_optimizer=settings.server_optimizer)
    _validate.one_of(CLIENT_OPTIMIZERS, client_optimizer=settings.client_optimizer)
    _validate.one_of(("examples", "uniform"), weighting=settings.weighting)  # (no data set of a command has weights)
    names = list(dict.fromkeys(name for name, _ in cells(config)))
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
        "failure_model": make_failures(deployment),
        "guard": make_guard(deployment),
    }

    def make_algorithm(name: str, local_rate: Any, **options: Any) -> FederatedAlgorithm:
        taken = {option: value for option, value in given.items() if option in method_options(name)}
        return make_method(name, loss_fn, local_rate=local_rate, **{**common, **taken, **options})

    return make_algorithm


OPTION_SETTINGS = ("global_rate", "hyper_rate", "global_bounds", "local_bounds", "decay_factor")
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
    given = {name: value for name in OPTION_SETTINGS if (value := getattr(settings, name)) is not None}
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
    """The value as an integer where the default is one; a word for a number, and the other way round, is refused.

    A default of None stands for either, and the method itself refuses what it cannot take.
    """
    if default is not None and isinstance(default, str) != isinstance(value, str):
        kind = "a word" if isinstance(default, str) else "a number"
        raise ValueError(f"option {option} must be {kind}, got {value!r}; its default is {default!r}")
    return int(value) if isinstance(default, int) and float(value).is_integer() else value


def _not_taken(option: str, names: Sequence[str], taken: Iterable[str]) -> str:
    own = [METHODS[part].own_global_rate for name in names for part in parse_method(name)]
    if option == "global_rate" and any(own):
        return f"{', '.join(names)} takes no global_rate: {next(filter(None, own))}; leave it out"
    owners = [name for name, method in METHODS.items() if option in method.options]
    one = len(names) == 1
    if not owners:
        return f"unknown option {option!r} of {', '.join(names)}; {_validate.instead_of(option, sorted(taken))}"
    problem = f"{option} is of {', '.join(owners)}, not of {'' if one else 'any of '}{', '.join(names)}"
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


def compared_families(config: CompareConfig) -> list[Family]:
    """The methods of a comparison, divided into those that one compiled program can run; see `method_families`.

    Example:
      >>> [family.name for family in compared_families(CompareConfig())]
      ['G+SL', 'CL+G']
    """
    names = config.compare.methods
    return method_families(names, **given_options(config.method, names))


def cells(config: Config) -> list[tuple[str, float]]:
    """Every method with every initial local rate that the configuration asks for."""
    if isinstance(config, RunConfig):
        return [(config.method.name, config.method.local_rate)]
    return [(method, rate) for method in config.compare.methods for rate in config.compare.local_rates]
