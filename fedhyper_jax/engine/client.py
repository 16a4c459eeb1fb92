"""Local training: a pure loop over a client's local steps with the learning rate in the carry."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fedhyper_jax import _random, _tree
from fedhyper_jax.base import NOT_FINITE, Batch, LossFunction, Params, PyTree
from fedhyper_jax.data import Batches
from fedhyper_jax.engine.strategies import Loop, compiled_loop
from fedhyper_jax.parts import (
    ClientFacts,
    ClientResult,
    ClientRule,
    Contribution,
    LocalTerm,
    Outcome,
    RateReport,
    TermContext,
    probes,
)
from fedhyper_jax.tasks import losses_of


class _Carry(NamedTuple):
    params: Params
    optimizer: PyTree
    rate: PyTree
    loss: Float[Array, ""]
    examples: Int[Array, ""]
    displacement: PyTree  # _Displacement where a term asks for it


class _Displacement(NamedTuple):
    """A client that starts at 0 and whose every loss gradient is 1.

    It has one parameter, or one a leaf where the optimizer tells leaves apart; those that move go the same way.
    """

    optimizer: PyTree
    position: PyTree
    rate_sum: Float[Array, ""]


def _not_displaced(optimizer, params: Params, zero: Float[Array, ""]) -> _Displacement:
    position = probes.stand_in(optimizer, params, zero.dtype)
    return _Displacement(optimizer.init(position), position, zero)


class Trainer(NamedTuple):
    """The same for every client: loss, optimizer, rule and terms.

    Attributes:
      loss_fn: ``(params, batch) -> per-example losses``, or of a key as well.
      optimizer: the clients' optax optimizer, its state afresh each round; its updates descend (−g for plain SGD). It
        and the rule get the extra arguments ``value`` (the local objective on the batch), ``gradient``, ``value_fn``
        (the same objective as a function of the parameters) and ``global_update`` (Δ^{t-1}). Keys in its state are the
        client's own in every round.
      rule: how the rate moves; its products are taken of what the optimizer is fed, but for leaves that masks or labels
        keep where they are.
      terms: what the method adds to the objective.
    """

    loss_fn: LossFunction
    optimizer: optax.GradientTransformationExtraArgs
    rule: ClientRule
    terms: tuple[LocalTerm, ...]

    @property
    def measures_displacement(self) -> bool:
        """Whether a term asks for a_m."""
        return any(term.needs_displacement for term in self.terms)


class Trained(NamedTuple):
    """Result of a client's local training."""

    contributions: tuple[Contribution, ...]  # one a term
    result: ClientResult  # its update is the one that is averaged: Δ_m = w − w_m, unless a term changed it
    rate_report: RateReport

    def not_finite(self, update: Params) -> Int[Array, ""]:
        """What is not, of all numbers and those of the update as it arrives: a number of `NOT_FINITE`, 0 if all are."""
        sent = [(c.mean, c.total, c.row) for c in self.contributions]
        kinds = (self.result.loss, self.result.rate, (update, sent))
        fails = [~_tree.is_finite(kind) for kind in kinds]
        names = ("its loss", "its rate", "its update")
        return jnp.select(fails, [jnp.int32(NOT_FINITE.index(name)) for name in names], 0)


class Broadcast(NamedTuple):
    """Start of a client's round."""

    params: Params  # w^t
    rate: Float[Array, ""]
    settings: PyTree  # of the client rule
    pseudo_gradient: Params  # Δ^{t-1}
    shared: dict[str, PyTree]  # the terms' states on the server
    rows: dict[str, PyTree]  # the client's rows


def train_client(
    trainer: Trainer,
    broadcast: Broadcast,
    *,
    fetch: Callable[[Int[Array, " batch"]], Batch],
    batches: Batches,
    whole: Callable[[], Batches],
    facts: ClientFacts,
    num_steps: int | Int[Array, ""],
    optimizer_key: Callable[[], Array],
    key: Array | None = None,
    loop: Loop = compiled_loop,
) -> Trained:
    """Trains one client for one round: w_m^{k+1} = w_m^k + β_m^k · optimizer(g_m^k), from w_m^0 = w.

    Args:
      trainer: what is the same for every client.
      broadcast: what the client starts from.
      fetch: gives the examples that a batch names.
      batches: the client's batches.
      whole: gives batches that hold each of the client's examples once.
      facts: what is known of the client.
      num_steps: steps to run, at least K_m; those from K_m on leave parameters, optimizer and rate as they are. Where
        it is a Python number, all clients are known to take just so many, and nothing is masked.
      key: of the client's losses in this round, where they draw.
      optimizer_key: gives the client's key of this round for an optimizer that draws noise; folded into the optimizer's
        own keys.
      loop: how steps are repeated.

    Returns:
      The client's result.
    """
    params, rate, settings, _, shared, rows = broadcast
    client = _Client(
        trainer=trainer,
        fetch=fetch,
        batches=batches,
        key=key,
        transform=trainer.rule.transform(settings, rate, facts),
        contexts=[TermContext(params, shared[term.name], rows.get(term.name, ()), facts) for term in trainer.terms],
        global_update=broadcast.pseudo_gradient,
        masks_steps=not isinstance(num_steps, int),
        tells_apart=probes.tells_apart(trainer.optimizer, params),
    )
    zero = jnp.zeros((), rate.dtype)
    optimizer = trainer.optimizer
    start = _Carry(
        params=params,
        optimizer=_random.with_own_keys(optimizer.init(params), optimizer_key),
        rate=client.transform.init(params),
        loss=zero,
        examples=jnp.zeros((), jnp.int32),
        displacement=_not_displaced(optimizer, params, zero) if trainer.measures_displacement else (),
    )
    end = loop(num_steps, functools.partial(_step, client), start)
    return _trained(client, params, end, lambda: _full_gradient(client, params, whole()))


class _Client(NamedTuple):
    """The same through all steps of one client."""

    trainer: Trainer
    fetch: Callable[[Int[Array, " batch"]], Batch]
    batches: Batches
    key: Array | None  # of its losses, where they draw
    transform: optax.GradientTransformationExtraArgs  # of the client rule
    contexts: list[TermContext]  # one a term
    global_update: Params  # Δ^{t-1}
    masks_steps: bool  # whether steps may be run that are not the client's
    tells_apart: bool  # whether the optimizer treats parameters by their place, and so may leave some where they are

    @property
    def terms(self) -> list[tuple[LocalTerm, TermContext]]:
        """The terms, each with what it sees."""
        return list(zip(self.trainer.terms, self.contexts, strict=True))

    def batch_loss(self, params: Params, rows, mask, number) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Mean and sum of the losses of a masked batch; the same ``number``, the same random numbers."""
        key = None if self.key is None else jax.random.fold_in(self.key, number)
        losses = losses_of(self.trainer.loss_fn, params, self.fetch(rows), len(mask), key)
        # (the sum of a batch's losses may not fit into float16, nor be exact in bfloat16)
        total = jnp.sum(jnp.where(mask, losses.astype(_tree.accumulator_dtype(losses)), 0.0))
        return total / jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1), total


def _step(client: _Client, k, carry: _Carry) -> _Carry:
    """One local step: objective → gradient → direction → rate → parameters."""
    rows, mask = client.batches.at(k)

    def objective(params):
        value, total = client.batch_loss(params, rows, mask, k)
        for term, context in client.terms:
            if term.objective is not None:
                value = term.objective(value, params, context)
        return value, total

    (value, total), gradient = jax.value_and_grad(objective, has_aux=True)(carry.params)
    for term, context in client.terms:
        if term.direction is not None:
            gradient = term.direction(gradient, carry.params, context)
    extra = {
        "value": value,
        "gradient": gradient,
        "value_fn": lambda params: objective(params)[0],
        "global_update": client.global_update,
    }
    direction, optimizer_state = client.trainer.optimizer.update(gradient, carry.optimizer, carry.params, **extra)
    if client.tells_apart:  # to the loss along the step, parameters that stand still are constants
        moving = jax.tree.map(lambda g, u: jnp.where(jnp.any(u != 0), g, jnp.zeros_like(g)), gradient, direction)
        extra = {**extra, "gradient": moving}
    updates, rate_state = client.transform.update(direction, carry.rate, carry.params, **extra)
    displaced = client.trainer.measures_displacement
    new = _Carry(
        params=optax.apply_updates(carry.params, updates),
        optimizer=optimizer_state,
        rate=rate_state,
        loss=carry.loss + total.astype(carry.loss.dtype),
        examples=carry.examples + jnp.sum(mask, dtype=jnp.int32),
        displacement=_advance(client, carry.displacement, rate_state.rate) if displaced else (),
    )
    return _tree.select(k < client.batches.num_steps, new, carry) if client.masks_steps else new


def _advance(client: _Client, displacement: _Displacement, rate) -> _Displacement:
    curvature = sum(term.curvature(context) for term, context in client.terms if term.curvature)
    gradient = jax.tree.map(lambda position: 1 + curvature * position, displacement.position)
    extra = {"value": rate, "gradient": gradient, "value_fn": lambda p: rate, "global_update": gradient}
    update, state = client.trainer.optimizer.update(gradient, displacement.optimizer, displacement.position, **extra)
    position = jax.tree.map(lambda old, step: old + rate * step, displacement.position, update)
    return _Displacement(state, position, displacement.rate_sum + rate)


def _full_gradient(client: _Client, params: Params, every: Batches) -> Params:
    """∇F_m(w) over all the client's examples."""

    def one_batch(k, carry):
        total, count = carry
        rows, mask = every.at(k)
        # (numbers that no local step has)
        gradient = jax.grad(lambda p: client.batch_loss(p, rows, mask, client.batches.num_steps + k)[1])(params)
        total = jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, gradient)
        return total, count + jnp.sum(mask, dtype=jnp.int32)

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, _tree.accumulator_dtype(w)), params)
    total, count = compiled_loop(every.num_steps, one_batch, (zeros, jnp.zeros((), jnp.int32)))
    return jax.tree.map(lambda t: t / jnp.maximum(count, 1).astype(t.dtype), total)


def _trained(client: _Client, start: Params, end: _Carry, full_gradient: Callable[[], Params]) -> Trained:
    """The result of a client that has taken its steps."""
    update, zero = _tree.subtract(start, end.params), jnp.zeros((), end.loss.dtype)
    rate_sum, displacement = zero, zero
    if end.displacement:
        moved = [-position.reshape(()) for position in jax.tree.leaves(end.displacement.position)]
        rate_sum, displacement = end.displacement.rate_sum, functools.reduce(jnp.maximum, moved)
    curved = any(term.curvature for term in client.trainer.terms)
    outcome = Outcome(update, rate_sum, displacement, curved, full_gradient)
    contributions = tuple(term.finish(outcome, context) for term, context in client.terms)
    # Only a term that defines the step changes what is averaged, and there is one of them at most.
    own = (c.update for term, c in zip(client.trainer.terms, contributions, strict=True) if term.defines_step)
    result = ClientResult(
        update=next(own, update),
        displacement=update,
        rate=end.rate.rate,
        rate_state=end.rate,
        loss=end.loss,
        examples=end.examples,
        num_steps=client.batches.num_steps,
        batch_loss=lambda k, params: client.batch_loss(params, *client.batches.at(k), k)[0],
    )
    return Trained(contributions, result, client.trainer.rule.report(end.rate))
