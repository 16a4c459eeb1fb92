"""Pooling against lax.reduce_window and finite differences; ties; leftovers; loops and vmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedhyper_jax.models import avg_pool, max_pool

WINDOWS = [(1, 1), (2, 2), (2, 3), (3, 1), (5, 7)]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def reference_max(x, window):
    dims = (1, *window, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, dims, dims, "VALID")


def reference_avg(x, window):
    dims = (1, *window, 1)
    return lax.reduce_window(x, 0.0, lax.add, dims, dims, "VALID") / (window[0] * window[1])


def images(*shape):
    """Entries all different, and far from each other against the steps of finite differences."""
    values = np.random.default_rng(0).permutation(int(np.prod(shape)))
    return jnp.asarray(values.reshape(shape), jnp.float64)


def loss(pool, x, window):
    y = pool(x, window)
    return jnp.sum(jnp.sin(y) * jnp.arange(1, y.size + 1).reshape(y.shape))


@pytest.mark.parametrize(("ours", "theirs"), [(max_pool, reference_max), (avg_pool, reference_avg)])
@pytest.mark.parametrize("window", WINDOWS)
def test_value_and_gradient_are_those_of_reduce_window(ours, theirs, window):
    x = images(2, 5, 7, 3)
    np.testing.assert_allclose(ours(x, window), theirs(x, window), rtol=1e-12)
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss, 1), static_argnums=(0, 2))(ours, x, window),
        jax.grad(loss, 1)(theirs, x, window),
        rtol=1e-12,
    )


@pytest.mark.parametrize("pool", [max_pool, avg_pool])
def test_gradient_against_finite_differences(pool):
    x, window, step = images(1, 3, 5, 2), (2, 2), 1e-5
    gradient = jax.grad(loss, 1)(pool, x, window)
    for i in np.ndindex(x.shape):
        difference = loss(pool, x.at[i].add(step), window) - loss(pool, x.at[i].add(-step), window)
        np.testing.assert_allclose(gradient[i], difference / (2 * step), rtol=1e-5, atol=1e-7)


def test_ties_get_a_subgradient():
    """Split between the winners; max(x + h) ≥ max(x) + ⟨g, h⟩ for any h, which giving each winner all would break."""
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, size=(4, 6, 6, 2)), jnp.float64)

    def total(x):
        return max_pool(x).sum()

    gradient = jax.grad(total)(x)
    windows = gradient.reshape(4, 3, 2, 3, 2, 2)
    np.testing.assert_allclose(windows.sum((2, 4)), 1)
    assert (gradient[x < x.max((1, 2), keepdims=True)] >= 0).all()
    for seed in range(20):
        h = np.random.default_rng(seed).normal(size=x.shape)
        assert total(x + h) >= total(x) + jnp.vdot(gradient, h) - 1e-9

    def by_reshaping(x):
        return x.reshape(4, 3, 2, 3, 2, 2).max((2, 4)).sum()

    np.testing.assert_allclose(gradient, jax.grad(by_reshaping)(x))


def test_left_over_rows_and_columns_are_cut_off():
    x = images(1, 5, 7, 1)
    assert max_pool(x, (2, 3)).shape == (1, 2, 2, 1)
    gradient = jax.grad(loss, 1)(max_pool, x, (2, 3))
    assert not gradient[:, 4:].any() and not gradient[:, :, 6:].any()


def test_nan_stays_visible():
    y = max_pool(jnp.zeros((1, 2, 4, 1)).at[0, 1, 1, 0].set(jnp.nan))
    assert bool(jnp.isnan(y[0, 0, 0, 0])) and float(y[0, 0, 1, 0]) == 0


def test_under_vmap_and_scan():
    x = images(3, 4, 2, 5, 4, 2)

    def step(total, x):
        return total + jax.grad(loss, 1)(max_pool, x, (2, 2)), None

    zeros = jnp.zeros((2, 5, 4, 2))
    looped = jax.jit(jax.vmap(lambda batches: lax.scan(step, zeros, batches)[0]))(x)
    direct = sum(jax.vmap(lambda b: jax.grad(loss, 1)(reference_max, b, (2, 2)))(x[:, i]) for i in range(4))
    np.testing.assert_allclose(looped, direct, rtol=1e-12)


@pytest.mark.parametrize("pool", [max_pool, avg_pool])
@pytest.mark.parametrize(
    ("shape", "window", "message"),
    [((4, 4, 1), (2, 2), "x must be"), ((1, 4, 4, 1), 2, "window"), ((1, 1, 4, 1), (2, 2), "hold no window")],
)
def test_errors_name_the_argument(pool, shape, window, message):
    with pytest.raises(ValueError, match=message):
        pool(jnp.zeros(shape), window)
