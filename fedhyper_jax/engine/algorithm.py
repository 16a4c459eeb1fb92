"""From parts to an algorithm: the pair (init, round)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from fedhyper_jax import _repr, _validate
from fedhyper_jax.base import (
    RATE_ROWS,
    FederatedAlgorithm,
    LossFunction,
    Params,
    PyTree,
    ServerState,
    current_params,
)
from fedhyper_jax.data import Cohort, LocalWork, check_client_ids
from fedhyper_jax.engine.checks import (
    as_optimizer,
    as_parameters,
    check_key,
    check_optimizers,
    check_parts,
    check_populations,
    check_rate,
    check_state,
    check_training_data,
    populations_of,
)
from fedhyper_jax.engine.diagnoses import warn_of_slow_convolutions
from fedhyper_jax.engine.round import make_round
from fedhyper_jax.engine.strategies import Strategy, parse_strategy, place
from fedhyper_jax.parts import (
    Aggregator,
    ClientRule,
    FailureModel,
    Feedback,
    Guard,
    LocalTerm,
    Parts,
    RateRule,
    aggregators,
    client_rules,
    failures,
    guards,
)
from fedhyper_jax.tasks import takes_key

WEIGHTINGS = ("examples", "uniform", "weights")
INNER_PRODUCTS = ("pseudo_gradient", "applied")


def federated_algorithm(
    loss_fn: LossFunction,
    *,
    work: LocalWork,
    global_rate: RateRule,
    local_rate: RateRule,
    client_rule: ClientRule | None = None,
    terms: Sequence[LocalTerm] = (),
    server_optimizer: optax.GradientTransformation | None = None,
    client_optimizer: optax.GradientTransformation | None = None,
    weighting: str = "examples",
    inner_product: str = "pseudo_gradient",
    evaluate_at: str = "last",
    client_rates_of: int | None = None,
    aggregator: Aggregator | None = None,
    failure_model: FailureModel | None = None,
    guard: Guard | None = None,
    strategy: str | Strategy = "vectorized",
) -> FederatedAlgorithm:
    r"""Assembles an algorithm from the rules of its rates, its terms and its optimizers.

    Every algorithm here is made by it.

    .. math::
      \Delta^t = \sum_m p_m (w^t - w_m^t), \qquad
      w^{t+1} = w^t + \alpha^t \, \mathrm{server\_optimizer}(\Delta^t), \qquad
      w_m^{k+1} = w_m^k + \beta_m^k \, \mathrm{client\_optimizer}(g_m^k)

    A client whose update, loss or rate is not finite is left out and counted, the weights p_m renormalised over the
    others. Where nobody is left, or the server's own step is not finite, the round changes nothing but the round number
    (and what a schedule makes of it).

    Args:
      loss_fn: ``(params, batch) -> per-example losses (B,)``; or of ``(params, batch, key)``, where it draws random
        numbers: dropout, augmentation, noise. The key depends on that of the run, the round, the client and the step.
      work: what clients do in a round, `local_epochs` or `local_steps`.
      global_rate: rule of α, see `fedhyper_jax.parts.rates`.
      local_rate: rule of the broadcast β.
      client_rule: rule of β between local steps, see `fedhyper_jax.parts.client_rules`; the broadcast rate if None.
      terms: what the method adds to local objective and aggregation, see `fedhyper_jax.parts.terms`; in any order.
      server_optimizer: used as it stands, own sign and rate included; ``optax.sgd(1.0)`` if None. It is handed the
        extra arguments ``value`` (mean loss of the clients), ``gradient`` (Δ^t) and ``global_rate`` (α^t).
      client_optimizer: likewise, its state afresh each round; see `client.Trainer` for its extra arguments.
      weighting: p_m by ``"examples"`` (n_m / Σ n), ``"uniform"``, or ``"weights"``, those of the data set
        (`data.pack` with ``weigh_by``).
      inner_product: what the rules of both rates are fed: ``"pseudo_gradient"``, ⟨Δ^t, Δ^{t-1}⟩, or ``"applied"``,
        ⟨Δ^t, u^{t-1}⟩ with u = −server_optimizer(Δ), the hypergradient of the step that was taken.
      evaluate_at: ``"last"`` iterate, ``"mean_of_last_two"``, or ``"running_average"``: in round t a share of
        9 / (t + 9) is the new iterate (the polynomial decay of DoG), so that some last ninth of the run counts.
      client_rates_of: population whose clients keep their own rates from round to round, starting at β^0; None: every
        client starts from the broadcast rate.
      aggregator: how client updates become one, see `fedhyper_jax.parts.aggregators`; their mean if None.
      failure_model: what goes wrong with clients, see `fedhyper_jax.parts.failures`; nothing if None.
      guard: whether a round counts, see `fedhyper_jax.parts.guards`; if None, unless its step is not finite.
      strategy: 'vectorized', 'sequential', 'chunked(c)', 'sharded(...)' or 'debug', see
        `fedhyper_jax.cohort`; speed only.

    Returns:
      The pair (init, round), and which parameters to evaluate.

    Raises:
      ValueError: unknown names, something that is not an optimizer, parts that have no meaning together (the message
        says why). ``init`` refuses parameters that are not floating-point or not finite, ``round`` states of other
        algorithms, other populations and impossible cohorts.
      TypeError: something that is not a `LocalWork`, a loss that takes other arguments.

    Example:
      >>> import optax
      >>> from fedhyper_jax.data import local_steps
      >>> from fedhyper_jax.parts.rates import hypergradient, scheduled
      >>> from fedhyper_jax.parts.terms import proximal
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = federated_algorithm(  # FedProx with FedHyper-G and a local rate that decays
      ...     loss_fn,
      ...     work=local_steps(5, batch_size=8),
      ...     global_rate=hypergradient(1.0, bounds=(1 / 3, 3.0)),
      ...     local_rate=scheduled(optax.exponential_decay(0.1, 1, 0.99)),
      ...     terms=[proximal(0.1)],
      ... )
      >>> float(algorithm.init(0.5).global_rate.rate)
      1.0
    """
    takes_key(loss_fn)  # (refuses what takes neither)
    if not isinstance(work, LocalWork):
        raise TypeError(f"work must come from local_epochs(...) or local_steps(...), got {work!r}")
    _validate.one_of(WEIGHTINGS, weighting=weighting)
    _validate.one_of(INNER_PRODUCTS, inner_product=inner_product)
    _validate.one_of(_EVALUATED, evaluate_at=evaluate_at)
    strategy = parse_strategy(strategy)
    parts = Parts(
        global_rate=global_rate,
        local_rate=local_rate,
        client_rule=client_rules.broadcast_rate() if client_rule is None else client_rule,
        # FedCM mixes the gradient of the loss, so it comes first; all others add, in any order.
        terms=tuple(sorted(terms, key=lambda term: not getattr(term, "mixes_loss", False))),
        server_optimizer=as_optimizer(server_optimizer, name="server_optimizer"),
        client_optimizer=as_optimizer(client_optimizer, name="client_optimizer"),
        aggregator=aggregators.mean() if aggregator is None else aggregator,
        failures=failures.none() if failure_model is None else failure_model,
        guard=guards.finite() if guard is None else guard,
        weighting=weighting,
        inner_product=inner_product,
        evaluate_at=evaluate_at,
        client_rates_of=client_rates_of,
    )
    check_parts(parts)
    populations = populations_of(parts)

    first_state = functools.partial(_initial_state, parts, strategy)
    one_round = make_round(parts, loss_fn, work, strategy)

    def init(params: Params) -> ServerState:
        params = as_parameters(params)
        check_optimizers(parts, params)
        return first_state(params)

    def round_fn(key, state: ServerState, cohort: Cohort):
        check_key(key)
        check_client_ids(cohort.client_ids, cohort.data.population)
        check_state(state, first_state)
        check_populations(populations, cohort.data.population)
        check_training_data(loss_fn, weighting, state, cohort.data)
        return one_round(key, state, cohort)

    rates = f"global rate {_repr.number(global_rate.initial_rate)}, local rate {_repr.number(local_rate.initial_rate)}"
    names = [term.name for term in parts.terms]
    round_fn.told = ", ".join([repr(work), rates, *names, f"weighting {weighting!r}", f"strategy {strategy.name!r}"])
    return FederatedAlgorithm(
        init=init,
        round=round_fn,
        evaluated_params=_EVALUATED[evaluate_at],
        diagnose=functools.partial(warn_of_slow_convolutions, loss_fn, work),
        check=functools.partial(check_training_data, loss_fn, weighting),
        with_rates=functools.partial(_with_rates, parts, strategy, first_state),
    )


def _initial_state(parts: Parts, strategy: Strategy, params: Params) -> ServerState:
    """The state before round 0, in arrays of its own: neither the caller's nor those that rules keep, none twice.

    So a run may be given its memory.
    """
    own = _rates(parts, params)
    rows = {
        term.name: jax.tree.map(
            lambda leaf, rows=term.population: jnp.broadcast_to(leaf, (rows, *leaf.shape)), term.row(params)
        )
        for term in parts.terms
        if term.population is not None
    }
    state = ServerState(
        round=jnp.zeros((), jnp.int32),
        params=params,
        **{**own, "clients": {**rows, **own["clients"]}},
        pseudo_gradient=optax.tree.zeros_like(params),
        server_optimizer=parts.server_optimizer.init(params),
        terms={term.name: term.shared(params) for term in parts.terms},
        aggregator=parts.aggregator.init(params),
        failures=parts.failures.init(params),
        guard=parts.guard.init(params),
        direction=optax.tree.zeros_like(params) if parts.inner_product == "applied" else (),
        evaluation=() if parts.evaluate_at == "last" else params,
    )
    return place(strategy, jax.device_put(state, may_alias=False))


def _rates(parts: Parts, params: Params) -> dict[str, PyTree]:
    """The fields of a first state that rules of rates own."""
    local_rate = check_rate(parts.local_rate.init(params), name="local_rate")
    of_clients = parts.client_rates_of
    return {
        "global_rate": check_rate(parts.global_rate.init(params), name="global_rate"),
        "local_rate": local_rate,
        "client_rule": parts.client_rule.init(params),
        "clients": {} if of_clients is None else {RATE_ROWS: jnp.full(of_clients, local_rate.rate)},
    }


def _with_rates(
    parts: Parts, strategy: Strategy, first_state: Callable[[Params], ServerState], state: ServerState
) -> ServerState:
    """A state of an algorithm that differs in its rates only, with the rates that this one starts with."""
    first = place(strategy, jax.device_put(_rates(parts, state.params), may_alias=False))
    first["global_rate"] = _at_round(parts.global_rate, first["global_rate"], state)
    first["local_rate"] = _at_round(parts.local_rate, first["local_rate"], state)
    rows = {name: rows for name, rows in state.clients.items() if name != RATE_ROWS}
    first["clients"] = {**rows, **first["clients"]}
    moved = dataclasses.replace(state, **first)
    check_state(moved, first_state)
    return moved


def _at_round(rule: RateRule, rule_state: PyTree, state: ServerState) -> PyTree:
    """A rule's first state, or of a rule that depends on the round alone that of the next round."""
    if not rule.by_round:
        return rule_state
    nothing = Feedback(state.round, jnp.zeros((), rule_state.rate.dtype), state.pseudo_gradient)
    return rule.update(rule_state, nothing)[0]


def mean_of_last_two(state: ServerState) -> Params:
    """(w^t + w^{t-1}) / 2: what FedExP evaluates."""
    return jax.tree.map(lambda now, before: (now + before) / 2, state.params, state.evaluation)


def running_average(state: ServerState) -> Params:
    """The average of the iterates so far, late ones counting most."""
    return state.evaluation


_EVALUATED = {"last": current_params, "mean_of_last_two": mean_of_last_two, "running_average": running_average}
