"""Which clients take part in a round."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from fedhyper_jax import _repr, _validate
from fedhyper_jax.data.federated import ClientData


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Cohort:
    """The clients of one round, with the data they train on.

    Attributes:
      data: the federated data set; only the cohort's examples are read.
      client_ids: (S,) int32, distinct; an id equal to the population marks a padded slot, which does nothing.
    """

    data: ClientData
    client_ids: Int[Array, " cohort"]

    def __repr__(self) -> str:
        ids = _repr.known(self.client_ids)
        told = "" if ids is None else f" {_repr.few(ids.tolist(), 5)}"
        return f"<Cohort of {_repr.length(self.client_ids)} clients{told} of {self.data!r}>"


def make_cohort(data: ClientData, client_ids: ArrayLike) -> Cohort:
    """A cohort of chosen clients, checked.

    Args:
      data: the federated data set.
      client_ids: distinct client ids in [0, population); the population itself marks a padded slot.

    Raises:
      ValueError: ids that are not a list of integers, out of range or named twice.

    Example:
      >>> import numpy as np
      >>> from fedhyper_jax.data.federated import pack
      >>> data = pack({"x": np.arange(3.0)}, [np.array([0]), np.array([1, 2])])
      >>> make_cohort(data, [1, 0]).client_ids.tolist()
      [1, 0]
    """
    # (in NumPy, whose 64 bits hold an id that int32 would make another)
    ids = client_ids if isinstance(client_ids, jax.Array) else np.asarray(client_ids)
    check_client_ids(ids, data.population)
    return Cohort(data=data, client_ids=jnp.asarray(ids, jnp.int32))


def check_client_ids(client_ids: Int[Array, " cohort"], population: int) -> None:
    """Raises ValueError for ids of a wrong shape or type and, where they are known, out of range or named twice."""
    shape, dtype = np.shape(client_ids), getattr(client_ids, "dtype", None)
    if dtype is None or len(shape) != 1 or shape[0] == 0 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"client_ids must be a 1-D array of integers, one a client, got {client_ids!r}; "
            "make_cohort(data, ids) makes a cohort of a list"
        )
    if _validate.is_traced(client_ids):
        return
    ids = np.asarray(client_ids).astype(np.int64)
    if ids.min() < 0 or ids.max() > population:
        raise ValueError(
            f"client_ids must lie in [0, {population}) ({population} marks a padded slot), got {ids.tolist()}"
        )
    real = ids[ids < population]
    if len(np.unique(real)) < len(real):
        raise ValueError(f"client_ids names a client twice, got {ids.tolist()}; each takes part once a round")


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


def _integers(key: Array, number: int, stop: int) -> Int[Array, " number"]:
    """The numbers of `jax.random.randint` in [0, stop), both words of each hashed in one pass."""
    upper, lower = jax.vmap(lambda key: jax.random.bits(key, (number,), jnp.uint32))(jax.random.split(key))
    # (so it is there: 0, not 2³² mod stop, from 2¹⁶ + 1 on)
    factor = (2**16 % stop) ** 2 % 2**32 % stop
    return ((upper % np.uint32(stop) * np.uint32(factor) + lower % np.uint32(stop)) % np.uint32(stop)).astype(jnp.int32)


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
        values = _integers(subkey, draws, population)
        by_value, appeared = lax.sort((values, index), num_keys=2)
        repeated = jnp.concatenate([jnp.zeros(1, bool), by_value[1:] == by_value[:-1]])
        _, _, distinct_first = lax.sort((repeated, appeared, by_value), num_keys=2)
        return key, distinct_first[:cohort_size], jnp.sum(~repeated, dtype=jnp.int32)

    start = (key, jnp.zeros(cohort_size, jnp.int32), jnp.zeros((), jnp.int32))
    return lax.while_loop(lambda carry: carry[2] < cohort_size, draw, start)[1]
