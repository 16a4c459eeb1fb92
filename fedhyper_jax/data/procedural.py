"""Clients that are made when they are needed, from a key and their number: populations that do not fit in memory."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fedhyper_jax import _repr, _validate
from fedhyper_jax._threefry import unrolled
from fedhyper_jax.base import Batch, PyTree
from fedhyper_jax.data.dataset import Dataset
from fedhyper_jax.data.federated import ClientView
from fedhyper_jax.data.partition import check_seed

_BLOCK = 65_536
"""Clients at a time where all of them must be looked at."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How clients and their examples are made; pure functions, static under ``jit``.

    Attributes:
      size: ``size(key, shared) -> n_m``, an integer that is clipped to [1, max_examples].
      client: ``client(key, shared) -> what the client's examples have in common``.
      example: ``example(key, client, shared) -> dict of arrays``, one example.
    """

    size: Callable[[Array, PyTree], Int[Array, ""]]
    client: Callable[[Array, PyTree], PyTree]
    example: Callable[[Array, PyTree, PyTree], Batch]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ProceduralData:
    """A federated data set of which nothing is stored but a key: memory does not grow with the population.

    Everything of client m comes from ``fold_in(key, m)``, and everything of its i-th example from that and i. So the
    same example is the same whenever, wherever and in whatever batch it is made.

    Attributes:
      key: of the data set; not the key of a run.
      shared: arrays that all clients know.
      mean_size: () mean number of examples over all clients.
      population: number of clients; static.
      max_examples: most examples of a client; static, since it bounds the shapes of batches.
      recipe: static.
    """

    key: Array
    shared: PyTree
    mean_size: Float[Array, ""]
    population: int = dataclasses.field(metadata={"static": True})
    max_examples: int = dataclasses.field(metadata={"static": True})
    recipe: Recipe = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return (
            f"<ProceduralData: {self.population:,} clients made on demand by {_repr.name_of(self.recipe.example)}, "
            f"{_repr.number(self.mean_size)} examples a client on average, at most {self.max_examples:,}>"
        )

    def sizes_of(self, client_ids: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """Number of examples of some clients; 0 for the population, which marks a padded slot."""
        client_ids = jnp.asarray(client_ids)
        sizes = jax.vmap(lambda m: self._size(self._keys(m)[0]))(client_ids.reshape(-1)).reshape(client_ids.shape)
        return jnp.where(client_ids < self.population, sizes, 0)

    def client(self, client_id: Int[Array, ""]) -> ClientView:
        """One client's examples; they are called by their positions."""
        _, client_key, examples_key = self._keys(client_id)
        client = self.recipe.client(client_key, self.shared)

        def one(position):
            return self.recipe.example(jax.random.fold_in(examples_key, position), client, self.shared)

        return ClientView(size=self.sizes_of(client_id), rows_of=lambda positions: positions, fetch=jax.vmap(one))

    def _keys(self, client_id):
        return jax.random.split(jax.random.fold_in(unrolled(self.key), client_id), 3)

    def _size(self, key):
        return jnp.clip(self.recipe.size(key, self.shared), 1, self.max_examples).astype(jnp.int32)


def procedural_clients(
    recipe: Recipe, population: int, *, max_examples: int, shared: PyTree = (), seed: int = 0
) -> ProceduralData:
    """A federation of clients that are made when they are needed.

    Args:
      recipe: how clients and examples are made.
      population: number of clients, at most 2^31 − 2.
      max_examples: most examples of a client; larger sizes are clipped, so choose it beyond what is to happen.
      shared: arrays handed to the recipe's functions.
      seed: of the data, in [0, 2^32).

    Returns:
      The data set. Its mean size is that of its very clients, counted block by block.

    Raises:
      ValueError: numbers that are no integers ≥ 1, a population that 32-bit client ids cannot name, a seed out of
        range, shared numbers that the conversion to JAX's dtype would change.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> recipe = Recipe(
      ...     size=lambda key, shared: jax.random.randint(key, (), 1, 4),
      ...     client=lambda key, shared: jax.random.normal(key),
      ...     example=lambda key, centre, shared: {"x": centre + 0.1 * jax.random.normal(key, (2,))},
      ... )
      >>> data = procedural_clients(recipe, 100_000, max_examples=3)
      >>> examples_of = jax.jit(lambda client_id: data.client(client_id).fetch(jnp.arange(2)))
      >>> examples_of(7)["x"].shape, round(float(data.mean_size), 1)
      ((2, 2), 2.0)
    """
    _validate.positive_integer(population=population, max_examples=max_examples)
    if population >= 2**31 - 1:
        raise ValueError(f"population must be below 2**31 - 1, which 32-bit client ids can name, got {population}")
    _check_seed(seed)
    for path, leaf in jax.tree_util.tree_leaves_with_path(shared):
        _validate.fits(leaf, name=f"shared{jax.tree_util.keystr(path)}")
    data = ProceduralData(
        key=jax.random.key(seed),
        shared=shared,
        mean_size=jnp.zeros(()),
        population=int(population),
        max_examples=int(max_examples),
        recipe=recipe,
    )
    return dataclasses.replace(data, mean_size=jnp.asarray(_count(data) / population, jnp.float32))


def _check_seed(seed: int) -> None:
    """Raises ValueError for seeds that are no integers, or of which JAX's keys would keep a part."""
    check_seed(seed)
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {seed!r}; give a whole number such as 0")


def _count(data: ProceduralData) -> int:
    """Number of examples of all clients together."""
    block = min(_BLOCK, data.population)
    return sum(int(_count_block(data, jnp.int32(first), block=block)) for first in range(0, data.population, block))


@functools.partial(jax.jit, static_argnames="block")
def _count_block(data: ProceduralData, first, *, block: int) -> Int[Array, ""]:
    """Of so many clients from a first one on; padded with the population, which has no examples."""
    return jnp.sum(data.sizes_of(jnp.minimum(first + jnp.arange(block), data.population)))


def examples_of_strangers(data: ProceduralData, number: int) -> Batch:
    """One example each of clients that are not in the federation, but made just as they are: a test set.

    Args:
      data: the data set.
      number: of examples.

    Returns:
      Arrays with a leading axis of ``number`` examples.

    Example:
      >>> examples_of_strangers(procedural_logistic(1000), 3)["x"].shape
      (3, 64)
    """
    _validate.positive_integer(number=number)
    # Beyond all ids that a federation can have.
    strangers = dataclasses.replace(data, key=jax.random.fold_in(data.key, np.uint32(2**31)))
    return _first_examples(strangers, jnp.arange(number, dtype=jnp.int32))


@jax.jit
def _first_examples(data: ProceduralData, client_ids: Int[Array, " number"]) -> Batch:
    """The first example of each client."""

    def first(client_id):
        return jax.tree.map(lambda leaf: leaf[0], data.client(client_id).fetch(jnp.zeros(1, jnp.int32)))

    return jax.vmap(first)(client_ids)


def procedural_logistic(
    population: int = 1_000_000,
    *,
    num_features: int = 64,
    num_classes: int = 10,
    median_examples: float = 20.0,
    size_spread: float = 1.0,
    max_examples: int = 1000,
    heterogeneity: float = 0.5,
    seed: int = 0,
) -> ProceduralData:
    """Clients who label their own inputs by a linear model of their own near a common one.

    n_m = ⌈median · e^{σz_m}⌉ clipped to [1, max_examples]; x ~ N(h·v_m, I); y = argmax_c (W + h·V_m)ᵀx; entries of
    W, V_m and v_m ~ N(0, 1).

    Args:
      population: number of clients.
      num_features: of x.
      num_classes: of y.
      median_examples: median of the log-normal number of examples.
      size_spread: σ ≥ 0 of its logarithm; 0 makes all clients alike.
      max_examples: most examples of a client.
      heterogeneity: h ≥ 0; 0 makes clients identical.
      seed: of the data.

    Returns:
      The data set, examples ``"x"`` (num_features,) float32 and ``"y"`` () int32.

    Raises:
      ValueError: numbers out of range.

    Example:
      >>> import jax, numpy as np
      >>> data = procedural_logistic(1000)
      >>> sizes = jax.jit(data.sizes_of)(np.arange(1000))
      >>> 20 < float(data.mean_size) < 50, int(np.median(sizes)) in range(17, 24)
      (True, True)
    """
    _validate.positive_integer(num_features=num_features, num_classes=num_classes)
    _validate.positive(median_examples=median_examples)
    _validate.non_negative(size_spread=size_spread, heterogeneity=heterogeneity)
    _check_seed(seed)
    weights = jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), (num_features, num_classes))
    shared: dict[str, Any] = {
        "weights": weights,
        "median": jnp.float32(median_examples),
        "spread": jnp.float32(size_spread),
        "heterogeneity": jnp.float32(heterogeneity),
    }
    return procedural_clients(_LOGISTIC, population, max_examples=max_examples, shared=shared, seed=seed)


def load_procedural_logistic(num_clients: int = 1_000_000, *, test_examples: int = 2000, seed: int = 0) -> Dataset:
    """The clients of `procedural_logistic` with a test set of strangers, see `examples_of_strangers`.

    Args:
      num_clients: population.
      test_examples: number of strangers with an example each.
      seed: of the data.

    Returns:
      A `Dataset` whose ``clients`` are made on demand.

    Example:
      >>> dataset = load_procedural_logistic(1000, test_examples=3)
      >>> dataset.clients.population, dataset.test["x"].shape
      (1000, (3, 64))
    """
    clients = procedural_logistic(num_clients, seed=seed)
    test = {name: np.asarray(array) for name, array in examples_of_strangers(clients, test_examples).items()}
    return Dataset(
        name="procedural_logistic",
        train={name: array[:1] for name, array in test.items()},
        test=test,
        num_classes=clients.shared["weights"].shape[1],
        input_shape=test["x"].shape[1:],
        source=f"clients made on demand, seed {seed}; tested on clients outside of the federation",
        clients=clients,
    )


def _logistic_size(key, shared):
    largest = jnp.float32(2**30)  # floats beyond integers would wrap around
    size = jnp.ceil(shared["median"] * jnp.exp(shared["spread"] * jax.random.normal(key)))
    return jnp.minimum(size, largest).astype(jnp.int32)


def _logistic_client(key, shared):
    centre_key, weights_key = jax.random.split(key)
    weights, h = shared["weights"], shared["heterogeneity"]
    return {
        "centre": h * jax.random.normal(centre_key, weights.shape[:1]),
        "weights": weights + h * jax.random.normal(weights_key, weights.shape),
    }


def _logistic_example(key, client, shared):
    del shared
    x = client["centre"] + jax.random.normal(key, client["centre"].shape)
    return {"x": x, "y": jnp.argmax(x @ client["weights"]).astype(jnp.int32)}


_LOGISTIC = Recipe(size=_logistic_size, client=_logistic_client, example=_logistic_example)
