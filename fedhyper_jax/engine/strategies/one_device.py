"""Strategies of one device: all clients side by side, one after the other, or in chunks."""

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


def _side_by_side(client_fn, shared, slots: Slots):
    # One unbatched bound for all: the loop ends with the longest client, and vmap leaves its condition alone.
    bound = _common(jnp.max(slots.steps)) if slots.common_steps is None else slots.common_steps
    summands, kept = jax.vmap(lambda client: client_fn(shared, client, bound, compiled_loop))(slots.clients)
    return total_of(summands), kept


def _zeros_like_sum(client_fn, shared, slots: Slots):
    bound = slots.steps[0] if slots.common_steps is None else slots.common_steps
    first = jax.tree.map(lambda leaf: leaf[0], slots.clients)
    shapes, _ = jax.eval_shape(lambda client: client_fn(shared, client, bound, compiled_loop), first)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _one_by_one(client_fn, shared, slots: Slots):
    def one(total, client):
        bound = _common(client.num_steps) if slots.common_steps is None else slots.common_steps
        summand, kept = client_fn(shared, client, bound, compiled_loop)
        return add(total, summand), kept

    return lax.scan(one, _zeros_like_sum(client_fn, shared, slots), slots.clients)


def _in_chunks(size: int):
    """As ``_by_length``, where lengths differ; else in the order of the slots."""

    def map_reduce(client_fn, shared, slots: Slots):
        if slots.common_steps is None:
            return _by_length(size, client_fn, shared, slots)
        return _chunk_by_chunk(min(size, slots.length), client_fn, shared, slots)

    return map_reduce


def _chunk_by_chunk(width: int, client_fn, shared, slots: Slots):
    number = slots.length
    if number % width:
        slots = slots.take(jnp.arange(number + -number % width))
    chunks = jax.tree.map(lambda x: x.reshape(-1, width), slots.clients)

    def one(total, chunk):
        summand, kept = _side_by_side(client_fn, shared, slots._replace(clients=chunk))
        return add(total, summand), kept

    total, kept = lax.scan(one, _zeros_like_sum(client_fn, shared, slots), chunks)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:number], kept)


def _by_length(size: int, client_fn, shared, slots: Slots):
    # Neighbours of like length waste the fewest masked steps. Lengths are skewed, so most of what would be wasted
    # would be wasted in the chunk of the longest.
    width = min(size, slots.length)
    order = jnp.argsort(slots.steps)
    alone = width if width < slots.length else 0
    shorter = slots.length - alone
    total, kept = _chunk_by_chunk(width, client_fn, shared, slots.take(order[:shorter]))
    if alone:
        total_of_longest, of_longest = _one_by_one(client_fn, shared, slots.take(order[shorter:]))
        total = add(total, total_of_longest)
        kept = jax.tree.map(lambda *parts: jnp.concatenate(parts), kept, of_longest)
    inverse = jnp.argsort(order)
    return total, jax.tree.map(lambda x: x[inverse], kept)


vectorized = Strategy("vectorized", _side_by_side)
"""All clients of the cohort side by side under one ``vmap``."""

sequential = Strategy("sequential", _one_by_one)
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
    return Strategy(f"chunked({size})", _in_chunks(size))
