"""The second stage of a round: the cohort trains. The only one that sees a strategy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedhyper_jax import _random, _tree
from fedhyper_jax.base import RATE_ROWS, LossFunction, Params, PyTree, ServerState
from fedhyper_jax.data import ClientData, ClientView, LocalWork, all_examples, draw_batches
from fedhyper_jax.engine.client import Broadcast, Trained, Trainer, train_client
from fedhyper_jax.engine.plan import Plan, share_of
from fedhyper_jax.engine.strategies import Assignment, Strategy
from fedhyper_jax.parts import ClientFacts, Gathered, Parts, RateReport, Spread
from fedhyper_jax.tasks import takes_key


class ClientRecord(NamedTuple):
    """Records of the clients of a cohort, (cohort, …) a leaf."""

    alive: Bool[Array, " cohort"]  # its update enters the average
    not_finite: Int[Array, " cohort"]  # what is not, a number of `NOT_FINITE`
    lost: Bool[Array, " cohort"] | None  # it trained, and its update did not arrive; None where all arrive
    weight: Float[Array, " cohort"] | None  # p_m before it is renormalised, 0 unless alive; None unless stacked
    rows: dict[str, PyTree]  # new rows
    rate: Float[Array, " cohort"]  # final β_m
    rate_report: RateReport
    loss: Float[Array, " cohort"]
    examples: Int[Array, " cohort"]
    num_steps: Int[Array, " cohort"]  # K_m


class _Shared(NamedTuple):
    """Arrays that all clients are handed; none reaches a strategy's programs any other way."""

    key: Array
    state: ServerState
    data: ClientData
    total_share: Float[Array, ""]
    mean_size: Float[Array, ""]
    cohort_size: Int[Array, ""]


class _Sums(NamedTuple):
    """Sums over a cohort, with the weights p_m unless something else is said."""

    weight: Float[Array, ""]
    failed: Float[Array, ""]  # of the clients whose training came to no finite result
    update: Params | None  # None where updates are stacked
    term_means: tuple[PyTree, ...]
    reported: tuple[PyTree, PyTree]
    spread: Spread | None  # with the weights p_m²; None where no rule needs it
    term_totals: tuple[PyTree, ...]  # plain sums


def over(alive: Bool[Array, " cohort"], values: Array) -> Array:
    """Sum over the participants."""
    return jnp.sum(jnp.where(alive, values, 0), dtype=values.dtype)


def train_cohort(
    parts: Parts,
    loss_fn: LossFunction,
    work: LocalWork,
    strategy: Strategy,
    keys: _random.RoundKeys,
    state: ServerState,
    data: ClientData,
    plan: Plan,
) -> tuple[Gathered, ClientRecord]:
    """Trains the clients of a plan and gathers what arrives."""

    def client_fn(shared: _Shared, client: Assignment, bound, loop):
        view = shared.data.client(client.client_id)
        trained = _train_one(parts, loss_fn, work, shared, client, view, bound, loop)
        return _weigh(parts, shared, client, view.size, trained)

    shared = _Shared(keys.clients, state, data, plan.total_share, plan.mean_size, plan.cohort_size)
    sums, (records, updates) = strategy.map_reduce(client_fn, shared, plan.slots)
    divisor = jnp.where(sums.weight > 0, sums.weight, 1)
    means = jax.tree.map(lambda total: total / divisor, (sums.update, sums.term_means, sums.reported))
    gathered = Gathered(
        alive=records.alive,
        weights=None if records.weight is None else records.weight / divisor,
        mean=means[0],
        updates=updates,
        term_means=means[1],
        term_totals=sums.term_totals,
        reported=means[2],
        failed=sums.failed / jnp.where(sums.weight + sums.failed > 0, sums.weight + sums.failed, 1),
        spread=jax.tree.map(lambda total: total / divisor**2, sums.spread),
        client_loss=over(records.alive, records.loss) / jnp.maximum(over(records.alive, records.examples), 1),
    )
    return gathered, records


def _train_one(
    parts: Parts,
    loss_fn: LossFunction,
    work: LocalWork,
    shared: _Shared,
    assignment: Assignment,
    client: ClientView,
    bound,
    loop,
) -> Trained:
    """One client's local training."""
    state, client_id = shared.state, assignment.client_id
    relative_size = client.size / shared.mean_size
    uniform = jnp.ones((), relative_size.dtype)
    batches = draw_batches(
        _random.batch_key(shared.key, client_id),
        client,
        work,
        assignment.num_steps,
        max_examples=shared.data.max_examples,
        # (a client that fails on the way draws from as many examples as one that does not)
        most_steps=bound if parts.failures.before is None else None,
    )
    rows = jax.tree.map(lambda leaf: jnp.take(leaf, client_id, axis=0, mode="clip"), state.clients)
    return train_client(
        Trainer(loss_fn, parts.client_optimizer, parts.client_rule, parts.terms),
        Broadcast(
            params=state.params,
            rate=rows.get(RATE_ROWS, state.local_rate.rate),
            settings=state.client_rule,
            pseudo_gradient=state.pseudo_gradient,
            shared=state.terms,
            rows=rows,
        ),
        fetch=client.fetch,
        batches=batches,
        whole=lambda: all_examples(client, work.batch_size),
        facts=ClientFacts(
            num_steps=assignment.num_steps,
            steps_an_epoch=work.steps_an_epoch(client.size),
            relative_size=relative_size,
            relative_weight=share_of(parts, shared.data, client_id, relative_size, uniform).astype(uniform.dtype),
            cohort_size=shared.cohort_size,
        ),
        num_steps=bound,
        key=_random.loss_key(shared.key, client_id) if takes_key(loss_fn) else None,
        optimizer_key=lambda: _random.optimizer_key(shared.key, client_id),
        loop=loop,
    )


def _weigh(
    parts: Parts, shared: _Shared, assignment: Assignment, size: Int[Array, ""], trained: Trained
) -> tuple[_Sums, tuple[ClientRecord, Params | None]]:
    """A client's summand in the sums of its cohort, and the record that is kept of it."""
    state, client_id = shared.state, assignment.client_id
    accumulator = _tree.accumulator_dtype(state.params)
    update, present, lost = trained.result.update, assignment.num_steps > 0, None
    if parts.failures.after is not None:
        key = _random.failure_key(shared.key, client_id)
        update, arrives = parts.failures.after(key, state.failures, update)
        lost, present = present & ~arrives, present & arrives
    not_finite = trained.not_finite(update)
    alive = (not_finite == 0) & present
    share = share_of(parts, shared.data, client_id, size, 1)
    weight = jnp.where(alive, share / shared.total_share, 0).astype(accumulator)

    def weighted(tree):
        # where, not a product with 0: 0 · NaN is NaN.
        return jax.tree.map(lambda d: jnp.where(alive, weight * d.astype(accumulator), 0.0), tree)

    def participants_only(tree):
        return jax.tree.map(lambda x: jnp.where(alive, x, 0), tree)

    sent = parts.aggregator.prepare(state.aggregator, update)
    stacks = parts.aggregator.stacks
    rules = ((parts.global_rate, state.global_rate), (parts.local_rate, state.local_rate))
    sums = _Sums(
        weight=weight,
        failed=jnp.where(present & (not_finite > 0), share / shared.total_share, 0).astype(accumulator),
        update=None if stacks else weighted(sent),
        term_means=tuple(weighted(contribution.mean) for contribution in trained.contributions),
        reported=tuple(weighted(rule.report(own, state.params, trained.result)) for rule, own in rules),
        spread=weighted(weighted(_spread(update))) if parts.needs_spread else None,
        term_totals=tuple(participants_only(contribution.total) for contribution in trained.contributions),
    )
    rows = {term.name: c.row for term, c in zip(parts.terms, trained.contributions, strict=True)}
    rows[RATE_ROWS] = trained.result.rate
    record = ClientRecord(
        alive=alive,
        not_finite=not_finite,
        lost=lost,
        weight=weight if stacks else None,
        rows={name: rows[name] for name in state.clients},
        rate=trained.result.rate,
        rate_report=trained.rate_report,
        loss=trained.result.loss,
        examples=trained.result.examples,
        num_steps=assignment.num_steps,
    )
    in_sums = jax.tree.map(lambda x: jnp.where(alive, x.astype(accumulator), 0.0), sent) if stacks else None
    return sums, (record, in_sums)


def _spread(update: Params) -> Spread:
    """A client's summand in the spread of its cohort, before it is weighed."""
    squared_norm = _tree.inner_product(update, update)
    return Spread(squared_norm, jnp.ones_like(squared_norm))
