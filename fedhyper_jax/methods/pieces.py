"""The pieces that one method gives to an algorithm, and what it may know of the others when they are put together."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from fedhyper_jax.parts import Aggregator, ClientRule, LocalTerm, RateRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Facts that a method may know of the algorithm that it becomes a part of.

    Attributes:
      local_rate: β^0. Rules of the local rate get it as it was given; what is made after them (client rules and rows)
        gets the rate with which the rule of the local rate begins.
      global_rate: α^0.
      usual_global_rate: α^0 where the user gives none: 1, or where one of the methods starts from another rate that.
      population: number of clients; None where nobody gave it.
      weighting: p_m by "examples", "uniform" or "weights", as the user asked.
      schedule_rounds: length of the tables of schedules.
      warm: whether a method asks that rounds start from the mean of the clients' last rates.
      local_rule: rule of the local rate; None until it is made.
      local_rate_owner: who made that rule; None where the local rate is a number that nobody moves.
    """

    local_rate: Any
    global_rate: Any
    usual_global_rate: float
    population: int | None
    weighting: str
    schedule_rounds: int
    warm: bool
    local_rule: RateRule | None = None
    local_rate_owner: str | None = None

    def rows(self, own: int | None, who: str) -> int:
        """Number of rows of a method that keeps one for each client: its own option, else the run's population.

        Args:
          own: the method's option ``population``.
          who: beginning of the message, e.g. "scaffold keeps a row for each client".

        Raises:
          ValueError: neither is given.
        """
        number = self.population if own is None else own
        if number is None:
            raise ValueError(f"{who}; give population, their number")
        return number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """Pieces that one method gives; what is None is left to others. Two methods cannot give the same thing.

    Attributes:
      global_rate: makes the rule of α.
      local_rate: makes the rule of the broadcast β.
      fallback_global_rate, fallback_local_rate: the same, for where nobody else moves the rate.
      goes_on_warm: whether ``local_rate`` minds `Start.warm`.
      warm: the option that asks that rounds start from the mean of the clients' last rates.
      client_rule: makes the rule of β between local steps.
      client_rates_of: makes the number of clients whose rates go on from round to round, each its own.
      terms: what is added to local objective and aggregation, or a function that makes them; those of several methods
        are joined.
      server_optimizer: of the pseudo-gradient.
      aggregator: how client updates become one.
      around_aggregator: changes the aggregator of whatever stands beside it.
      weighting: p_m, whatever the user asked; several may agree on it.
      inner_product: what the rules of the rates are fed; None leaves "pseudo_gradient".
      evaluate_at: which parameters are evaluated, unless the user says so.
      fallback_evaluate_at: the same, for where no other method says so.
    """

    global_rate: Callable[[Start], RateRule] | None = None
    local_rate: Callable[[Start], RateRule] | None = None
    fallback_global_rate: Callable[[Start], RateRule] | None = None
    fallback_local_rate: Callable[[Start], RateRule] | None = None
    goes_on_warm: bool = False
    warm: str | None = None
    client_rule: Callable[[Start], ClientRule] | None = None
    client_rates_of: Callable[[Start], int] | None = None
    terms: tuple[LocalTerm, ...] | Callable[[Start], tuple[LocalTerm, ...]] = ()
    server_optimizer: optax.GradientTransformation | None = None
    aggregator: Aggregator | None = None
    around_aggregator: Callable[[Aggregator], Aggregator] | None = None
    weighting: str | None = None
    inner_product: str | None = None
    evaluate_at: str | None = None
    fallback_evaluate_at: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Line:
    """A line of the table: all that is known of one method.

    Attributes:
      name: as in configurations.
      title: the method's name in the literature.
      kind: one of `KINDS`.
      equation: in the notation of docs/methods.md; Δ is old minus new.
      state: what is kept between rounds besides w, rates and Δ^{t-1}; d is the number of parameters, N of clients.
      communication: per client and round, besides the update up and the parameters (and one rate) down.
      source: where it was published.
      note: what a user should know of our version; may be empty.
      own_global_rate: why no global rate can be given; None where it can.
      global_rate: α^0 if not given.
      local_rate: β^0 if not given; None where it must be.
      pieces: ``pieces(**options) -> Pieces``.
      defaults: its options with their defaults.
    """

    name: str
    title: str
    kind: str
    equation: str
    state: str = "–"
    communication: str = "–"
    source: str
    note: str = ""
    own_global_rate: str | None = None
    global_rate: float = 1.0
    local_rate: float | None = None
    pieces: Callable[..., Pieces]
    defaults: dict[str, Any]


class Part(NamedTuple):
    """A method with the options that were given for it."""

    line: Line
    given: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        """All options. The population, which a run knows anyway, only where it is given."""
        options = {**self.line.defaults, **self.given}
        return {name: v for name, v in options.items() if name != "population" or v is not None}

    def make(self) -> Pieces:
        """The method's pieces with these options."""
        return self.line.pieces(**self.given)
