"""The contracts: everything that can be swapped in a round, each a NamedTuple of pure functions.

A part's settings are arrays in the state that its ``init`` makes, so that they are data for one compiled program; a
part that keeps nothing has the state ``()`` and costs nothing. One round asks them in this order:

  * `FailureModel.before`: which clients of the cohort start, and how many steps they get;
  * `ClientRule` and `LocalTerm`: what a client's local steps are;
  * `FailureModel.after`: which updates arrive;
  * `Aggregator`: what becomes of them, `LocalTerm.conclude`: what the method adds to it;
  * `RateRule`: which rates follow;
  * `Guard`: whether the round counts.

`Participation` draws the cohort, before all of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from fedhyper_jax.base import Params, PyTree


def no_state(params: Params) -> PyTree:
    """The state of a part that keeps nothing."""
    del params
    return ()


# ------------------------------------------------------------------------------------------------ rates


class RateReport(NamedTuple):
    """Doings of a rule in a round; int32 scalars.

    Attributes:
      updates: adaptive updates, that with product 0 in round 0 included; none with κ = 0.
      clipped: of these, values outside the bounds before clipping.
      non_finite: products that were not finite, and so moved nothing.
    """

    updates: Int[Array, ""]
    clipped: Int[Array, ""]
    non_finite: Int[Array, ""]

    @classmethod
    def none(cls) -> "RateReport":
        """Nothing moved."""
        return cls(*(jnp.zeros((), jnp.int32) for _ in cls._fields))

    @classmethod
    def one(cls, *, clipped: Bool[Array, ""], finite: Bool[Array, ""]) -> "RateReport":
        """One update, or none where its feedback was not finite."""
        return cls(finite.astype(jnp.int32), (clipped & finite).astype(jnp.int32), (~finite).astype(jnp.int32))


class Spread(NamedTuple):
    """How far the updates of a round's clients lie apart, for what a mean of them cannot tell.

    Attributes:
      squared_norm: Σ p_m² ‖Δ_m‖².
      squared_weight: Σ p_m²; 1 of a single participant, 1/S of S equal weights.
    """

    squared_norm: Float[Array, ""]
    squared_weight: Float[Array, ""]


class Feedback(NamedTuple):
    """Observations of a round t, as a rule of a rate is told them.

    Attributes:
      round: the round for which the rate is wanted: t for α, t + 1 for β.
      inner_product: ⟨Δ^t, Δ^{t-1}⟩, or ⟨Δ^t, u^{t-1}⟩ where the algorithm says "applied".
      pseudo_gradient: Δ^t.
      client_loss: mean training loss over the participants' examples seen.
      reported: Σ p_m report(…): the weighted mean of what the rule asked of each client.
      scale: Δ^t is so many times the mean of updates (FedNova's τ_eff); None: once.
      failed: share of the weight of clients whose training came to no finite result.
      previous: Δ^{t-1}.
      reference: what the product is taken with: Δ^{t-1} or u^{t-1}.
      spread: of the updates of round t, where a rule `needs_spread`.
    """

    round: Int[Array, ""]
    inner_product: Float[Array, ""]
    pseudo_gradient: Params = ()
    client_loss: Float[Array, ""] | None = None
    reported: PyTree = ()
    scale: Float[Array, ""] | None = None
    failed: Float[Array, ""] | None = None
    previous: Params = ()
    reference: Params = ()
    spread: Spread | None = None


class ClientResult(NamedTuple):
    """One client's local training, as a rule of a rate may ask about it.

    Attributes:
      update: what enters the average: Δ_m = w − w_m, unless a term changed it.
      displacement: w − w_m.
      rate: final β_m = β_m^{t, K_m − 1}.
      rate_state: last state of the client rule's transform.
      loss: sum of the losses of the examples seen, at the iterates that saw them.
      examples: examples seen, with repetition.
      num_steps: K_m.
      batch_loss: ``batch_loss(k, params)``: of step k's batch; a forward pass.
    """

    update: Params
    displacement: Params
    rate: Float[Array, ""]
    rate_state: PyTree
    loss: Float[Array, ""]
    examples: Int[Array, ""]
    num_steps: Int[Array, ""]
    batch_loss: Callable[[Int[Array, ""], Params], Float[Array, ""]]


def no_report(state: PyTree, params: Params, result: ClientResult) -> PyTree:
    """Nothing is asked of clients."""
    del state, params, result
    return ()


def keep_before(before: PyTree, moved: PyTree) -> PyTree:
    """After a round that was taken back: as if it had not been."""
    del moved
    return before


class RateRule(NamedTuple):
    """How a rate moves from round to round.

    Attributes:
      init: ``init(params) -> state``; ``state.rate`` is where the rate starts: β^0 of a rule of the local rate. One of
        the global rate is updated before its first use, so α^0 is what the update of round 0 makes of it.
      update: ``update(state, feedback) -> (state, RateReport)``; ``state.rate`` is the rate of ``feedback.round``.
      initial_rate: ``init(params).rate`` as given, maybe traced; relative bounds are taken from it.
      by_round: whether the rate depends on the round alone, and so moves on after a round without participants.
      report: ``report(state, params, result) -> numbers``, a tree of scalars that each client sends (the rule's state,
        w^t, `ClientResult`); their weighted mean over the participants comes back as ``feedback.reported``.
      refused: ``refused(before, moved) -> state`` after a round that was taken back: the state before the round and
        the one that it would have led to.
      accepts: ``accepts(moved) -> bool``: whether the round counts, by what the rule made of it; where it does not, the
        round is taken back. Such a rule is told (`refused`) of rounds too in which results arrived and none is usable.
        None: it minds none.
      observed: ``observed(state) -> number`` that moved the rate, for the records; None: the inner product did.
      along_gradient: why clients must step along their gradient, and what to do where they do not; None where they need
        not.
      mean_only: why Δ must be a weighted mean of client updates; None where it need not be.
      needs_spread: whether it is told the `Spread` of the updates, for which each client sends ‖Δ_m‖².
    """

    init: Callable[[Params], PyTree]
    update: Callable[[PyTree, Feedback], tuple[PyTree, RateReport]]
    initial_rate: Any
    by_round: bool = False
    report: Callable[[PyTree, Params, ClientResult], PyTree] = no_report
    refused: Callable[[PyTree, PyTree], PyTree] = keep_before
    accepts: Callable[[PyTree], Bool[Array, ""]] | None = None
    observed: Callable[[PyTree], Float[Array, ""]] | None = None
    along_gradient: str | None = None
    mean_only: str | None = None
    needs_spread: bool = False


# ------------------------------------------------------------------------------------------------ clients


class ClientFacts(NamedTuple):
    """Facts known of a client before its first local step; scalars.

    Attributes:
      num_steps: K_m.
      steps_an_epoch: ⌈n_m / B⌉.
      relative_size: n_m / (mean of n over all clients).
      relative_weight: N times the client's weight in the objective: relative_size, 1 if uniform, or its weight over the
        mean of weights.
      cohort_size: S, slots that hold a client.
    """

    num_steps: Int[Array, ""]
    steps_an_epoch: Int[Array, ""]
    relative_size: Float[Array, ""]
    relative_weight: Float[Array, ""]
    cohort_size: Int[Array, ""]


class ClientRule(NamedTuple):
    """How a client's rate moves between its local steps.

    Attributes:
      init: ``init(params) -> settings``, arrays that live in the server state (κ, bounds), so that they are data.
      transform: ``transform(settings, rate, facts) -> optax transform``, made afresh for each client and round from the
        rate the client starts with; its state has a field ``rate``. Its ``update`` gets the extra arguments of
        `train_client`.
      report: ``report(transform_state) -> RateReport`` of the client's round.
      needs_pseudo_gradient: whether clients receive Δ^{t-1}, which doubles what is sent to them.
      moves: whether the rate moves between local steps at all.
      plain_sgd_only: why the rule is meaningless unless the step is −rate · gradient; None where it is not.
      bounded_below_only: why the rule needs a local objective with a lower bound; None where it does not.
    """

    init: Callable[[Params], PyTree]
    transform: Callable[[PyTree, Array, ClientFacts], optax.GradientTransformationExtraArgs]
    report: Callable[[PyTree], RateReport]
    needs_pseudo_gradient: bool = False
    moves: bool = True
    plain_sgd_only: str | None = None
    bounded_below_only: str | None = None


class TermContext(NamedTuple):
    """A client's round, as a term sees it.

    Attributes:
      global_params: w^t.
      shared: the term's state on the server.
      row: the client's row.
      facts: what is known of the client before its first step.
    """

    global_params: Params
    shared: PyTree
    row: PyTree
    facts: ClientFacts


class Outcome(NamedTuple):
    """A client's local training, as a term sees it at its end.

    Attributes:
      update: Δ_m = w − w_m.
      rate_sum: Σ_k β_m^k.
      displacement: a_m: Δ of one number whose every gradient is 1, by the same rates and optimizer.
      curved: whether a term adds curvature, so that a_m < Σ_k β_m^k even for SGD.
      full_gradient: ``full_gradient()``: ∇F_m(w^t) over all the client's examples; costs a pass over them.
    """

    update: Params
    rate_sum: Float[Array, ""]
    displacement: Float[Array, ""]
    curved: bool
    full_gradient: Callable[[], Params]


class Contribution(NamedTuple):
    """Contribution of a client's round.

    Attributes:
      update: to the pseudo-gradient, averaged with the weights p_m.
      mean: to a mean with the weights p_m.
      total: to a plain sum over the participants.
      row: the client's new row.
    """

    update: Params
    mean: PyTree = ()
    total: PyTree = ()
    row: PyTree = ()


class TermSums(NamedTuple):
    """A term's means and totals on the server after a round.

    Attributes:
      pseudo_gradient: of the round so far.
      mean: Σ p_m of the contributions' means.
      total: sum of the contributions' totals.
      params: w^t.
    """

    pseudo_gradient: Params
    mean: PyTree
    total: PyTree
    params: Params


class Conclusion(NamedTuple):
    """A term's conclusion of a round, on the server.

    Attributes:
      shared: the term's new state.
      pseudo_gradient: of the round, as the server's step takes it.
      scale: the pseudo-gradient is so many times the mean of updates; None: once.
    """

    shared: PyTree
    pseudo_gradient: Params
    scale: Float[Array, ""] | None = None


class Traffic(NamedTuple):
    """Bytes per client and round besides the update (up) and the parameters and rate (down).

    Attributes:
      up: from a client.
      down: to a client.
    """

    up: float = 0.0
    down: float = 0.0


def contribute_update(outcome: Outcome, context: TermContext) -> Contribution:
    """The update as it is, and the row as it was."""
    return Contribution(update=outcome.update, row=context.row)


def keep(shared: PyTree, sums: TermSums) -> Conclusion:
    """The pseudo-gradient as it is."""
    return Conclusion(shared, sums.pseudo_gradient)


class LocalTerm(NamedTuple):
    """A term: what a method adds to the clients' objective or steps, and to the way updates become a pseudo-gradient.

    Attributes:
      name: key of its state in `ServerState.terms` and `ServerState.clients`.
      shared: ``shared(params) -> state`` on the server; its settings are arrays in it.
      row: ``row(params) -> one client's row`` before its first round; ``()`` for none.
      population: number of rows; None without rows.
      objective: ``objective(value, params, context) -> value``, of the local objective so far; None leaves it alone.
      direction: ``direction(gradient, params, context) -> gradient`` that the client optimizer is fed; None likewise.
      curvature: ``curvature(context)``: what the objective adds to the gradient per unit of w − w^t; None for 0.
      finish: ``finish(outcome, context) -> Contribution``, at the end of a client's round.
      conclude: ``conclude(shared, sums) -> Conclusion``, at the end of the server's.
      traffic: ``traffic(params) -> Traffic``.
      needs_displacement: why a_m must exist, so that client optimizers must be linear; None if it need not.
      defines_step: why the server's step is the term's own, so that no second such term may stand beside it.
      mixes_loss: whether its objective scales the loss instead of adding to it; such a term is applied first.
      unbounded_below: whether the objective gets a linear term.
      needs_plain_sgd: why no other client optimizer may stand after it; None if any may.
      uniform_only: why weights must be uniform; None if they need not.
      offsets_mean: why the pseudo-gradient is no longer a mean of client updates; None where it is.
    """

    name: str
    shared: Callable[[Params], PyTree] = no_state
    row: Callable[[Params], PyTree] = no_state
    population: int | None = None
    objective: Callable[[Array, Params, TermContext], Array] | None = None
    direction: Callable[[Params, Params, TermContext], Params] | None = None
    curvature: Callable[[TermContext], Array] | None = None
    finish: Callable[[Outcome, TermContext], Contribution] = contribute_update
    conclude: Callable[[PyTree, TermSums], Conclusion] = keep
    traffic: Callable[[Params], Traffic] = lambda params: Traffic()
    needs_displacement: str | None = None
    defines_step: str | None = None
    mixes_loss: bool = False
    unbounded_below: bool = False
    needs_plain_sgd: str | None = None
    uniform_only: str | None = None
    offsets_mean: str | None = None


# ------------------------------------------------------------------------------------------------ cohorts


class Participation(NamedTuple):
    """Who is asked to take part in a round.

    Attributes:
      name: as in configurations.
      init: ``init(population) -> settings``, arrays; an argument of compiled programs.
      sample: ``sample(key, settings, population, cohort_size) -> (cohort_size,) int32``: distinct client ids; the
        population itself marks a slot that stays empty.
      check: ``check(population, cohort_size)`` raises ValueError for what cannot be drawn, before any tracing.
    """

    name: str
    init: Callable[[int], PyTree]
    sample: Callable[[Array, PyTree, int, int], Int[Array, " cohort"]]
    check: Callable[[int, int], None]


class FailureModel(NamedTuple):
    """Failures of clients; keyed by round and client, so the same client fails in any cohort or order.

    Attributes:
      name: as in messages.
      init: ``init(params) -> settings``, arrays.
      before: ``before(key, settings, num_steps) -> num_steps``: the steps that a client takes of its K_m; 0 where it
        does not start, which costs no work. None: all of them.
      after: ``after(key, settings, update) -> (update, arrives)``: what of its update reaches the server, and whether
        anything does. None: all as it is.
    """

    name: str
    init: Callable[[Params], PyTree] = no_state
    before: Callable[[Array, PyTree, Int[Array, ""]], Int[Array, ""]] | None = None
    after: Callable[[Array, PyTree, Params], tuple[Params, Bool[Array, ""]]] | None = None


# ------------------------------------------------------------------------------------------------ server


class Gathered(NamedTuple):
    """All that arrives at the server from a cohort; means are weighted by p_m, renormalised over the participants.

    Attributes:
      alive: whether a slot holds a participant.
      mean: of the prepared updates, in the dtype of sums; None where they are stacked.
      updates: the prepared updates, (cohort, …) a leaf; None where only their mean exists.
      weights: p_m of each, 0 unless alive; likewise.
      term_means: of each term, the mean of its contributions' means.
      term_totals: of each term, the sum of its contributions' totals.
      reported: means of what the rules of the global and the local rate asked for.
      client_loss: mean training loss over the participants' examples seen.
      failed: share of the weight of clients that came to no finite result.
      spread: where one of the rules needs it.
    """

    alive: Bool[Array, " cohort"]
    mean: Params | None
    updates: Params | None
    weights: Float[Array, " cohort"] | None
    term_means: tuple[PyTree, ...]
    term_totals: tuple[PyTree, ...]
    reported: tuple[PyTree, PyTree]
    client_loss: Float[Array, ""]
    failed: Float[Array, ""] | None = None
    spread: Spread | None = None


def as_it_is(state: PyTree, update: Params) -> Params:
    """The update unchanged."""
    del state
    return update


class Aggregator(NamedTuple):
    """How client updates become one.

    Attributes:
      name: as in messages.
      init: ``init(params) -> state``; its settings are arrays in it.
      prepare: ``prepare(state, update) -> update``, on each client before weighing (clipping, quantising).
      combine: ``combine(key, state, gathered) -> (update, state)``: one update of the cohort, leaves like the
        parameters in the dtype of sums.
      stacks: whether `combine` needs the updates side by side: S models in memory; else only their mean ever exists.
      not_a_mean: why the result is no weighted mean of client updates, which FedExP, FedNova and FedDyn presume.
    """

    name: str
    init: Callable[[Params], PyTree] = no_state
    prepare: Callable[[PyTree, Params], Params] = as_it_is
    combine: Callable[[Array, PyTree, Gathered], tuple[Params, PyTree]] = lambda key, state, gathered: (
        gathered.mean,
        state,
    )
    stacks: bool = False
    not_a_mean: str | None = None


class Proposal(NamedTuple):
    """The state that a round would lead to; each field is the new value of the field of `ServerState` of its name.

    Attributes:
      params: w^{t+1}.
      pseudo_gradient: Δ^t.
      server_optimizer: state of the server's optimizer.
      terms: the server's state of each term, by its name.
      aggregator: state of the aggregator.
      direction: u^t, where products are taken of it.
      evaluation: what is evaluated besides w^{t+1}.
      global_rate: state of the rule of α.
      local_rate: state of the rule of β.
    """

    params: Params
    pseudo_gradient: Params
    server_optimizer: PyTree
    terms: dict[str, PyTree]
    aggregator: PyTree
    direction: PyTree
    evaluation: PyTree
    global_rate: PyTree
    local_rate: PyTree


class Verdict(NamedTuple):
    """Whether a round counts.

    Attributes:
      accepted: whether the round counts.
      finite: False: it left the numbers of the dtype, and nobody is said to have taken part.
    """

    accepted: Bool[Array, ""]
    finite: Bool[Array, ""]

    @property
    def takes_back(self) -> bool:
        """Whether a finite round may be refused; False where both fields are the same array."""
        return self.accepted is not self.finite


class Guard(NamedTuple):
    """The judge of finished rounds: a round counts, or everything but its number stays as it was.

    Attributes:
      name: as in configurations.
      init: ``init(params) -> state``; its settings are arrays in it.
      judge: ``judge(state, proposal, client_loss) -> (Verdict, state)``; ``client_loss`` is the cohort's mean training
        loss. It is not asked about a round without participants, which never counts.
    """

    name: str
    init: Callable[[Params], PyTree]
    judge: Callable[[PyTree, Proposal, Float[Array, ""]], tuple[Verdict, PyTree]]


# ------------------------------------------------------------------------------------------------ all of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """All parts of an algorithm, besides its loss and the clients' work.

    Attributes:
      global_rate: rule of α.
      local_rate: rule of the broadcast β.
      client_rule: rule of β between local steps.
      terms: what the method adds to local objective and aggregation; those that mix the loss come first.
      server_optimizer: of the pseudo-gradient.
      client_optimizer: of the clients, its state afresh each round.
      aggregator: how client updates become one.
      failures: what goes wrong with clients.
      guard: whether a round counts.
      weighting: p_m by "examples", "uniform" or the data set's "weights".
      inner_product: "pseudo_gradient" or "applied".
      evaluate_at: "last", "mean_of_last_two" or "running_average".
      client_rates_of: population whose clients keep their own rates from round to round; None: none does.
    """

    global_rate: RateRule
    local_rate: RateRule
    client_rule: ClientRule
    terms: tuple[LocalTerm, ...]
    server_optimizer: optax.GradientTransformationExtraArgs
    client_optimizer: optax.GradientTransformationExtraArgs
    aggregator: Aggregator
    failures: FailureModel
    guard: Guard
    weighting: str
    inner_product: str
    evaluate_at: str
    client_rates_of: int | None

    @property
    def needs_spread(self) -> bool:
        """Whether a rule of a rate is told the spread of the updates."""
        return self.global_rate.needs_spread or self.local_rate.needs_spread
