"""The contract of a strategy: a way to map over the clients of a cohort and sum up what they give."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from fedhyper_jax.base import PyTree

ClientFunction = Callable[..., tuple[PyTree, Any]]
"""``client_fn(shared, assignment, num_steps, loop) -> (summand, kept)``; ``num_steps`` ≥ the client's own are run.

Arrays reach it through ``shared`` only."""

Loop = Callable[[Any, Callable, Any], Any]
"""``loop(num_steps, body, carry)``: a `for k in range(num_steps): carry = body(k, carry)`."""


def compiled_loop(num_steps: Array, body: Callable[..., Any], carry: PyTree) -> PyTree:
    """The loop of every strategy but ``debug``: a scan where the number of steps is static, else a while loop."""
    return lax.fori_loop(0, num_steps, body, carry)


class Assignment(NamedTuple):
    """One client's work in a round; scalars, or (cohort,) for all of them.

    Attributes:
      client_id: the client; the population for an empty slot.
      num_steps: K_m, those that failures take away left out; 0 for an empty slot.
    """

    client_id: Int[Array, "*cohort"]
    num_steps: Int[Array, "*cohort"]


class Slots(NamedTuple):
    """The clients that a strategy is to run, slot by slot.

    Attributes:
      clients: their ids and steps, (cohort,) each.
      common_steps: the number of steps, where it is static and the same for all.
      padding_id: the client id of a slot that does nothing: the population.
    """

    clients: Assignment
    common_steps: int | None
    padding_id: int

    @property
    def steps(self) -> Int[Array, " cohort"]:
        """K_m."""
        return self.clients.num_steps

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.steps.shape[0]

    def take(self, position: Int[Array, " slots"]) -> "Slots":
        """The slots at some positions; beyond the last one, slots that do nothing."""
        padding = Assignment(self.padding_id, 0)
        taken = (
            jnp.take(values, position, mode="fill", fill_value=fill)
            for values, fill in zip(self.clients, padding, strict=True)
        )
        return Slots(Assignment(*taken), self.common_steps, self.padding_id)


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
