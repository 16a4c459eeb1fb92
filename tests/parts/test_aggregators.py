"""Aggregators against NumPy, on updates of which some are left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax.parts import Gathered, aggregators


def gathered(updates, alive, weights=None):
    """A cohort as a server has it, for an aggregator that stacks."""
    alive = np.asarray(alive)
    weights = alive / max(alive.sum(), 1) if weights is None else weights
    zeroed = {name: np.where(alive.reshape(-1, *[1] * (u.ndim - 1)), u, 0) for name, u in updates.items()}
    return Gathered(
        alive=jnp.asarray(alive),
        weights=jnp.asarray(weights, jnp.float32),
        mean={name: jnp.asarray(np.tensordot(weights, u, 1)) for name, u in zeroed.items()},
        updates={name: jnp.asarray(u) for name, u in zeroed.items()},
        term_means=(),
        term_totals=(),
        reported=((), ()),
        client_loss=jnp.float32(0.0),
    )


@jax.jit
def median_of(gathered):
    """By our aggregator."""
    return aggregators.median().combine(None, (), gathered)[0]


def some_updates(cohort, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"weights": (3, 2), "bias": (2,), "scale": ()}
    return {name: rng.normal(size=(cohort, *shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("cohort", [1, 2, 5, 6])
def test_the_median_is_numpys(cohort):
    updates = some_updates(cohort)
    median = median_of(gathered(updates, np.ones(cohort, bool)))
    for name, leaf in updates.items():
        np.testing.assert_array_equal(median[name], np.median(leaf, axis=0).astype(np.float32))


@pytest.mark.parametrize("alive", [[1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 0, 1, 1]])
def test_the_median_is_of_the_participants(alive):
    """Weights do not count, and whoever was left out does not either."""
    updates, alive = some_updates(5), np.array(alive, bool)
    weights = np.array([0.9, 0.02, 0.03, 0.03, 0.02]) * alive
    median = median_of(gathered(updates, alive, weights))
    for name, leaf in updates.items():
        np.testing.assert_array_equal(median[name], np.median(leaf[alive], axis=0).astype(np.float32))


def test_the_median_of_nobody_is_zero():
    median = median_of(gathered(some_updates(3), np.zeros(3, bool)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(median))


def test_clipping_scales_down_to_the_norm_and_never_up():
    aggregator = aggregators.clipped(aggregators.mean(), 2.0)
    update = {"a": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}  # of norm 5
    state = aggregator.init(update)
    prepared = aggregator.prepare(state, update)
    np.testing.assert_allclose(prepared["a"], [1.2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(prepared["b"], 1.6, rtol=1e-6)
    small = jax.tree.map(lambda leaf: leaf / 10, update)
    jax.tree.map(np.testing.assert_array_equal, aggregator.prepare(state, small), small)
    nothing = jax.tree.map(jnp.zeros_like, update)
    jax.tree.map(np.testing.assert_array_equal, aggregator.prepare(state, nothing), nothing)


def test_clipping_nests():
    """The inner one's own preparation comes after the outer one's; its state and flags are kept."""
    inner = aggregators.clipped(aggregators.median(), 1.0)
    outer = aggregators.clipped(inner, 10.0)
    assert outer.name == "clipped(clipped(median))" and outer.stacks and "median" in outer.not_a_mean
    update = jnp.array([30.0, 40.0])
    np.testing.assert_allclose(outer.prepare(outer.init(update), update), [0.6, 0.8], rtol=1e-6)
    median, state = outer.combine(None, outer.init(update), gathered({"w": np.eye(3, dtype=np.float32)}, [1, 1, 1]))
    np.testing.assert_array_equal(median["w"], [0, 0, 0])
    assert jax.tree.structure(state) == jax.tree.structure(outer.init(update))


@pytest.mark.parametrize("norm", [0.0, -1.0, np.inf, np.nan])
def test_norms_that_are_refused(norm):
    with pytest.raises(ValueError, match="clip_norm must be finite and > 0"):
        aggregators.clipped(aggregators.mean(), norm)
