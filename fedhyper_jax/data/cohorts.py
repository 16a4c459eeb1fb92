"""Which clients take part in a round."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from fedhyper_jax import _validate
from fedhyper_jax.data.federated import FederatedData


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cohort:
    """The clients of one round, with the data they train on.

    Attributes:
      data: the federated data set; only the cohort's examples are read.
      client_ids: (S,) int32, distinct; an id equal to the population marks a padded slot, which does nothing.
    """

    data: FederatedData
    client_ids: Int[Array, " cohort"]


def check_cohort_size(cohort_size: int, population: int) -> None:
    """Raises ValueError unless 1 ≤ cohort_size ≤ population."""
    _validate.positive_integer(cohort_size=cohort_size)
    if cohort_size > population:
        raise ValueError(
            f"cohort_size must be at most the population, got cohort_size={cohort_size} and population={population}; "
            f"use cohort_size ≤ {population} or more clients"
        )


def sample_cohort(key: Array, population: int, cohort_size: int) -> Int[Array, " cohort"]:
    """Draws distinct clients uniformly, in time and memory of the cohort, not of the population.

    The distinct values among independent uniform draws, in order of appearance, are a uniform sample without
    replacement; the rare set of draws with too few of them is thrown away whole.

    Args:
      key: the cohort key of the round.
      population: number of clients.
      cohort_size: S, at most the population.

    Returns:
      (S,) int32 client ids in random order.

    Raises:
      ValueError: cohort_size < 1 or > population.

    Example:
      >>> import jax
      >>> ids = sample_cohort(jax.random.key(0), population=1_000_000, cohort_size=4)
      >>> ids.shape, len(set(ids.tolist()))
      ((4,), 4)
    """
    check_cohort_size(cohort_size, population)
    return _sample_distinct(key, population, cohort_size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sample_distinct(key, population: int, cohort_size: int):
    if 2 * cohort_size > population:
        return jax.random.permutation(key, population)[:cohort_size].astype(jnp.int32)

    # 2S + 16 draws from at least 2S clients hold S distinct values but for a vanishing share of the time.
    draws = 2 * cohort_size + 16
    index = jnp.arange(draws, dtype=jnp.int32)

    def draw(carry):
        key, _, _ = carry
        key, subkey = jax.random.split(key)
        values = jax.random.randint(subkey, (draws,), 0, population, dtype=jnp.int32)
        by_value, appeared = lax.sort((values, index), num_keys=2)
        repeated = jnp.concatenate([jnp.zeros(1, bool), by_value[1:] == by_value[:-1]])
        _, _, distinct_first = lax.sort((repeated, appeared, by_value), num_keys=2)
        return key, distinct_first[:cohort_size], jnp.sum(~repeated, dtype=jnp.int32)

    start = (key, jnp.zeros(cohort_size, jnp.int32), jnp.zeros((), jnp.int32))
    return lax.while_loop(lambda carry: carry[2] < cohort_size, draw, start)[1]
