"""Execution strategies for "map over clients, then weighted reduce". They differ in speed and memory, never in results
beyond the order of summation.

Per-client scalars are stacked; client updates are summed as they come and never stacked, but for the clients that run
side by side.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import PyTree
from fedhyper_jax.client import compiled_loop

ClientFunction = Callable[..., tuple[PyTree, Any]]
"""``client_fn(client_id, num_steps, loop) -> (summand, scalars)``."""


class Slots(NamedTuple):
    """What a strategy is to run."""

    client_ids: Int[Array, " cohort"]
    steps: Int[Array, " cohort"]  # K_m
    common_steps: int | None  # the number of steps, where it is static and the same for all
    padding_id: int  # the client id of a slot that does nothing: the population


class Strategy(NamedTuple):
    """How the clients of a cohort are run.

    Attributes:
      name: as in configurations.
      map_reduce: ``map_reduce(client_fn, slots) -> (sum, stacked scalars)``.
      compiles: whether it may run inside ``jit``.
    """

    name: str
    map_reduce: Callable[[ClientFunction, Slots], tuple[PyTree, Any]]
    compiles: bool = True


def _sum(stacked: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked)


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


def _side_by_side(client_fn, client_ids, steps, common_steps):
    # One unbatched bound for all: the loop ends with the longest client, and vmap leaves its condition alone.
    bound = jnp.max(steps) if common_steps is None else common_steps
    summands, scalars = jax.vmap(lambda client_id: client_fn(client_id, bound, compiled_loop))(client_ids)
    return _sum(summands), scalars


def _zeros_like_sum(client_fn, slots: Slots):
    bound = slots.steps[0] if slots.common_steps is None else slots.common_steps
    shapes, _ = jax.eval_shape(lambda client_id: client_fn(client_id, bound, compiled_loop), slots.client_ids[0])
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _vectorized(client_fn, slots: Slots):
    return _side_by_side(client_fn, slots.client_ids, slots.steps, slots.common_steps)


def _sequential(client_fn, slots: Slots):
    def one(total, slot):
        client_id, steps = slot
        bound = steps if slots.common_steps is None else slots.common_steps
        summand, scalars = client_fn(client_id, bound, compiled_loop)
        return _add(total, summand), scalars

    return lax.scan(one, _zeros_like_sum(client_fn, slots), (slots.client_ids, slots.steps))


def _chunked(size: int):
    def map_reduce(client_fn, slots: Slots):
        cohort = slots.client_ids.shape[0]
        width = min(size, cohort)
        padding = -cohort % width
        # Neighbours of like length waste the fewest masked steps.
        order = jnp.argsort(slots.steps) if slots.common_steps is None else jnp.arange(cohort)
        padding_ids = jnp.full(padding, slots.padding_id, slots.client_ids.dtype)
        ids = jnp.concatenate([slots.client_ids[order], padding_ids])
        steps = jnp.concatenate([slots.steps[order], jnp.zeros(padding, slots.steps.dtype)])

        def one(total, chunk):
            summand, scalars = _side_by_side(client_fn, *chunk, slots.common_steps)
            return _add(total, summand), scalars

        chunks = (ids.reshape(-1, width), steps.reshape(-1, width))
        total, scalars = lax.scan(one, _zeros_like_sum(client_fn, slots), chunks)
        inverse = jnp.argsort(order)
        return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:cohort][inverse], scalars)

    return map_reduce


class ClientError(RuntimeError):
    """An error inside a client's local training; the message names client and step, `__cause__` is the error itself."""


def _debug(client_fn, slots: Slots):
    if _validate.is_traced(slots.client_ids):
        raise ValueError("the strategy 'debug' runs without jit; call round eagerly, or use run(..., compiles=False)")
    total, stacked = None, []
    for client_id, client_steps in zip(slots.client_ids, slots.steps, strict=True):

        def loop(num_steps, body, carry, client_id=client_id):
            warned = False
            for k in range(int(num_steps)):
                try:
                    carry = body(jnp.asarray(k), carry)
                except Exception as error:
                    raise ClientError(f"client {int(client_id)}, local step {k}: {error}") from error
                if not warned and not _tree.is_finite(carry):
                    warned = True
                    warnings.warn(
                        f"client {int(client_id)}, local step {k}: parameters, loss or rate are no longer finite; "
                        "the client will be left out of the average",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            return carry

        summand, scalars = client_fn(client_id, client_steps, loop)
        total = summand if total is None else _add(total, summand)
        stacked.append(scalars)
    return total, jax.tree.map(lambda *values: jnp.stack(values), *stacked)


vectorized = Strategy("vectorized", _vectorized)
"""All clients of the cohort side by side under one ``vmap``."""

sequential = Strategy("sequential", _sequential)
"""One client after the other in a scan; memory for one copy of the model."""

debug = Strategy("debug", _debug, compiles=False)
"""Plain Python loops without jit; errors name client and step, and a client that turns non-finite is named."""


def chunked(size: int) -> Strategy:
    """A scan over chunks of ``size`` clients side by side, sorted by their number of local steps.

    Example:
      >>> chunked(5).name
      'chunked(5)'
    """
    _validate.positive_integer(size=size)
    return Strategy(f"chunked({size})", _chunked(size))


def parse_strategy(strategy: str | Strategy) -> Strategy:
    """A strategy from its name: 'vectorized', 'sequential', 'chunked(c)' or 'debug'.

    Example:
      >>> parse_strategy("chunked(8)").name
      'chunked(8)'
    """
    if isinstance(strategy, Strategy):
        return strategy
    named = {known.name: known for known in (vectorized, sequential, debug)}
    match = re.fullmatch(r"chunked\((\d+)\)", str(strategy))
    if match:
        return chunked(int(match[1]))
    _validate.one_of([*named, "chunked(c)"], strategy=strategy)
    if strategy not in named:
        raise ValueError("strategy 'chunked(c)' needs a number, e.g. 'chunked(5)'")
    return named[strategy]
