"""Execution strategies for "map over clients, then weighted reduce". They differ in speed and memory, never in results
beyond the order of summation.

Per-client scalars are stacked; client updates are summed as they come and never stacked, but for the clients that run
side by side. `sharded` deals the cohort to several devices, of one process or of many.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import PyTree
from fedhyper_jax.client import compiled_loop

ClientFunction = Callable[..., tuple[PyTree, Any]]
"""``client_fn(shared, client_id, num_steps, loop) -> (summand, scalars)``; arrays reach it through ``shared`` only."""


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
      map_reduce: ``map_reduce(client_fn, shared, slots) -> (sum, stacked scalars)``.
      compiles: whether it may run inside ``jit``.
      mesh: the devices it runs on, where there are several.
    """

    name: str
    map_reduce: Callable[[ClientFunction, PyTree, Slots], tuple[PyTree, Any]]
    compiles: bool = True
    mesh: Mesh | None = None


def _sum(stacked: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked)


def _add(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


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


def _side_by_side(client_fn, shared, client_ids, steps, common_steps):
    # One unbatched bound for all: the loop ends with the longest client, and vmap leaves its condition alone.
    bound = _common(jnp.max(steps)) if common_steps is None else common_steps
    summands, scalars = jax.vmap(lambda client_id: client_fn(shared, client_id, bound, compiled_loop))(client_ids)
    return _sum(summands), scalars


def _zeros_like_sum(client_fn, shared, slots: Slots):
    bound = slots.steps[0] if slots.common_steps is None else slots.common_steps
    first = slots.client_ids[0]
    shapes, _ = jax.eval_shape(lambda client_id: client_fn(shared, client_id, bound, compiled_loop), first)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _vectorized(client_fn, shared, slots: Slots):
    return _side_by_side(client_fn, shared, slots.client_ids, slots.steps, slots.common_steps)


def _sequential(client_fn, shared, slots: Slots):
    def one(total, slot):
        client_id, steps = slot
        bound = _common(steps) if slots.common_steps is None else slots.common_steps
        summand, scalars = client_fn(shared, client_id, bound, compiled_loop)
        return _add(total, summand), scalars

    return lax.scan(one, _zeros_like_sum(client_fn, shared, slots), (slots.client_ids, slots.steps))


def _chunked(size: int):
    def map_reduce(client_fn, shared, slots: Slots):
        cohort = slots.client_ids.shape[0]
        width = min(size, cohort)
        # Neighbours of like length waste the fewest masked steps. Lengths are skewed, so most of what would be wasted
        # would be wasted in the chunk of the longest.
        varies = slots.common_steps is None
        order = jnp.argsort(slots.steps) if varies else jnp.arange(cohort)
        alone = width if varies and width < cohort else 0
        padding = -(cohort - alone) % width
        ids, steps = slots.client_ids[order], slots.steps[order]
        longest = slots._replace(client_ids=ids[cohort - alone :], steps=steps[cohort - alone :])
        padding_ids = jnp.full(padding, slots.padding_id, ids.dtype)
        ids = jnp.concatenate([ids[: cohort - alone], padding_ids]).reshape(-1, width)
        steps = jnp.concatenate([steps[: cohort - alone], jnp.zeros(padding, steps.dtype)]).reshape(-1, width)

        def one(total, chunk):
            summand, scalars = _side_by_side(client_fn, shared, *chunk, slots.common_steps)
            return _add(total, summand), scalars

        total, scalars = lax.scan(one, _zeros_like_sum(client_fn, shared, slots), (ids, steps))
        scalars = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: cohort - alone], scalars)
        if alone:
            total_of_longest, of_longest = _sequential(client_fn, shared, longest)
            total = _add(total, total_of_longest)
            scalars = jax.tree.map(lambda *parts: jnp.concatenate(parts), scalars, of_longest)
        inverse = jnp.argsort(order)
        return total, jax.tree.map(lambda x: x[inverse], scalars)

    return map_reduce


class ClientError(RuntimeError):
    """An error inside a client's local training; the message names client and step, `__cause__` is the error itself."""


def _debug(client_fn, shared, slots: Slots):
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

        summand, scalars = client_fn(shared, client_id, client_steps, loop)
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

    A chunk ends with its longest client. Where numbers of steps differ, the ``size`` longest clients of the cohort run
    one after the other instead, which keeps the steps that are run for nobody under 20 % in skewed cohorts of 100.

    Example:
      >>> chunked(5).name
      'chunked(5)'
    """
    _validate.positive_integer(size=size)
    return Strategy(f"chunked({size})", _chunked(size))


AXIS = "clients"
"""Name of the axis of a mesh over which clients are divided."""


def sharded(inner: str | Strategy = "vectorized", mesh: Mesh | None = None) -> Strategy:
    """Every device runs its part of the cohort by the strategy ``inner``; one ``psum`` a round adds the parts up.

    The devices may be several of one process or those of many (``jax.distributed``), which all run this same program.
    Clients are dealt so that devices get alike work; a cohort that the devices do not divide is padded. What is kept of
    each client (its row of the state) crosses the network too, since every device keeps all rows.

    Args:
      inner: 'vectorized', 'sequential' or 'chunked(c)'.
      mesh: with an axis 'clients'; all devices of all processes if None.

    Raises:
      ValueError: an inner strategy that cannot be sharded, a mesh without the axis.

    Example:
      >>> sharded("chunked(5)").name
      'sharded(chunked(5))'
    """
    inner = parse_strategy(inner)
    if not inner.compiles or inner.mesh is not None:
        raise ValueError(f"sharded runs 'vectorized', 'sequential' or 'chunked(c)' on each device, got {inner.name!r}")
    if mesh is None:
        mesh = jax.make_mesh((len(jax.devices()),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    if AXIS not in mesh.axis_names:
        raise ValueError(f"mesh must have an axis {AXIS!r}, got {mesh.axis_names}; jax.make_mesh((8,), ({AXIS!r},))")
    return Strategy(f"sharded({inner.name})", _sharded(inner, mesh), mesh=mesh)


def _sharded(inner: Strategy, mesh: Mesh):
    devices = mesh.shape[AXIS]

    def map_reduce(client_fn, shared, slots: Slots):
        cohort = slots.client_ids.shape[0]
        padding = -cohort % devices
        longest_first = jnp.argsort(-slots.steps) if slots.common_steps is None else jnp.arange(cohort)
        # Dealt there and back again, as at a card table; device after device.
        deal = np.arange(cohort + padding).reshape(-1, devices)
        deal[1::2] = deal[1::2, ::-1]
        deal = deal.T.reshape(-1)
        # a padded slot's position is none: what it says is dropped
        position = jnp.concatenate([longest_first, jnp.full(padding, cohort, longest_first.dtype)])[deal]
        client_ids = jnp.take(slots.client_ids, position, mode="fill", fill_value=slots.padding_id)
        steps = jnp.take(slots.steps, position, mode="fill", fill_value=0)

        def one_device(shared, client_ids, steps, position):
            sums, scalars = inner.map_reduce(client_fn, shared, slots._replace(client_ids=client_ids, steps=steps))
            # Each device knows its own clients and zeros of the others, so that the one psum stacks them as it sums.
            stacked = jax.tree.map(
                lambda x: jnp.zeros((cohort, *x.shape[1:]), x.dtype).at[position].set(x, mode="drop"), scalars
            )
            return _psum((sums, stacked))

        # Not checked for what varies between devices, since then every constant that a loss function starts a loop from
        # would have to be declared to vary.
        whole, divided = PartitionSpec(), PartitionSpec(AXIS)
        one_device = jax.shard_map(
            one_device, mesh=mesh, in_specs=(whole, divided, divided, divided), out_specs=whole, check_vma=False
        )
        return one_device(shared, client_ids, steps, position)

    return map_reduce


def _psum(tree: PyTree) -> PyTree:
    """Sums over the devices in one collective, however many leaves: a message a round, not one a leaf."""
    leaves, structure = jax.tree.flatten(tree)
    dtype = _tree.accumulator_dtype(tree)

    def encode(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf.astype(dtype).reshape(-1)
        # float32 holds integers exactly up to 2^24 only, so they travel in halves
        leaf = leaf.astype(jnp.int32).reshape(-1)
        return jnp.concatenate([leaf >> 16, leaf & 0xFFFF]).astype(dtype)

    def decode(part, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            return part.reshape(leaf.shape).astype(leaf.dtype)
        high, low = part.astype(jnp.int32).reshape(2, *leaf.shape)
        return ((high << 16) + low).astype(leaf.dtype)

    encoded = [encode(leaf) for leaf in leaves]
    ends = np.cumsum([len(part) for part in encoded])
    parts = jnp.split(lax.psum(jnp.concatenate(encoded), AXIS), ends[:-1])
    return jax.tree.unflatten(structure, [decode(part, leaf) for part, leaf in zip(parts, leaves, strict=True)])


def divided(strategy: str, devices: int) -> str:
    """The name of a strategy as it is for several devices: sharded, where it is not yet and can be.

    Example:
      >>> divided("chunked(5)", 4), divided("debug", 4), divided("sequential", 1)
      ('sharded(chunked(5))', 'debug', 'sequential')
    """
    parsed = parse_strategy(strategy)
    return f"sharded({strategy})" if devices > 1 and parsed.compiles and parsed.mesh is None else strategy


def place(strategy: str | Strategy, tree: PyTree) -> PyTree:
    """The tree where a strategy wants it: whole on every device of its mesh.

    A compiled round takes arrays from anywhere, but copies those that are elsewhere at every call, and compiles again
    for a state that was elsewhere in the first call. Keys stay where they are: JAX places none across processes.
    """
    mesh = parse_strategy(strategy).mesh
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())

    def put(leaf):
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        return leaf if is_key else jax.device_put(leaf, whole)

    return jax.tree.map(put, tree)


def parse_strategy(strategy: str | Strategy) -> Strategy:
    """A strategy from its name: 'vectorized', 'sequential', 'chunked(c)', 'debug', or 'sharded(…)' of the first three.

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
    match = re.fullmatch(r"sharded\((.+)\)", str(strategy))
    if match:
        return sharded(match[1])
    _validate.one_of([*named, "chunked(c)", "sharded(...)"], strategy=strategy)
    if strategy not in named:
        raise ValueError("strategy 'chunked(c)' needs a number, e.g. 'chunked(5)'")
    return named[strategy]
