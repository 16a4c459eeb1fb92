"""From the pieces of some methods, and what the user gives besides, to one algorithm."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import optax

from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.data import LocalWork
from fedhyper_jax.engine import Strategy, federated_algorithm
from fedhyper_jax.methods.pieces import Part, Pieces, Start
from fedhyper_jax.parts import Aggregator, ClientRule, FailureModel, Guard, LocalTerm, RateRule, aggregators, rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that every method takes besides its options; `fedavg` tells what they mean."""

    work: LocalWork | None = None
    local_rate: optax.ScalarOrSchedule | RateRule | None = None
    global_rate: optax.ScalarOrSchedule | RateRule | None = None
    population: int | None = None
    client_rule: ClientRule | None = None
    terms: Sequence[LocalTerm] = ()
    server_optimizer: optax.GradientTransformation | None = None
    client_optimizer: optax.GradientTransformation | None = None
    aggregator: Aggregator | None = None
    failure_model: FailureModel | None = None
    guard: Guard | None = None
    weighting: str = "examples"
    inner_product: str | None = None
    evaluate_at: str | None = None
    strategy: str | Strategy = "vectorized"
    schedule_rounds: int = rates.SCHEDULE_ROUNDS


SETTINGS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Settings)}
"""Fields of `Settings` by name."""


def assemble(loss_fn: LossFunction, parts: Sequence[Part], settings: Settings) -> FederatedAlgorithm:
    """Makes the algorithm of several methods: first who gives what, then rules of the rates, then of the clients.

    Args:
      loss_fn: ``(params, batch) -> per-example losses (B,)``.
      parts: the methods.
      settings: what the user gives besides; a part among them counts as one more method's.

    Raises:
      TypeError: no work, or no local rate where no method has one.
      ValueError: two rules for one thing, a global rate where none can be given, and whatever the parts refuse.
    """
    name = "+".join(part.line.name for part in parts)
    _check_authors(name, parts, settings)
    pieces = {part.line.name: part.make() for part in parts}
    given = {"client_rule": settings.client_rule and (lambda start: settings.client_rule)}
    given |= {slot: getattr(settings, slot) for slot in ("server_optimizer", "aggregator")}
    _, client_rule = _only("client_rule", pieces, given)
    _, server_optimizer = _only("server_optimizer", pieces, given)

    start = _start(name, parts, pieces, settings)
    global_rate, _ = _rate("global_rate", pieces, start)
    local_rate, owner = _rate("local_rate", pieces, start)
    start = dataclasses.replace(
        start, local_rate=local_rate.initial_rate, local_rule=local_rate, local_rate_owner=owner
    )
    _, client_rates_of = _only("client_rates_of", pieces)
    algorithm = federated_algorithm(
        loss_fn,
        work=settings.work,
        global_rate=global_rate,
        local_rate=local_rate,
        client_rule=client_rule and client_rule(start),
        client_rates_of=client_rates_of and client_rates_of(start),
        terms=[*_terms(pieces, start), *settings.terms],
        server_optimizer=server_optimizer,
        client_optimizer=settings.client_optimizer,
        aggregator=_aggregator(pieces, given),
        failure_model=settings.failure_model,
        guard=settings.guard,
        weighting=_agreed("weighting", pieces) or settings.weighting,
        inner_product=settings.inner_product or _inner_product(parts, pieces),
        evaluate_at=settings.evaluate_at
        or _agreed("evaluate_at", pieces)
        or _agreed("fallback_evaluate_at", pieces)
        or "last",
        strategy=settings.strategy,
    )
    algorithm.round.told = f"{name}, {algorithm.round.told}"
    return algorithm


def usual_global_rate(parts: Sequence[Part]) -> float:
    """α^0 if none is given: that of the first method that starts from another one than 1."""
    return next((part.line.global_rate for part in parts if part.line.global_rate != 1), 1.0)


def _check_authors(name: str, parts: Sequence[Part], settings: Settings) -> None:
    """Raises ValueError where the authors' code, which fixes rates and server step, is joined with others of them."""
    fixed = [part.line.name for part in parts if part.line.kind == "authors' code"]
    if not fixed:
        return
    others = [part.line.name for part in parts if part.line.name != fixed[0] and part.line.kind != "client drift"]
    slots = ("server_optimizer", "client_rule", "aggregator")
    others += [slot for slot in slots if getattr(settings, slot) is not None]
    if others:
        raise ValueError(
            f"{fixed[0]} fixes both rates and the server's step as the authors' code has them; leave {others[0]} out "
            f"of {name!r}, or use the paper's schedulers"
        )


def _start(name: str, parts: Sequence[Part], pieces: dict[str, Pieces], settings: Settings) -> Start:
    """Where both rates start, as given or as the methods have it."""
    if settings.work is None:
        raise TypeError(f"{name} is given no work; give what clients do in a round, e.g. work=local_epochs(1, 32)")
    local_rate = settings.local_rate
    if local_rate is None:
        local_rate = next((part.line.local_rate for part in parts if part.line.local_rate is not None), None)
    if local_rate is None:
        raise TypeError(f"{name} is given no local_rate; give the clients' learning rate, e.g. local_rate=0.1")
    for part in parts:
        if part.line.own_global_rate and settings.global_rate is not None:
            raise ValueError(
                f"{name!r} takes no global_rate: {part.line.own_global_rate}; leave {settings.global_rate!r} out"
            )
    usual = usual_global_rate(parts)
    return Start(
        local_rate=local_rate,
        global_rate=usual if settings.global_rate is None else settings.global_rate,
        usual_global_rate=usual,
        population=settings.population,
        weighting=settings.weighting,
        schedule_rounds=settings.schedule_rounds,
        warm=any(piece.warm for piece in pieces.values()),
    )


def _only(slot: str, pieces: dict[str, Pieces], given: dict[str, Any] | None = None) -> tuple[str | None, Any]:
    """Who gives a part, and the part; None and None where nobody does.

    Raises:
      ValueError: several do.
    """
    found = [(name, value) for name, piece in pieces.items() if (value := getattr(piece, slot)) is not None]
    if given and given.get(slot) is not None:
        found.append((f"the argument {slot}", given[slot]))
    if len(found) > 1:
        (first, _), (second, _) = found[:2]
        raise ValueError(
            f"{first} and {second} both set the {slot.replace('_', ' ')}, and two rules for one thing cannot both act; "
            "leave one out"
        )
    return found[0] if found else (None, None)


def _agreed(slot: str, pieces: dict[str, Pieces]) -> str | None:
    """A word that several methods may say, if it is the same."""
    words = {name: word for name, piece in pieces.items() if (word := getattr(piece, slot)) is not None}
    if len(set(words.values())) > 1:
        said = ", ".join(f"{word!r} for {name}" for name, word in words.items())
        raise ValueError(f"{slot} is {said}, and cannot be both; leave one method out")
    return next(iter(words.values()), None)


def _rate(slot: str, pieces: dict[str, Pieces], start: Start) -> tuple[RateRule, str | None]:
    """The rule of a rate, and who moves it; None where it is a number that nobody moves."""
    owner, make = _only(slot, pieces)
    rate = getattr(start, slot)
    kind = "a rule" if isinstance(rate, RateRule) else "a schedule" if callable(rate) else None
    if owner and kind:
        raise ValueError(
            f"{slot} is {kind}, but {owner} moves it already: two rules for one rate; give a number, or leave {owner} "
            "out"
        )
    if slot == "local_rate" and start.warm:
        if kind or (owner and not pieces[owner].goes_on_warm):
            asking = next(piece.warm for piece in pieces.values() if piece.warm)
            mover = f"{kind} as local_rate" if kind else owner
            raise ValueError(
                f"{asking} needs a number as local_rate: rates go on from the last ones; leave {asking} or {mover} out"
            )
        if not owner:
            owner, make = _only("fallback_local_rate", pieces)
    if slot == "global_rate" and not make and not kind:
        owner, make = _only("fallback_global_rate", pieces)
    if make:
        return make(start), owner
    return rates.as_rate_rule(rate, rounds=start.schedule_rounds, name=slot), f"{kind} as {slot}" if kind else None


def _terms(pieces: dict[str, Pieces], start: Start) -> list[LocalTerm]:
    return [
        term for piece in pieces.values() for term in (piece.terms(start) if callable(piece.terms) else piece.terms)
    ]


def _aggregator(pieces: dict[str, Pieces], given: dict[str, Any]) -> Aggregator | None:
    """Of one method or of the user, inside of what others put around it, the first method outermost."""
    _, aggregator = _only("aggregator", pieces, given)
    for piece in reversed(pieces.values()):
        if piece.around_aggregator:
            aggregator = piece.around_aggregator(aggregators.mean() if aggregator is None else aggregator)
    return aggregator


def _inner_product(parts: Sequence[Part], pieces: dict[str, Pieces]) -> str:
    """One product is fed to the rules of both rates: whoever names one decides; two names contradict each other."""
    named = {part.line.name: given for part in parts if (given := part.given.get("inner_product")) is not None}
    if len(set(named.values())) > 1:
        said = ", ".join(f"{value!r} for {name}" for name, value in named.items())
        raise ValueError(f"inner_product is {said}, but the rules of both rates are fed the same one; give it once")
    return next((piece.inner_product for piece in pieces.values() if piece.inner_product), "pseudo_gradient")
