"""What a strategy is: a way to map over the clients of a cohort and sum up what they give."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from fedhyper_jax.base import PyTree

ClientFunction = Callable[..., tuple[PyTree, Any]]
"""``client_fn(shared, client, num_steps, loop) -> (summand, kept)``; arrays reach it through ``shared`` only."""

Loop = Callable[[Any, Callable, Any], Any]
"""``loop(num_steps, body, carry)``: a `for k in range(num_steps): carry = body(k, carry)`."""


def compiled_loop(num_steps, body, carry):
    """The loop of every strategy but ``debug``: a scan where the number of steps is static, else a while loop."""
    return lax.fori_loop(0, num_steps, body, carry)


class Slots(NamedTuple):
    """What a strategy is to run."""

    clients: PyTree  # what each client is told, (cohort, …) a leaf
    steps: Int[Array, " cohort"]  # K_m
    common_steps: int | None  # the number of steps, where it is static and the same for all
    padding: PyTree  # like one client of `clients`: a slot that does nothing

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.steps.shape[0]

    def take(self, position: Int[Array, " slots"]) -> "Slots":
        """The slots at some positions; beyond the last one, slots that do nothing."""

        def leaf(values, padding):
            return jnp.take(values, position, axis=0, mode="fill", fill_value=padding)

        return Slots(
            clients=jax.tree.map(leaf, self.clients, self.padding),
            steps=leaf(self.steps, 0),
            common_steps=self.common_steps,
            padding=self.padding,
        )


class Strategy(NamedTuple):
    """How the clients of a cohort are run.

    Attributes:
      name: as in configurations.
      map_reduce: ``map_reduce(client_fn, shared, slots) -> (sum, kept)``: the sum of the clients' summands, and what is
        kept of each, stacked in the order of the slots.
      compiles: whether it may run inside ``jit``.
      mesh: the devices it runs on, where there are several.
    """

    name: str
    map_reduce: Callable[[ClientFunction, PyTree, Slots], tuple[PyTree, Any]]
    compiles: bool = True
    mesh: Mesh | None = None


def total_of(stacked: PyTree) -> PyTree:
    """The sum over the first axis."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked)


def add(a: PyTree, b: PyTree) -> PyTree:
    """``a + b``."""
    return jax.tree.map(jnp.add, a, b)
