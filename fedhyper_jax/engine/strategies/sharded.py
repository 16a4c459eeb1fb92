"""Strategies of several devices, of one process or of many: every device runs its part of a cohort."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fedhyper_jax import _tree
from fedhyper_jax.base import PyTree
from fedhyper_jax.engine.strategies.contract import Slots, Strategy

AXIS = "clients"
"""Name of the axis of a mesh over which clients are divided."""


def sharded_strategy(inner: Strategy, mesh: Mesh | None = None) -> Strategy:
    """As `fedhyper_jax.engine.strategies.sharded`, of a strategy."""
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
        cohort = slots.length
        padding = -cohort % devices
        longest_first = jnp.argsort(-slots.steps) if slots.common_steps is None else jnp.arange(cohort)
        # Dealt there and back again, as at a card table; device after device.
        deal = np.arange(cohort + padding).reshape(-1, devices)
        deal[1::2] = deal[1::2, ::-1]
        deal = deal.T.reshape(-1)
        # a padded slot's position is none: what it says is dropped
        position = jnp.concatenate([longest_first, jnp.full(padding, cohort, longest_first.dtype)])[deal]
        dealt = slots.take(position)

        def one_device(shared, clients, position):
            sums, kept = inner.map_reduce(client_fn, shared, slots._replace(clients=clients))
            # Each device knows its own clients and zeros of the others, so that the one psum stacks them as it sums.
            stacked = jax.tree.map(
                lambda x: jnp.zeros((cohort, *x.shape[1:]), x.dtype).at[position].set(x, mode="drop"), kept
            )
            return _psum((sums, stacked))

        # Not checked for what varies between devices, since then every constant that a loss function starts a loop from
        # would have to be declared to vary.
        whole, divided = PartitionSpec(), PartitionSpec(AXIS)
        one_device = jax.shard_map(
            one_device, mesh=mesh, in_specs=(whole, divided, divided), out_specs=whole, check_vma=False
        )
        return one_device(shared, dealt.clients, position)

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
