"""Clients made from a key: what is promised of their examples and sizes, and that a round treats them as any others."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import fedavg
from fedhyper_jax.data import (
    Recipe,
    client_batches,
    examples_of_strangers,
    local_epochs,
    local_steps,
    pack,
    procedural_clients,
    procedural_logistic,
)
from fedhyper_jax.models import logistic
from fedhyper_jax.tasks.losses import cross_entropy
from tests.helpers import play, product

SMALL = {"num_features": 4, "num_classes": 3, "median_examples": 6.0, "max_examples": 30}
CLIENTS = 12


@jax.jit
def of_everybody(data):
    """Sizes of all clients, and as many examples of each as any may have."""
    clients = jnp.arange(CLIENTS)
    return data.sizes_of(clients), jax.vmap(lambda m: data.client(m).fetch(jnp.arange(30)))(clients)


@pytest.fixture(scope="module")
def small():
    return procedural_logistic(CLIENTS, **SMALL)


@pytest.fixture(scope="module")
def made(small):
    """Of the small federation, on the host."""
    return jax.device_get(of_everybody(small))


def stored(made):
    """The same federation with its examples kept."""
    sizes, examples = made
    pool = {name: np.concatenate([array[m, :n] for m, n in enumerate(sizes)]) for name, array in examples.items()}
    return pack(pool, np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1]))


@pytest.mark.parametrize("work", [local_epochs(2, 4), product(local_steps(3, 4, with_replacement=True))], ids=str)
def test_a_run_equals_one_on_the_stored_examples(key, small, made, work):
    algorithm = fedavg(cross_entropy(logistic(3)), work=work, local_rate=0.1, strategy="sequential")
    ends, cohorts = [], ([3, 0, 7], [2, 3, 11])
    start = np.random.default_rng(3).normal(size=(4, 3)).astype(np.float32) / 2
    params = {"dense_0": {"kernel": start, "bias": np.zeros(3, np.float32)}}
    for federation in (small, stored(made)):
        ends.append(play(algorithm, key, federation, cohorts, params))
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)
    assert float(ends[0][1][0].examples) > 0


def test_sizes_are_log_normal_clipped_and_counted():
    data = procedural_logistic(70_000, num_features=2, max_examples=500, seed=3)
    sizes = np.asarray(jax.jit(data.sizes_of)(np.arange(70_001)))
    assert sizes[-1] == 0  # a padded slot
    sizes = sizes[:-1]
    assert sizes.min() >= 1 and sizes.max() <= 500
    assert np.median(sizes) == pytest.approx(20, abs=1)
    # the ceiling adds about a half; the 5 % and 95 % quantiles of e^z are e^{∓1.645}
    low, high = np.quantile(sizes, [0.05, 0.95])
    assert low == pytest.approx(20 * np.exp(-1.645) + 0.5, abs=1)
    assert high == pytest.approx(20 * np.exp(1.645), rel=0.05)
    assert float(data.mean_size) == pytest.approx(sizes.mean(), rel=1e-6)


@jax.jit
def of_client_seven(data):
    """Some of its examples, in another order and one twice."""
    return data.client(jnp.int32(7)).fetch(np.array([4, 2, 2]))


def test_an_example_depends_on_client_and_position_alone(made):
    examples = made[1]
    larger = jax.device_get(of_client_seven(procedural_logistic(5000, **SMALL)))  # nor on the population
    among = {name: array[7, [4, 2, 2]] for name, array in examples.items()}
    chex.assert_trees_all_close(larger, among)
    assert not np.allclose(examples["x"][9, 2], examples["x"][7, 2])
    assert not np.allclose(examples["x"][7, 4], examples["x"][7, 2])


def test_labels_come_from_the_clients_own_model():
    """Without heterogeneity all clients label alike; with much, a common linear model misses most of a client."""

    def agreement(heterogeneity):
        data = procedural_logistic(CLIENTS, **SMALL, heterogeneity=heterogeneity)
        batch = jax.device_get(of_everybody(data)[1])
        return np.mean(np.argmax(batch["x"] @ np.asarray(data.shared["weights"]), axis=-1) == batch["y"])

    assert agreement(0.0) == 1.0
    assert agreement(20.0) < 0.6


def test_strangers_are_nobody_of_the_federation(small, made):
    strangers, own = np.asarray(examples_of_strangers(small, 300)["x"]), made[1]["x"].reshape(-1, 4)
    distances = np.abs(strangers[:, None] - own[None]).max(axis=-1)
    assert distances.min() > 1e-4
    np.testing.assert_allclose(strangers.std(), own.std(), rtol=0.1)


def test_shuffles_are_epochs_whatever_the_length_that_is_shuffled(key):
    """Batches of a client of a federation whose largest client is far larger."""
    recipe = Recipe(
        size=lambda key, shared: jax.random.randint(key, (), 3, 12),
        client=lambda key, shared: (),
        example=lambda key, client, shared: {"x": np.zeros(1, np.float32)},
    )
    work, draw = local_epochs(3, 4), jax.jit(client_batches, static_argnames="work")
    batches = [
        jax.tree.map(np.asarray, draw(key, 0, procedural_clients(recipe, 9, max_examples=n), 5, work=work))
        for n in (12, 400)
    ]
    steps = int(batches[0].num_steps)
    size = int(batches[0].mask[:steps].sum()) // 3
    rows = batches[0].rows[:steps][batches[0].mask[:steps]]
    assert [sorted(epoch.tolist()) for epoch in np.split(rows, 3)] == [list(range(size))] * 3
    assert np.array_equal(batches[1].rows[:steps], batches[0].rows[:steps]) and not batches[1].mask[steps:].any()


def test_what_is_refused(small):
    with pytest.raises(ValueError, match="population must be below"):
        procedural_logistic(2**31 - 1)
    with pytest.raises(ValueError, match="median_examples must be"):
        procedural_logistic(10, median_examples=0.0)
    with pytest.raises(ValueError, match="size_spread must be"):
        procedural_logistic(10, size_spread=-1.0)
    for seed in (2**32 + 7, -1, 0.5):  # JAX would make the key of 7 of the first
        with pytest.raises(ValueError, match="seed must be"):
            procedural_logistic(10, seed=seed)
    with pytest.raises(ValueError, match=r"shared\['n'\] has 4294967303 in row 0, which int32 cannot hold"):
        procedural_clients(small.recipe, 2, max_examples=1, shared={"n": np.array([2**32 + 7])})
