"""Methods that differ in hyper rates alone: one program runs them all, since κ = 0 is to be without a scheduler."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from fedhyper_jax.methods.pieces import Part, Pieces
from fedhyper_jax.methods.table import method_by_name
from fedhyper_jax.methods.values import Method

_ADDED = ("G", "SL")
"""What can be added to other methods with κ = 0: it changes no bit of a run, and costs one scalar a round."""


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Methods that are one method with other hyper rates.

    Attributes:
      name: of that one method.
      hyper_rates: of every method of the family by its name, as the one method takes them: κ by scheduler, 0 for those
        that the method is without.
    """

    name: str
    hyper_rates: dict[str, dict[str, Any]]


def method_families(names: Sequence[str], **options: Any) -> list[Family]:
    """Divides methods into families, each of which one compiled program can run: hyper rates are data.

    A method and the same with G, SL or both are a family. CL makes another: what it computes in every local step costs
    time whatever its κ, and clients would be sent Δ^{t-1} for nothing. Neither do G and SL join what they change beside
    their rates: which inner product is recorded, where rates begin that go on from the clients' last ones, or who moves
    the global rate (`retained_gain` does where nobody else will).

    Args:
      names: keys of METHODS, or several joined by '+'.
      **options: of the methods; each gets those that it takes.

    Returns:
      The families in the order of their first methods; each method is in one of them.

    Example:
      >>> for family in method_families(["fedavg", "CL", "G", "G+CL", "fedprox"], hyper_rate=0.5):
      ...     print(family.name, family.hyper_rates)
      G {'fedavg': {'G': 0.0}, 'G': {'G': 0.5}}
      CL+G {'CL': {'CL': 0.5, 'G': 0.0}, 'G+CL': {'CL': 0.5, 'G': 0.5}}
      fedprox {'fedprox': {}}
      >>> [family.name for family in method_families(["retained_gain", "retained_gain+G"])]
      ['retained_gain', 'retained_gain+G']
    """
    groups: dict[tuple[str, ...], dict[str, Method]] = {}
    for name in names:
        method = method_by_name(name)
        taken = {option for part in method.parts for option in part.line.defaults}
        method = method(**{option: value for option, value in options.items() if option in taken})
        groups.setdefault(_rest(method), {})[name] = method
    return [_family(rest, members) for rest, members in groups.items()]


def _rest(method: Method) -> tuple[str, ...]:
    """The names of a method's parts less those that others of its family may be without."""
    pieces = [part.make() for part in method.parts]
    warm, falls_back = any(piece.warm for piece in pieces), any(piece.fallback_global_rate for piece in pieces)
    return tuple(part.line.name for part in method.parts if not _can_go(part, warm, falls_back))


def _can_go(part: Part, warm: bool, falls_back: bool) -> bool:
    """Whether a method without a part is the same as with it at κ = 0."""
    if part.line.name not in ("fedavg", *_ADDED):
        return False
    pieces = part.make()
    others = dataclasses.replace(pieces, global_rate=None, local_rate=None, goes_on_warm=False)
    return others == Pieces() and not (warm and pieces.local_rate) and not (falls_back and pieces.global_rate)


def _family(rest: tuple[str, ...], members: dict[str, Method]) -> Family:
    parts = {name: {part.line.name: part for part in method.parts} for name, method in members.items()}
    added = [name for name in _ADDED if name not in rest and any(name in own for own in parts.values())]
    name = "+".join([*rest, *added]) or "fedavg"
    movers = [part.line.name for part in method_by_name(name).parts if "hyper_rate" in part.line.defaults]
    return Family(
        name,
        {
            member: {mover: own[mover].options["hyper_rate"] if mover in own else 0.0 for mover in movers}
            for member, own in parts.items()
        },
    )
