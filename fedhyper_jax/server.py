"""The server round: cohort → pseudo-gradient → rates → parameters, one pure function."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from fedhyper_jax import _random, _tree, _validate
from fedhyper_jax._checks import (
    as_optimizer,
    as_parameters,
    check_composition,
    check_populations,
    check_state,
    check_terms,
)
from fedhyper_jax._observe import observe, over, traffic_of
from fedhyper_jax.base import FederatedAlgorithm, LossFunction, Params, RoundInfo, ServerState, current_params
from fedhyper_jax.client import Broadcast, Trainer, survives, train_client
from fedhyper_jax.client_rules import ClientFacts, ClientRule, broadcast_rate
from fedhyper_jax.cohort import Slots, Strategy, parse_strategy, place
from fedhyper_jax.data.batches import LocalWork, all_examples, draw_batches
from fedhyper_jax.data.cohorts import Cohort, check_client_ids
from fedhyper_jax.rates import Feedback, RateRule
from fedhyper_jax.terms import Aggregate, LocalTerm

WEIGHTINGS = ("examples", "uniform")
INNER_PRODUCTS = ("pseudo_gradient", "applied")
EVALUATIONS = ("last", "mean_of_last_two")
CLIENT_RATES = "rate"
"""Name of the rows of per-client rates in `ServerState.clients`."""


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
      loss_fn: ``(params, batch) -> per-example losses (B,)``.
      work: what clients do in a round, `local_epochs` or `local_steps`.
      global_rate: rule of α, see `fedhyper_jax.rates`.
      local_rate: rule of the broadcast β.
      client_rule: rule of β between local steps, see `fedhyper_jax.client_rules`; the broadcast rate if None.
      terms: what the method adds to local objective and aggregation, see `fedhyper_jax.terms`; in any order.
      server_optimizer: used as it stands, own sign and rate included; ``optax.sgd(1.0)`` if None. It is handed the
        extra arguments ``value`` (mean loss of the clients), ``gradient`` (Δ^t) and ``global_rate`` (α^t).
      client_optimizer: likewise, its state afresh each round; see `client.Trainer` for its extra arguments.
      weighting: p_m by ``"examples"`` (n_m / Σ n) or ``"uniform"``.
      inner_product: what the rules of both rates are fed: ``"pseudo_gradient"``, ⟨Δ^t, Δ^{t-1}⟩, or ``"applied"``,
        ⟨Δ^t, u^{t-1}⟩ with u = −server_optimizer(Δ), the hypergradient of the step that was taken.
      evaluate_at: ``"last"`` iterate or ``"mean_of_last_two"``.
      client_rates_of: population whose clients keep their own rates from round to round, starting at β^0; None: every
        client starts from the broadcast rate.
      strategy: 'vectorized', 'sequential', 'chunked(c)', 'sharded(...)' or 'debug', see `fedhyper_jax.cohort`; speed
        only.

    Returns:
      The pair (init, round), and which parameters to evaluate.

    Raises:
      ValueError: unknown names, something that is not an optimizer, parts that have no meaning together (the message
        says why). ``init`` refuses parameters that are not floating-point or not finite, ``round`` states of other
        algorithms, other populations and impossible cohorts.
      TypeError: something that is not a `LocalWork`.

    Example:
      >>> import optax
      >>> from fedhyper_jax.data import local_steps
      >>> from fedhyper_jax.rates import hypergradient, scheduled
      >>> from fedhyper_jax.terms import proximal
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
    if not isinstance(work, LocalWork):
        raise TypeError(f"work must come from local_epochs(...) or local_steps(...), got {work!r}")
    _validate.one_of(WEIGHTINGS, weighting=weighting)
    _validate.one_of(INNER_PRODUCTS, inner_product=inner_product)
    _validate.one_of(EVALUATIONS, evaluate_at=evaluate_at)
    strategy = parse_strategy(strategy)
    server_optimizer = as_optimizer(server_optimizer, name="server_optimizer")
    trainer = Trainer(
        loss_fn=loss_fn,
        optimizer=as_optimizer(client_optimizer, name="client_optimizer"),
        rule=broadcast_rate() if client_rule is None else client_rule,
        # FedCM mixes the gradient of the loss, so it comes first; all others add, and their order is nothing.
        terms=tuple(sorted(terms, key=lambda term: not getattr(term, "mixes_loss", False))),
    )
    check_terms(trainer.terms)
    check_composition(trainer, (global_rate, local_rate), weighting)
    populations = {term.name: term.population for term in trainer.terms if term.population is not None}
    if client_rates_of is not None:
        _validate.positive_integer(population=client_rates_of)
        if not trainer.rule.moves or not local_rate.by_round:
            raise ValueError(
                "per-client rates need a client rule that moves them (CL) and no rule of the server that does (SL)"
            )
        populations[CLIENT_RATES] = client_rates_of

    def init(params: Params) -> ServerState:
        params = as_parameters(params)
        local_state = local_rate.init(params)
        clients = {
            term.name: jax.tree.map(
                lambda leaf, rows=term.population: jnp.broadcast_to(leaf, (rows, *leaf.shape)), term.row(params)
            )
            for term in trainer.terms
            if term.population is not None
        }
        if client_rates_of is not None:
            clients[CLIENT_RATES] = jnp.full(client_rates_of, local_state.rate)
        state = ServerState(
            round=jnp.zeros((), jnp.int32),
            params=params,
            global_rate=global_rate.init(params),
            local_rate=local_state,
            client_rule=trainer.rule.init(params),
            pseudo_gradient=optax.tree.zeros_like(params),
            server_optimizer=server_optimizer.init(params),
            terms={term.name: term.shared(params) for term in trainer.terms},
            clients=clients,
            direction=optax.tree.zeros_like(params) if inner_product == "applied" else (),
            previous_params=params if evaluate_at == "mean_of_last_two" else (),
        )
        return place(strategy, state)

    def evaluated_params(state: ServerState) -> Params:
        return jax.tree.map(lambda now, before: (now + before) / 2, state.params, state.previous_params)

    def train_cohort(key, state: ServerState, cohort: Cohort):
        """Sums over the survivors; per client, whether it survived, its new rows and what it reports."""
        _, clients_key = _random.round_keys(key, state.round)
        accumulator = _tree.accumulator_dtype(state.params)
        data = cohort.data
        real = cohort.client_ids < data.population
        sizes = data.sizes_of(cohort.client_ids)
        # p_m ≤ 1 before summing, so that a mean of finite updates does not overflow on the way.
        shares = sizes if weighting == "examples" else real
        total_share = jnp.maximum(jnp.sum(shares), 1).astype(accumulator)
        mean_size, cohort_size = data.mean_size.astype(accumulator), jnp.sum(real, dtype=jnp.int32)
        shared = (clients_key, state, data, total_share, mean_size, cohort_size)

        def client_fn(shared, client_id, num_steps, loop):
            clients_key, state, data, total_share, mean_size, cohort_size = shared
            client = data.client(client_id)
            size = client.size
            batches = draw_batches(
                _random.batch_key(clients_key, client_id),
                client,
                work,
                max_examples=data.max_examples,
                most_steps=num_steps,
            )
            rows = jax.tree.map(lambda leaf: jnp.take(leaf, client_id, axis=0, mode="clip"), state.clients)
            contributions, update, result = train_client(
                trainer,
                Broadcast(
                    params=state.params,
                    rate=rows.get(CLIENT_RATES, state.local_rate.rate),
                    settings=state.client_rule,
                    pseudo_gradient=state.pseudo_gradient,
                    shared=state.terms,
                    rows=rows,
                ),
                fetch=client.fetch,
                batches=batches,
                whole=lambda: all_examples(client, work.batch_size),
                facts=ClientFacts(
                    num_steps=batches.num_steps,
                    steps_an_epoch=-(-size // work.batch_size),
                    relative_size=size / mean_size,
                    relative_weight=size / mean_size if weighting == "examples" else jnp.ones((), accumulator),
                    cohort_size=cohort_size,
                ),
                num_steps=num_steps,
                loop=loop,
            )
            alive = survives(update, contributions, result)
            share = size if weighting == "examples" else 1
            weight = jnp.where(alive, share / total_share, 0).astype(accumulator)

            def weighted(tree):
                # where, not a product with 0: 0 · NaN is NaN.
                return jax.tree.map(lambda d: jnp.where(alive, weight * d.astype(accumulator), 0.0), tree)

            means = {"weight": weight, "update": weighted(update)}
            means["terms"] = [weighted(contribution.mean) for contribution in contributions]
            if global_rate.needs_squared_norms or local_rate.needs_squared_norms:
                means["squared_norm"] = weighted(_tree.inner_product(update, update))
            if global_rate.needs_client_rates or local_rate.needs_client_rates:
                means["rate"] = weighted(result.rate)
            totals = [
                jax.tree.map(lambda x: jnp.where(alive, x, 0), contribution.total) for contribution in contributions
            ]
            new_rows = {term.name: c.row for term, c in zip(trainer.terms, contributions, strict=True)}
            new_rows[CLIENT_RATES] = result.rate
            return (means, totals), (alive, {name: new_rows[name] for name in state.clients}, result)

        slots = Slots(
            client_ids=cohort.client_ids,
            steps=work.num_steps(sizes),
            common_steps=work.steps,
            padding_id=data.population,
        )
        return strategy.map_reduce(client_fn, shared, slots)

    def round_fn(key, state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundInfo]:
        check_client_ids(cohort.client_ids, cohort.data.population)
        check_state(state, init)
        check_populations(populations, cohort.data.population)
        (sums, totals), (alive, rows, results) = train_cohort(key, state, cohort)
        total_weight = sums.pop("weight")
        divisor = jnp.where(total_weight > 0, total_weight, 1)
        means = jax.tree.map(lambda total: total / divisor, sums)
        mean_squared_norm = means.get("squared_norm")
        pseudo_gradient = jax.tree.map(lambda mean, w: mean.astype(w.dtype), means["update"], state.params)
        shared = {}
        for term, mean, total in zip(trainer.terms, means["terms"], totals, strict=True):
            seen = Aggregate(pseudo_gradient, mean_squared_norm, mean, total, state.params)
            shared[term.name], pseudo_gradient, mean_squared_norm = term.aggregate(state.terms[term.name], seen)

        client_loss = over(alive, results.loss) / jnp.maximum(over(alive, results.examples), 1)
        reference = state.direction if inner_product == "applied" else state.pseudo_gradient
        feedback = functools.partial(
            Feedback,
            inner_product=_tree.inner_product(pseudo_gradient, reference),
            pseudo_gradient=pseudo_gradient,
            mean_squared_norm=mean_squared_norm,
            mean_client_rate=means.get("rate"),
            client_loss=client_loss,
        )
        # α is moved first and then used; β is moved for the next round.
        global_state, global_report = global_rate.update(state.global_rate, feedback(state.round))
        local_state, local_report = local_rate.update(state.local_rate, feedback(state.round + 1))
        updates, optimizer_state = server_optimizer.update(
            pseudo_gradient,
            state.server_optimizer,
            state.params,
            value=client_loss,
            gradient=pseudo_gradient,
            global_rate=global_state.rate,
        )
        params = optax.apply_updates(state.params, _tree.scale(updates, global_state.rate))
        # A step that leaves the numbers of the dtype would end the run; nobody takes part in such a round.
        alive &= _tree.is_finite((pseudo_gradient, params, shared))
        survived = jnp.any(alive)
        # Rows of clients that were left out, padded slots included, are written nowhere.
        written = jnp.where(alive, cohort.client_ids, cohort.data.population)
        clients = jax.tree.map(
            lambda old, new: old.at[written].set(new.astype(old.dtype), mode="drop"), state.clients, rows
        )
        moved = {
            "params": params,
            "pseudo_gradient": pseudo_gradient,
            "server_optimizer": optimizer_state,
            "terms": shared,
            "direction": jax.tree.map(jnp.negative, updates) if inner_product == "applied" else (),
            "previous_params": state.params if evaluate_at == "mean_of_last_two" else (),
            "global_rate": global_state,
            "local_rate": local_state,
        }
        kept = {name: getattr(state, name) for name in moved}
        kept |= {"global_rate": global_state} if global_rate.by_round else {}
        kept |= {"local_rate": local_state} if local_rate.by_round else {}
        new_state = ServerState(
            round=state.round + 1,
            client_rule=state.client_rule,
            clients=clients,
            **_tree.select(survived, moved, kept),
        )

        info = observe(
            state,
            new_state,
            alive=alive,
            slots=jnp.sum(cohort.client_ids < cohort.data.population, dtype=jnp.int32),
            results=results,
            reports=(global_report, local_report),
            feedback=feedback(state.round),
            sent=traffic_of(trainer, (global_rate, local_rate), state),
        )
        return new_state, info

    return FederatedAlgorithm(
        init=init,
        round=round_fn,
        evaluated_params=evaluated_params if evaluate_at == "mean_of_last_two" else current_params,
    )
