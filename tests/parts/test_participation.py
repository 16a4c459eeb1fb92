"""Who is asked: weighted sampling against the exact probabilities of successive draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax.parts import participation


def inclusion_probabilities(weights, size):
    """By adding up the probabilities of all ordered draws without replacement."""
    total = np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), size):
        probability, left = 1.0, sum(weights)
        for m in order:
            probability *= weights[m] / left if left > 0 else 0.0
            left -= weights[m]
        total[list(order)] += probability
    return total


@pytest.mark.parametrize(
    ("weights", "size"), [([1.0, 2.0, 3.0, 10.0], 1), ([1.0, 2.0, 3.0, 10.0], 2), ([5, 0, 1, 1], 3)]
)
def test_clients_are_drawn_as_often_as_their_availability_says(weights, size):
    chosen = participation.weighted(weights)
    settings, draws = chosen.init(len(weights)), 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    ids = np.asarray(jax.jit(jax.vmap(lambda key: chosen.sample(key, settings, len(weights), size)))(keys))
    assert ids.dtype == np.int32 and all(len(set(cohort)) == size for cohort in ids.tolist())
    share = np.bincount(ids.ravel(), minlength=len(weights)) / draws
    expected = inclusion_probabilities(weights, size)
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(share - expected) <= 5 * deviation + 1e-12), (share, expected)


def test_availabilities_of_any_scale():
    """Only their ratios count, as far as float64 reaches."""
    for scale in (1e-300, 1.0, 1e300):
        chosen = participation.weighted(np.array([1.0, 2.0]) * scale)
        np.testing.assert_allclose(chosen.init(2), np.log([0.5, 1.0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("availability", "message"),
    [
        ([[1.0]], "1-D array"),
        ([], "1-D array"),
        (["a"], "1-D array"),
        ([1.0, -1.0], "got -1.0 for client 1"),
        ([1.0, np.nan], "for client 1"),
        ([0.0, 0.0], "> 0 for some client"),
    ],
)
def test_availabilities_that_are_refused(availability, message):
    with pytest.raises(ValueError, match=message):
        participation.weighted(availability)


def test_data_and_cohorts_that_are_refused():
    chosen = participation.weighted([1.0, 0.0, 2.0])
    with pytest.raises(ValueError, match="availability has 3 clients, but the data set has 4"):
        chosen.check(4, 2)
    with pytest.raises(ValueError, match="cohort_size must be at most 2"):
        chosen.check(3, 3)
    chosen.check(3, 2)


def test_uniform_is_the_sampler_of_the_data():
    from fedhyper_jax.data import sample_cohort

    key = jax.random.key(3)
    drawn = participation.uniform().sample(key, (), 50, 7)
    np.testing.assert_array_equal(drawn, sample_cohort(key, 50, 7))
    assert jnp.asarray(drawn).dtype == jnp.int32
