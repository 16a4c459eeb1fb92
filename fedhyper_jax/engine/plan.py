"""The first stage of a round: who starts, and how many steps each takes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedhyper_jax import _random, _tree
from fedhyper_jax.base import ServerState
from fedhyper_jax.data import ClientData, Cohort, LocalWork
from fedhyper_jax.engine.strategies import Assignment, Slots
from fedhyper_jax.parts import Parts


class Plan(NamedTuple):
    """A round before anything is trained."""

    clients: Assignment
    asked: Bool[Array, " cohort"]  # slots that hold a client
    started: Bool[Array, " cohort"]  # of these, clients that start
    common_steps: int | None  # the number of steps, where it is static and the same for all
    total_share: Float[Array, ""]  # Σ of what clients count for over the cohort (n_m, 1 or weights); at least 1
    mean_size: Float[Array, ""]  # mean of n over all clients of the data set
    cohort_size: Int[Array, ""]  # number of slots that hold a client
    padding_id: int  # the client id of an empty slot: the population

    @property
    def slots(self) -> Slots:
        """The clients as a strategy takes them."""
        return Slots(self.clients, self.common_steps, self.padding_id)


def share_of(parts: Parts, data: ClientData, client_ids: Int[Array, "*shape"], sizes: Array, ones: Any) -> Array:
    """What clients count for in the average, before it is divided by their sum: n_m, 1, or their weights."""
    if parts.weighting == "weights":
        return data.weights_of(client_ids)
    return sizes if parts.weighting == "examples" else ones


def plan_cohort(parts: Parts, work: LocalWork, keys: _random.RoundKeys, state: ServerState, cohort: Cohort) -> Plan:
    """Says who of a cohort starts and how many steps each takes; weights come later, when it is known who took part."""
    data, accumulator = cohort.data, _tree.accumulator_dtype(state.params)
    asked = cohort.client_ids < data.population
    sizes = data.sizes_of(cohort.client_ids)
    num_steps, before = work.num_steps(sizes), parts.failures.before
    if before is not None:
        failure_keys = jax.vmap(lambda m: _random.failure_key(keys.clients, m))(cohort.client_ids)
        num_steps = jax.vmap(lambda key, steps: before(key, state.failures, steps))(failure_keys, num_steps)
        num_steps = num_steps.astype(jnp.int32)
    # p_m ≤ 1 before summing, so that a mean of finite updates does not overflow on the way.
    shares = share_of(parts, data, cohort.client_ids, sizes, asked)
    return Plan(
        clients=Assignment(cohort.client_ids, num_steps),
        asked=asked,
        started=asked if before is None else asked & (num_steps > 0),
        common_steps=work.steps if before is None else None,
        total_share=jnp.maximum(jnp.sum(shares), 1).astype(accumulator),
        mean_size=data.mean_size.astype(accumulator),
        cohort_size=jnp.sum(asked, dtype=jnp.int32),
        padding_id=data.population,
    )
