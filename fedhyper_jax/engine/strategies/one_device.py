"""Strategies of one device: all clients side by side, one after the other, or in chunks."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int

from fedhyper_jax import _validate
from fedhyper_jax.engine.strategies.contract import Slots, Strategy, add, compiled_loop, total_of


@custom_vmap
def _common(bound: Int[Array, ""]) -> Int[Array, ""]:
    """A bound of a loop that runs of a sweep share.

    Plain ``vmap`` would let each run's loop end by itself, which costs a choice between old and new of everything that
    the loop carries. Steps beyond a client's own are masked anyway.
    """
    return bound


@_common.def_vmap
def _(axis_size, is_batched, bound):
    del axis_size
    return (jnp.max(bound) if is_batched[0] else bound), False


def _strategy(name: str, map_reduce) -> Strategy:
    """A strategy from ``map_reduce(train, slots)`` with ``train(client, num_steps)``, which is traced once however
    often it is called.
    """

    def of_function(client_fn, shared, slots: Slots):
        common = slots.common_steps  # (static: the client function tells it from a number that is traced)
        if common is None:
            traced = jax.jit(lambda shared, client, bound: client_fn(shared, client, bound, compiled_loop))
            return map_reduce(functools.partial(traced, shared), slots)
        traced = jax.jit(lambda shared, client: client_fn(shared, client, common, compiled_loop))
        return map_reduce(lambda client, _: traced(shared, client), slots)

    return Strategy(name, of_function)


def _side_by_side(train, slots: Slots):
    # One unbatched bound for all: the loop ends with the longest client, and vmap leaves its condition alone.
    bound = _common(jnp.max(slots.steps))
    summands, kept = jax.vmap(lambda client: train(client, bound))(slots.clients)
    return total_of(summands), kept


def _zeros_like_sum(train, slots: Slots):
    first = jax.tree.map(lambda leaf: leaf[0], slots.clients)
    shapes, _ = jax.eval_shape(train, first, first.num_steps)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _one_by_one(train, slots: Slots):
    def one(total, client):
        summand, kept = train(client, _common(client.num_steps))
        return add(total, summand), kept

    return lax.scan(one, _zeros_like_sum(train, slots), slots.clients)


def _in_chunks(size: int):
    """As ``_by_length``, where lengths differ; else in the order of the slots."""

    def map_reduce(train, slots: Slots):
        if slots.common_steps is None:
            return _by_length(size, train, slots)
        return _chunk_by_chunk(min(size, slots.length), train, slots)

    return map_reduce


def _chunk_by_chunk(width: int, train, slots: Slots):
    number = slots.length
    if number % width:
        slots = slots.take(jnp.arange(number + -number % width))
    chunks = jax.tree.map(lambda x: x.reshape(-1, width), slots.clients)

    def one(total, chunk):
        summand, kept = _side_by_side(train, slots._replace(clients=chunk))
        return add(total, summand), kept

    total, kept = lax.scan(one, _zeros_like_sum(train, slots), chunks)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:number], kept)


def _by_length(size: int, train, slots: Slots):
    # Neighbours of like length waste the fewest masked steps. Lengths are skewed, so most of what would be wasted
    # would be wasted in the chunk of the longest.
    width = min(size, slots.length)
    order = jnp.argsort(slots.steps)
    alone = width if width < slots.length else 0
    shorter = slots.length - alone
    total, kept = _chunk_by_chunk(width, train, slots.take(order[:shorter]))
    if alone:
        total_of_longest, of_longest = _one_by_one(train, slots.take(order[shorter:]))
        total = add(total, total_of_longest)
        kept = jax.tree.map(lambda *parts: jnp.concatenate(parts), kept, of_longest)
    inverse = jnp.argsort(order)
    return total, jax.tree.map(lambda x: x[inverse], kept)


vectorized: Strategy = _strategy("vectorized", _side_by_side)
"""All clients of the cohort side by side under one ``vmap``."""

sequential: Strategy = _strategy("sequential", _one_by_one)
"""One client after the other in a scan; memory for one copy of the model."""


def chunked(size: int) -> Strategy:
    """A scan over chunks of ``size`` clients side by side, sorted by their number of local steps.

    A chunk ends with its longest client. Where numbers of steps differ, the ``size`` longest clients of the cohort run
    one after the other instead, which keeps the steps that are run for nobody under 20 % in skewed cohorts of 100.

    Example:
      >>> chunked(5).name
      'chunked(5)'
    """
    _validate.positive_integer(size=size)
    return _strategy(f"chunked({size})", _in_chunks(size))
