"""Normalisations of the server's rule, from hand-made feedback."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import rates
from fedhyper_jax.parts import Feedback, Spread

UPDATES = np.array([[1.0, 0.5, -0.2], [0.8, -0.3, 0.4], [0.2, 0.6, 0.1], [0.9, 0.1, 0.3]])
WEIGHTS = np.array([0.4, 0.1, 0.3, 0.2])


def feedback(weights, updates, previous, *, reference=None, scale=None):
    """As the engine makes it; Δ^t is ``scale`` times the mean."""
    pseudo_gradient = (scale or 1.0) * weights @ updates
    reference = previous if reference is None else reference
    return Feedback(
        round=jnp.int32(1),
        inner_product=jnp.asarray(pseudo_gradient @ reference),
        pseudo_gradient=jnp.asarray(pseudo_gradient),
        scale=None if scale is None else jnp.asarray(scale),
        previous=jnp.asarray(previous),
        reference=jnp.asarray(reference),
        spread=Spread(
            squared_norm=jnp.asarray(np.sum(weights**2 * np.sum(updates**2, axis=1))),
            squared_weight=jnp.asarray(np.sum(weights**2)),
        ),
    )


def mean_product_of_two(weights, updates):
    pairs = list(itertools.permutations(range(len(weights)), 2))
    total = sum(weights[i] * weights[j] * updates[i] @ updates[j] for i, j in pairs)
    return total / sum(weights[i] * weights[j] for i, j in pairs)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_debiased_product_counts_pairs_of_different_clients(scale, float64):
    """The first round has nothing to divide by; the second product is over the first round's mean of pairs."""
    rule = rates.hypergradient(1.0, 0.5, normalise="debiased", update="exponential", max_change=9.0)
    first = feedback(WEIGHTS, UPDATES, np.zeros(3), scale=scale)
    state, report = rule.update(rule.init(jnp.zeros(3)), first)
    assert (float(state.rate), int(report.updates), int(report.non_finite)) == (1.0, 1, 0)
    pairs = (scale or 1.0) ** 2 * mean_product_of_two(WEIGHTS, UPDATES)
    assert float(state.squared_norm) == pytest.approx(pairs, rel=1e-12)
    second = feedback(WEIGHTS[::-1], UPDATES, np.asarray(first.pseudo_gradient), scale=scale)
    state, _ = rule.update(state, second)
    product = float(second.pseudo_gradient @ first.pseudo_gradient)
    assert float(state.rate) == pytest.approx(np.exp(0.5 * product / pairs), rel=1e-12)


def test_where_noise_outweighs_the_mean_a_tenth_of_its_square_counts(float64):
    """Two updates that disagree: their product, −1, is no length."""
    rule = rates.hypergradient(1.0, normalise="debiased")
    updates = np.array([[1.0, 1.0], [1.0, -2.0]])  # mean (1, −½), of squared norm 1.25
    state, _ = rule.update(rule.init(jnp.zeros(2)), feedback(np.array([0.5, 0.5]), updates, np.zeros(2)))
    assert float(state.squared_norm) == pytest.approx(0.125)


def test_a_single_participant_says_nothing_of_the_mean(float64):
    """The next product moves nothing, and the one after it as ever."""
    rule = rates.hypergradient(1.0, 0.1, normalise="debiased")
    state = rule.init(jnp.zeros(3))
    state, _ = rule.update(state, feedback(np.ones(1), UPDATES[:1], np.zeros(3)))
    assert float(state.squared_norm) == 0
    before = feedback(WEIGHTS, UPDATES, UPDATES[0])
    state, report = rule.update(state, before)
    assert (float(state.rate), int(report.non_finite)) == (1.0, 0)
    state, _ = rule.update(state, feedback(WEIGHTS, UPDATES, np.asarray(before.pseudo_gradient)))
    assert float(state.rate) > 1.0


@pytest.mark.parametrize("normalise", ["cosine", "squared_norm"])
def test_another_reference_counts_with_the_length_of_the_last_pseudo_gradient(normalise, float64):
    """With inner_product='applied': whatever the scale of the server's optimizer."""
    previous, direction = np.array([0.3, 0.4, 0.0]), np.array([1.0, 1.0, -1.0])
    rule = rates.hypergradient(1.0, 0.1, normalise=normalise)
    now = WEIGHTS @ UPDATES
    h = now @ direction / np.linalg.norm(direction) / (np.linalg.norm(now) if normalise == "cosine" else 0.5)
    for scale in (1.0, 1e-3, 50.0):
        state, _ = rule.update(
            rule.init(jnp.zeros(3)), feedback(WEIGHTS, UPDATES, previous, reference=scale * direction)
        )
        assert float(state.rate) == pytest.approx(1 + 0.1 * h, rel=1e-12)


def test_a_round_taken_back_halves_the_rate_and_keeps_what_it_is_divided_by(float64):
    rule = rates.hypergradient(1.0, 0.1, (0.3, 3.0), normalise="debiased", update="exponential")
    state, _ = rule.update(rule.init(jnp.zeros(3)), feedback(WEIGHTS, UPDATES, np.zeros(3)))
    moved, _ = rule.update(state, feedback(WEIGHTS, 2 * UPDATES, WEIGHTS @ UPDATES))
    refused = rule.refused(state, moved)
    assert float(refused.rate) == 0.5
    assert float(refused.squared_norm) == float(state.squared_norm) != float(moved.squared_norm)
