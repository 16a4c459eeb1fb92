"""Execution strategies for "map over clients, then weighted reduce". They differ in speed and memory, never in results
beyond the order of summation.

Per-client scalars are stacked; client updates are summed as they come and never stacked, but for the clients that run
side by side. `sharded` deals the cohort to several devices, of one process or of many.
"""

import re

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fedhyper_jax import _validate
from fedhyper_jax.base import PyTree
from fedhyper_jax.engine.strategies.contract import Assignment, ClientFunction, Loop, Slots, Strategy, compiled_loop
from fedhyper_jax.engine.strategies.debug import ClientError, debug
from fedhyper_jax.engine.strategies.one_device import chunked, sequential, vectorized
from fedhyper_jax.engine.strategies.sharded import AXIS, sharded_strategy

__all__ = [
    "AXIS",
    "Assignment",
    "ClientError",
    "ClientFunction",
    "Loop",
    "Slots",
    "Strategy",
    "chunked",
    "compiled_loop",
    "debug",
    "divided",
    "parse_strategy",
    "place",
    "sequential",
    "sharded",
    "vectorized",
]


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
    return sharded_strategy(parse_strategy(inner), mesh)


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
