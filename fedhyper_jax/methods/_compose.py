"""From names to algorithms."""

import inspect
from typing import Any

import optax

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.data import LocalWork
from fedhyper_jax.engine import Strategy, federated_algorithm
from fedhyper_jax.methods._parts import Parts
from fedhyper_jax.methods._table import METHODS
from fedhyper_jax.methods.fedhyper import SCHEDULERS, fedhyper_parts
from fedhyper_jax.parts import FailureModel, Guard, rates


def parse_method(name: str) -> tuple[str, ...]:
    """The methods that a name joins.

    Raises:
      ValueError: an unknown method (the known ones are listed), or one named twice.

    Example:
      >>> parse_method("scaffold+fedexp")
      ('scaffold', 'fedexp')
    """
    names = tuple(name.split("+")) if isinstance(name, str) else (name,)
    for part in names:
        _validate.one_of(METHODS, method=part)
    if len(set(names)) < len(names):
        raise ValueError(f"method {name!r} names one twice; name each once")
    return names


def method_options(name: str) -> dict[str, Any]:
    """Names and defaults of the options that a method, or several joined by '+', take.

    Where several take a global rate, the server's step has the word: 'fedadam+G' starts from FedAdam's 0.1, in bounds
    relative to it.

    Example:
      >>> options = method_options("fedadam+fedprox+G")
      >>> options["proximal_weight"], options["global_rate"], options["global_bounds"]
      (0.1, 0.1, 'relative')
    """
    names = parse_method(name)
    options: dict[str, Any] = {}
    for part in names:
        for option, default in METHODS[part].options.items():
            options.setdefault(option, default)
    if any(METHODS[part].own_global_rate for part in names):
        options.pop("global_rate", None)
    else:  # whoever sets no rule of the global rate has FedAvg's constant one
        own = (METHODS[p].options.get("global_rate", 1.0) for p in names if METHODS[p].kind == "server step")
        options["global_rate"] = next(own, 1.0)
        if "global_bounds" in options and options["global_rate"] != 1.0:
            options["global_bounds"] = "relative"
    return options


def make_method(
    name: str,
    loss_fn: LossFunction,
    *,
    work: LocalWork,
    local_rate: Any,
    population: int | None = None,
    weighting: str = "examples",
    server_optimizer: optax.GradientTransformation | None = None,
    client_optimizer: optax.GradientTransformation | None = None,
    strategy: str | Strategy = "vectorized",
    schedule_rounds: int = rates.SCHEDULE_ROUNDS,
    failure_model: FailureModel | None = None,
    guard: Guard | None = None,
    **options: Any,
) -> FederatedAlgorithm:
    """Makes an algorithm by name; names joined by '+' compose.

    Args:
      name: a key of METHODS, or several joined by '+', e.g. 'fedprox+G' or 'scaffold+fedexp'.
      loss_fn: ``(params, batch) -> per-example losses (B,)``.
      work: `local_epochs` or `local_steps`.
      local_rate: β^0 > 0 (of delta_sgd and fedsls: where clients start; of fedsps: the cap).
      population: number of clients, for methods with a row per client.
      weighting: p_m by "examples" or "uniform".
      server_optimizer, client_optimizer, strategy, schedule_rounds: as in `fedavg`.
      failure_model, guard: as in `federated_algorithm`.
      **options: of the methods, see `method_options`; numbers may be traced, but for those of a plateau.

    Returns:
      The algorithm.

    Raises:
      ValueError: unknown methods and options, an option that is missing, two methods with a rule each for one thing,
        and whatever their parts refuse.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = make_method(
      ...     "scaffold+fedexp", loss_fn, work=local_steps(5, 8), local_rate=0.1, population=100, epsilon=0.01)
      >>> algorithm.init(0.5).clients["control_variates"].shape
      (100,)
    """
    names = parse_method(name)
    known = method_options(name)
    for option in options:
        if option not in known:
            raise ValueError(f"method {name!r} takes no {option}; it takes {', '.join(sorted(known)) or 'none'}")
    _check_reference(name, names, server_optimizer)
    given = {
        "local_rate": local_rate,
        "population": population,
        "schedule_rounds": schedule_rounds,
        "weighting": weighting,
        **{option: known[option] for option in ("global_rate", "global_bounds") if option in known},
        **options,
    }

    merged: Parts = {"weighting": weighting, "terms": ()}
    owners: dict[str, str] = {}
    if server_optimizer is not None:
        merged["server_optimizer"], owners["server_optimizer"] = server_optimizer, "server_optimizer"
    schedulers = frozenset(names) & frozenset(SCHEDULERS)
    pieces = [(part, _parts_of(part, given)) for part in names if part not in schedulers]
    if schedulers:
        pieces.append(("+".join(part for part in names if part in schedulers), _fedhyper(schedulers, given, pieces)))
    for part, piece in pieces:
        for slot, value in piece.items():
            if slot == "terms":
                merged["terms"] += value
            elif slot in owners:
                raise ValueError(
                    f"{owners[slot]} and {part} both set the {slot.replace('_', ' ')}, and two rules for one thing "
                    f"cannot both act; leave one out of {name!r}"
                )
            else:
                merged[slot] = value
                if slot in ("global_rate", "local_rate", "client_rule", "server_optimizer"):
                    owners[slot] = part
    merged.setdefault("global_rate", given.get("global_rate"))
    merged.setdefault("local_rate", local_rate)
    for rate in ("global_rate", "local_rate"):
        merged[rate] = rates.as_rate_rule(merged[rate], rounds=schedule_rounds, name=rate)
    return federated_algorithm(
        loss_fn,
        work=work,
        client_optimizer=client_optimizer,
        failure_model=failure_model,
        guard=guard,
        strategy=strategy,
        **merged,
    )


def _check_reference(name: str, names: tuple[str, ...], server_optimizer: Any) -> None:
    """Raises ValueError where the authors' code, which fixes rates and server step, is joined with others of them."""
    fixed = [part for part in names if METHODS[part].kind == "authors' code"]
    others = [part for part in names if part not in fixed[:1] and METHODS[part].kind != "client drift"]
    if fixed and (others or server_optimizer is not None):
        other = others[0] if others else "server_optimizer"
        raise ValueError(
            f"{fixed[0]} fixes both rates and the server's step as the authors' code has them; leave {other} out of "
            f"{name!r}, or use the paper's schedulers"
        )


def _parts_of(part: str, given: dict[str, Any]) -> Parts:
    parameters = inspect.signature(METHODS[part].parts).parameters
    if "population" in parameters and given["population"] is None:
        raise ValueError(f"{part} keeps a row for each client; give population, their number")
    return METHODS[part].parts(**{name: given[name] for name in parameters if name in given})


def _fedhyper(schedulers: frozenset[str], given: dict[str, Any], pieces: list[tuple[str, Parts]]) -> Parts:
    """The parts of the schedulers; CL alone starts its rounds from another method's rule of the local rate."""
    taken = {name: given[name] for name in inspect.signature(fedhyper_parts).parameters if name in given}
    if given.get("client_rates") != "per_client":
        taken.pop("population")
    if "SL" not in schedulers:
        rules = [piece["local_rate"] for _, piece in pieces if "local_rate" in piece]
        taken["local_rate"] = rules[0] if rules else given["local_rate"]
    parts = fedhyper_parts(schedulers, **taken)
    # Constant rates are nobody's: another method may have a rule for them.
    kept = {"global_rate": "G" in schedulers, "local_rate": "SL" in schedulers or given.get("client_rates") == "warm"}
    parts = {slot: value for slot, value in parts.items() if value is not None and kept.get(slot, True)}
    if "inner_product" in given:
        parts["inner_product"] = given["inner_product"]
    return parts
