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


def stored(data):
    """The same federation with its examples kept: made one by one, on the host."""
    sizes = np.asarray(data.sizes_of(jnp.arange(data.population)))
    fetch = jax.jit(lambda m, i: data.client(m).fetch(i[None]))
    examples = [fetch(jnp.int32(m), jnp.int32(i)) for m, size in enumerate(sizes) for i in range(size)]
    pool = {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}
    return pack(pool, np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1]))


@pytest.mark.parametrize("work", [local_epochs(2, 4), product(local_steps(3, 4, with_replacement=True))], ids=str)
def test_a_run_equals_one_on_the_stored_examples(key, work):
    data, model = procedural_logistic(12, **SMALL), logistic(3)
    algorithm = fedavg(cross_entropy(model), work=work, local_rate=0.1, strategy="sequential")
    ends, cohorts = [], ([3, 0, 7], [2, 3, 11])
    params = model.init(jax.random.key(3), jnp.zeros((1, 4)))
    for federation in (data, stored(data)):
        ends.append(play(algorithm, key, federation, cohorts, params))
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)
    assert float(ends[0][1][0].examples) > 0


def test_sizes_are_log_normal_clipped_and_counted():
    data = procedural_logistic(70_000, num_features=2, max_examples=500, seed=3)
    sizes = np.asarray(data.sizes_of(jnp.arange(data.population)))
    assert sizes.min() >= 1 and sizes.max() <= 500
    assert np.median(sizes) == pytest.approx(20, abs=1)
    # the ceiling adds about a half; the 5 % and 95 % quantiles of e^z are e^{∓1.645}
    low, high = np.quantile(sizes, [0.05, 0.95])
    assert low == pytest.approx(20 * np.exp(-1.645) + 0.5, abs=1)
    assert high == pytest.approx(20 * np.exp(1.645), rel=0.05)
    assert float(data.mean_size) == pytest.approx(sizes.mean(), rel=1e-6)
    assert int(data.sizes_of(jnp.int32(70_000))) == 0  # a padded slot


@jax.jit
def third_example(data):
    """Of client 7."""
    return data.client(jnp.int32(7)).fetch(jnp.array([2]))


def test_an_example_depends_on_client_and_position_alone():
    data = procedural_logistic(50, **SMALL)
    alone = third_example(data)
    among = jax.jit(jax.vmap(lambda m: data.client(m).fetch(jnp.array([4, 2, 2]))))(jnp.array([9, 7]))
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[1, 1], among), jax.tree.map(lambda leaf: leaf[0], alone))
    larger = third_example(procedural_logistic(5000, **SMALL))
    chex.assert_trees_all_close(larger, alone)  # nor on the population
    assert not np.allclose(among["x"][0, 1], among["x"][1, 1])


def test_labels_come_from_the_clients_own_model():
    """Without heterogeneity all clients label alike; with much, a common linear model misses most of a client."""

    def agreement(heterogeneity):
        data = procedural_logistic(40, **SMALL, heterogeneity=heterogeneity)
        batch = jax.jit(jax.vmap(lambda m: data.client(m).fetch(jnp.arange(20))))(jnp.arange(40))
        return float(jnp.mean(jnp.argmax(batch["x"] @ data.shared["weights"], axis=-1) == batch["y"]))

    assert agreement(0.0) == 1.0
    assert agreement(20.0) < 0.6


def test_strangers_are_nobody_of_the_federation():
    data = procedural_logistic(300, **SMALL)
    strangers = np.asarray(examples_of_strangers(data, 300)["x"])
    own = np.asarray(jax.jit(jax.vmap(lambda m: data.client(m).fetch(jnp.array([0]))["x"][0]))(jnp.arange(300)))
    distances = np.abs(strangers[:, None] - own[None]).max(axis=-1)
    assert distances.min() > 1e-4
    np.testing.assert_allclose(strangers.std(), own.std(), rtol=0.1)


def test_shuffles_are_epochs_whatever_the_length_that_is_shuffled(key):
    """Batches of a client of a federation whose largest client is far larger."""
    recipe = Recipe(
        size=lambda key, shared: jax.random.randint(key, (), 3, 12),
        client=lambda key, shared: (),
        example=lambda key, client, shared: {"x": jnp.zeros(1)},
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


def test_what_is_refused():
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
        procedural_clients(procedural_logistic(2).recipe, 2, max_examples=1, shared={"n": np.array([2**32 + 7])})
