"""Contracts and aliases; no logic.

**The one sign convention.** A client that starts a round from the global parameters ``w`` and ends it at ``w_m`` has
made the update ``Δ_m = w − w_m``: *old minus new*, so it points where gradients point. The weighted mean
``Δ = Σ p_m Δ_m`` is the *pseudo-gradient* of the round, and the server descends: ``w ← w − α Δ``. Nothing in this
package stores "new minus old". FedHyper-G and -SL multiply two pseudo-gradients and cannot see the sign;
FedHyper-CL multiplies a gradient with a pseudo-gradient and can.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, get_type_hints

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from fedhyper_jax import _repr

PyTree = Any
Params = PyTree
Scalar = float | np.number | np.ndarray | Array
"""One number: Python's, NumPy's, or an array of no axes, which may be traced. Rates and settings are such."""
Range = tuple[Scalar, Scalar]
"""A lower and an upper bound."""
Batch = dict[str, Array]
"""Arrays with one leading example axis; by convention ``"x"`` holds inputs and ``"y"`` targets."""

Examples = dict[str, Any]
"""The same before they are drawn from: arrays of JAX or of NumPy with one leading axis."""

LossFunction = Callable[..., Float[Array, " batch"]]
"""``loss_fn(params, batch)``, or ``loss_fn(params, batch, key)`` where it draws random numbers, as for dropout.

One loss per example, not their mean; the trainer masks and averages. The key is new for each round, client and step.

It may have an attribute ``check(params, examples, rows=None, name="examples")``, which raises ValueError for examples
(those in ``rows``, if given) that compiled code would get wrong without a word. Those who run rounds call it before
they compile; the same goes for functions of metrics.
"""

NOT_FINITE = ("nothing", "its loss", "its rate", "its update", "the server's step")
"""Each by its number in `RoundInfo.left_out_because`."""

RATE_ROWS = "rate"
"""Name of the rows of per-client rates in `ServerState.clients`."""


class Model(NamedTuple):
    """The boundary to neural networks: two pure functions, whatever library wrote them.

    Attributes:
      init: ``init(key, inputs) -> params``; ``inputs`` is one batch, of which only shapes and dtypes matter.
      apply: ``apply(params, inputs) -> outputs``, one row per example.
      train: ``train(params, inputs, key) -> outputs``: the same in training, where that draws random numbers, as
        dropout does; None where it does not.
    """

    init: Callable[[Array, Any], Params]
    apply: Callable[[Params, Any], Array]
    train: Callable[[Params, Any, Array], Array] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ServerState:
    """State of a run between two rounds: what the next round needs, and nothing else.

    Settings are in it too (rates, κ, bounds, schedules, weights of terms): `FederatedAlgorithm.init` makes arrays of
    them, and a round goes by those of the state that it is given, whichever algorithm made it. To go on with other
    rates there is `FederatedAlgorithm.with_rates`; a field ``rate`` changed by hand a schedule or constant overwrites.

    Attributes:
      round: int32 scalar, the number of the next round, from 0.
      params: global parameters w^t.
      global_rate: state of the rule of the global rate α, which is moved first and then used; its field ``rate`` is
        α^{t-1}, that of the last round, or before round 0 where it starts.
      local_rate: state of the rule of the broadcast local rate β; its field ``rate`` is β^t.
      client_rule: settings of the rule that moves a client's rate between its local steps, as arrays.
      pseudo_gradient: Δ^{t-1}, the raw pseudo-gradient of the last round that had participants; zeros before it.
      server_optimizer: state of the server's optax optimizer.
      terms: the server's state of each term, by its name (SCAFFOLD's c, FedProx's μ, …).
      clients: by name, what each client keeps: arrays with a leading axis of the population (SCAFFOLD's c_m; ``"rate"``
        with per-client rates).
      aggregator: state of the aggregator.
      failures: settings of the failure model.
      guard: state of the guard.
      direction: u^{t-1}, the last update of the server's optimizer, negated; only where products are taken of it.
      evaluation: what is evaluated besides w^t: w^{t-1} for the mean of two iterates, or the running average.
    """

    round: Int[Array, ""]
    params: Params
    global_rate: PyTree
    local_rate: PyTree
    client_rule: PyTree
    pseudo_gradient: Params
    server_optimizer: PyTree
    terms: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    clients: dict[str, PyTree] = dataclasses.field(default_factory=dict)
    aggregator: PyTree = ()
    failures: PyTree = ()
    guard: PyTree = ()
    direction: PyTree = ()
    evaluation: PyTree = ()

    def __repr__(self) -> str:
        axes = _repr.shape(self.round)
        kept = [f"{name} of clients" for name in self.clients] if isinstance(self.clients, dict) else []
        names = [*self.terms, *kept] if isinstance(self.terms, dict) else kept
        rates = (_repr.number(getattr(rule, "rate", rule)) for rule in (self.global_rate, self.local_rate))
        return (
            f"<ServerState: {_repr.runs(axes)}next round {_repr.number(self.round)}, global rate {next(rates)}, "
            f"local rate {next(rates)}, {_repr.parameters(self.params, len(axes))}"
            f"{', '.join(['', *names])}>"
        )


class Number(NamedTuple):
    """How a number of a round is summed up over the rounds of a run, and told to people.

    Attributes:
      meaning: what it is.
      over_rounds: "total" where a run's summary adds it up, "last" where the last round's stands for the run, "each"
        where it is of its round alone.
      remark: what follows a total > 0 among the remarks of a table; empty where it deserves none.
      note: the same as a sentence below the summary of one run.
    """

    meaning: str
    over_rounds: str = "each"
    remark: str = ""
    note: str = ""


def _each(meaning: str) -> Number:
    return Number(meaning)


def _last(meaning: str) -> Number:
    return Number(meaning, "last")


def _total(meaning: str, remark: str = "", note: str = "") -> Number:
    return Number(meaning, "total", remark, note)


_Count = Int[Array, ""]
_Value = Float[Array, ""]


class RoundInfo(NamedTuple):
    """Everything observed in one round; none of it is needed by the next. All fields are scalars.

    Records of a run, their summaries, tables and pictures take names and meaning from here (`ROUND_NUMBERS`), so that
    a new number is a field here and its line in ``engine/observe.py``. Where a round has no participants, the summaries
    over participants are NaN.
    """

    round: Annotated[_Count, _each("number of this round, from 0")]
    global_rate: Annotated[_Value, _last("α^t as used")]
    local_rate: Annotated[_Value, _each("β^t as broadcast")]
    inner_product: Annotated[_Value, _each("⟨Δ^t, Δ^{t-1}⟩, or ⟨Δ^t, u^{t-1}⟩ with inner_product='applied'")]
    retained_share: Annotated[
        _Value, _each("share of the predicted gain that clients retained; 0 where nobody asks for it")
    ]
    pseudo_gradient_norm: Annotated[_Value, _each("‖Δ^t‖")]
    client_rate_min: Annotated[_Value, _each("smallest final β_m of the participants")]
    client_rate_median: Annotated[_Value, _last("median final β_m of the participants")]
    client_rate_max: Annotated[_Value, _each("largest final β_m of the participants")]
    global_rate_updates: Annotated[_Count, _total("updates of α by an adaptive rule this round (0 or 1)")]
    global_rate_clipped: Annotated[_Count, _total("of these, how many lay outside the bounds before clipping")]
    local_rate_updates: Annotated[_Count, _total("updates of β by adaptive rules, on the server and on participants")]
    local_rate_clipped: Annotated[_Count, _total("of these, how many lay outside the bounds before clipping")]
    client_loss: Annotated[
        _Value, _each("mean training loss over the participants' examples seen, at their current iterates")
    ]
    participants: Annotated[_Count, _total("clients whose update entered the average")]
    left_out: Annotated[
        _Count,
        _total(
            "clients that trained and are left out: update, loss or rate not finite",
            "client updates left out",
            "client updates were not finite and left out of the average",
        ),
    ]
    first_left_out: Annotated[_Count, _each("the id of the first of them in the cohort; -1 where there is none")]
    left_out_because: Annotated[
        _Count, _each("of it not finite: 1 its loss, 2 its rate, 3 its update; 4 the server's step; 0 nothing")
    ]
    not_started: Annotated[
        _Count,
        _total(
            "clients of the cohort that failed before their work",
            "clients did not start",
            "clients of the cohorts failed before their work",
        ),
    ]
    lost: Annotated[
        _Count,
        _total("clients whose update did not arrive", "client updates lost", "client updates did not arrive"),
    ]
    taken_back: Annotated[
        _Count,
        _total(
            "1 where the guard, or a rule of a rate, took the round back, else 0",
            "rounds taken back",
            "rounds were taken back",
        ),
    ]
    non_finite_products: Annotated[
        _Count,
        _total(
            "inner products that were not finite, and so moved no rate",
            "products not finite",
            "inner products were not finite and moved no rate",
        ),
    ]
    local_steps: Annotated[_Count, _total("local steps taken by the participants")]
    examples: Annotated[_Value, _total("examples those steps visited, with repetition")]
    bytes_up: Annotated[_Value, _total("from all participants: updates, and what terms and rules ask for")]
    bytes_down: Annotated[
        _Value, _total("to all that started: parameters, rate, Δ^{t-1} where needed, and what terms send")
    ]

    def __repr__(self) -> str:
        axes = _repr.shape(self.round)
        told = {name: getattr(self, name) for name in TOLD}
        if axes:
            return _repr.over_rounds(f"RoundInfo: {_repr.runs(axes[:-1])}{axes[-1]} rounds", told)
        numbers = ", ".join(f"{name} {_repr.number(value)}" for name, value in told.items())
        return f"<RoundInfo: round {_repr.number(self.round)}, {numbers}>"


TOLD = ("client_loss", "participants", "global_rate", "local_rate", "pseudo_gradient_norm")
"""Fields of `RoundInfo` that reprs tell."""

ROUND_NUMBERS: dict[str, Number] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(RoundInfo, include_extras=True).items()
}
"""Every field of `RoundInfo` with its `Number`."""

RoundInfo.__doc__ = f"{RoundInfo.__doc__}\n    Attributes:\n" + "".join(
    f"      {name}: {number.meaning}.\n" for name, number in ROUND_NUMBERS.items()
)

SHARES: dict[str, tuple[str, str]] = {
    "global_clipped_share": ("global_rate_clipped", "global_rate_updates"),
    "local_clipped_share": ("local_rate_clipped", "local_rate_updates"),
}
"""Shares that records and summaries derive: of which total they are, and in which."""


def no_diagnosis(state: ServerState, data: Any) -> None:
    """Nothing is known that would make rounds slow."""


def no_check(state: ServerState, data: Any) -> None:
    """Any data will do."""


def no_rates(state: ServerState) -> ServerState:
    """Nothing is known of the algorithm's rates."""
    raise ValueError("this algorithm does not say how a state gets its rates; begin with algorithm.init(params)")


def current_params(state: ServerState) -> Params:
    """The parameters w^t: what most algorithms evaluate."""
    return state.params


class FederatedAlgorithm(NamedTuple):
    """A federated algorithm is a pair of pure functions, and says which parameters of a state it stands for.

    Attributes:
      init: ``init(params) -> ServerState``.
      round: ``round(key, state, cohort) -> (ServerState, RoundInfo)``. ``key`` is the key of the *run*; the round
        folds its own number into it. An attribute ``told`` of it, if it has one, is what the algorithm's repr says.
      evaluated_params: ``evaluated_params(state) -> params`` to evaluate and keep: w^t, or for FedExP the mean of the
        last two iterates.
      diagnose: ``diagnose(state, data)`` warns of what will make rounds slow; it may remember what it said. Those who
        run rounds call it once before they compile; it is no part of the pure pair.
      check: ``check(state, data)`` raises ValueError for data that compiled rounds would get wrong without a word, such
        as labels that are no class. Called likewise.
      with_rates: ``with_rates(state) -> ServerState``: a state of an algorithm that differs from this one in its rates
        and their rules only, with those that this one starts with. Where a rate is a schedule it goes on at the
        state's round. Arrays that stay as they are belong to both states.

    Rates are data in the state, so a state keeps the rates of the algorithm that made it, also in rounds of another:

    Example:
      >>> import jax, numpy as np
      >>> from fedhyper_jax.data import local_steps, pack
      >>> from fedhyper_jax import fedavg, simulate
      >>> data = pack({"x": np.array([1.0, 3.0])}, [[0], [1]])
      >>> def made(local_rate):
      ...     return fedavg(lambda w, b: (w - b["x"]) ** 2 / 2, work=local_steps(1, 1), local_rate=local_rate)
      >>> fast, slow = made(0.5), made(0.25)
      >>> state, _ = simulate(fast, jax.random.key(0), fast.init(0.0), data, rounds=1, cohort_size=2)
      >>> float(state.params), float(state.local_rate.rate), float(slow.with_rates(state).local_rate.rate)
      (1.0, 0.5, 0.25)
      >>> state, _ = simulate(fast, jax.random.key(0), slow.with_rates(state), data, rounds=1, cohort_size=2)
      >>> float(state.params)  # the same compiled rounds, a quarter of the way from 1 to 2
      1.25
    """

    init: Callable[[Params], ServerState]
    round: Callable[[Array, ServerState, Any], tuple[ServerState, RoundInfo]]
    evaluated_params: Callable[[ServerState], Params] = current_params
    diagnose: Callable[[ServerState, Any], None] = no_diagnosis
    check: Callable[[ServerState, Any], None] = no_check
    with_rates: Callable[[ServerState], ServerState] = no_rates

    def __repr__(self) -> str:
        return f"<FederatedAlgorithm: {getattr(self.round, 'told', _repr.name_of(self.round))}>"
