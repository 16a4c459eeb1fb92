"""The third stage of a round: what the server makes of what arrived."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fedhyper_jax import _tree
from fedhyper_jax.base import Params, PyTree, ServerState
from fedhyper_jax.parts import Feedback, Gathered, Parts, Proposal, RateReport, TermSums


class Step(NamedTuple):
    """The server's proposal, and what it was made from."""

    proposal: Proposal
    feedback: Feedback  # to the rule of the global rate
    reports: tuple[RateReport, RateReport]  # of the rules of the global and the local rate


def server_step(parts: Parts, key: Array, state: ServerState, gathered: Gathered) -> Step:
    """Aggregates, lets the terms conclude, moves the rates and steps."""
    pseudo_gradient, aggregator, terms, scale = _pseudo_gradient(parts, key, state, gathered)
    reference = state.direction if parts.inner_product == "applied" else state.pseudo_gradient
    feedback = functools.partial(
        Feedback,
        inner_product=_tree.inner_product(pseudo_gradient, reference),
        pseudo_gradient=pseudo_gradient,
        client_loss=gathered.client_loss,
        scale=scale,
        failed=gathered.failed,
        previous=state.pseudo_gradient,
        reference=reference,
        spread=gathered.spread,
    )
    # α is moved first and then used; β is moved for the next round.
    of_global, of_local = (
        feedback(round=number, reported=reported)
        for number, reported in zip((state.round, state.round + 1), gathered.reported, strict=True)
    )
    global_state, global_report = parts.global_rate.update(state.global_rate, of_global)
    local_state, local_report = parts.local_rate.update(state.local_rate, of_local)
    updates, optimizer_state = parts.server_optimizer.update(
        pseudo_gradient,
        state.server_optimizer,
        state.params,
        value=gathered.client_loss,
        gradient=pseudo_gradient,
        global_rate=global_state.rate,
    )
    params = optax.apply_updates(state.params, _tree.scale(updates, global_state.rate))
    proposal = Proposal(
        params=params,
        pseudo_gradient=pseudo_gradient,
        server_optimizer=optimizer_state,
        terms=terms,
        aggregator=aggregator,
        direction=jax.tree.map(jnp.negative, updates) if parts.inner_product == "applied" else (),
        evaluation=_evaluation(parts, state, params),
        global_rate=global_state,
        local_rate=local_state,
    )
    return Step(proposal, of_global, (global_report, local_report))


def _evaluation(parts: Parts, state: ServerState, params: Params) -> PyTree:
    """What is kept for evaluation besides the new parameters."""
    if parts.evaluate_at == "mean_of_last_two":
        return state.params
    if parts.evaluate_at == "last":
        return ()
    weight = 9 / (state.round + 9)

    def leaf(average, new):
        dtype = _tree.accumulator_dtype(average)
        average = average.astype(dtype)
        return (average + weight.astype(dtype) * (new.astype(dtype) - average)).astype(new.dtype)

    return jax.tree.map(leaf, state.evaluation, params)


def _pseudo_gradient(
    parts: Parts, key: Array, state: ServerState, gathered: Gathered
) -> tuple[Params, PyTree, dict[str, PyTree], Array | None]:
    """Δ^t, the states of aggregator and terms, and how many times a mean of updates Δ^t is (None: once)."""
    update, aggregator = parts.aggregator.combine(key, state.aggregator, gathered)
    pseudo_gradient = jax.tree.map(lambda mean, w: mean.astype(w.dtype), update, state.params)
    terms, scale = {}, None
    for term, mean, total in zip(parts.terms, gathered.term_means, gathered.term_totals, strict=True):
        sums = TermSums(pseudo_gradient, mean, total, state.params)
        terms[term.name], pseudo_gradient, own_scale = term.conclude(state.terms[term.name], sums)
        scale = scale if own_scale is None else own_scale  # one term at most defines the step
    return pseudo_gradient, aggregator, terms, scale
