"""Pooling against flax (lax.reduce_window) and finite differences; ties; leftovers; loops and vmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax

from fedhyper_jax.models import avg_pool, max_pool
from tests.helpers import product

WINDOWS = [(1, 1), (2, 2), (2, 3), (3, 1), (5, 7)]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def halved(x):
    return max_pool(x, (2, 2), strides=(2, 2))


def images(*shape):
    """Entries all different, and far from each other against the steps of finite differences."""
    values = np.random.default_rng(0).permutation(int(np.prod(shape)))
    return values.reshape(shape).astype(np.float64)


def loss(pool, x, window, strides, *settings):
    y = pool(x, window, strides, *settings)
    return jnp.sum(jnp.sin(y) * np.arange(1.0, y.size + 1).reshape(y.shape))


CASES = [(window, window, "VALID") for window in WINDOWS]
CASES[1:] = [product(*case) for case in CASES[1:]]
CASES += [
    ((3, 3), (2, 2), "SAME"),
    ((3, 2), None, "SAME"),
    ((2, 3), (3, 1), "VALID"),
    ((1, 1), (2, 3), "SAME"),  # pixels between the windows
    ((2, 4), (1, 3), ((1, 0), (2, 3))),
]


@pytest.mark.parametrize(("window", "strides", "padding"), CASES)
def test_value_and_gradient_are_those_of_flax(window, strides, padding):
    x = images(2, 5, 7, 3)
    settings = window, strides, padding
    pools = [(max_pool, linen.max_pool), (avg_pool, linen.avg_pool)]
    pools += [tuple(functools.partial(pool, count_include_pad=False) for pool in pools[1])]

    @jax.jit
    def values_and_gradients(x):
        def of(pool):
            return pool(x, *settings), jax.grad(functools.partial(loss, pool))(x, *settings)

        return [[of(pool) for pool in pair] for pair in pools]

    for ours, theirs in values_and_gradients(x):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), ours, theirs)


@pytest.mark.parametrize(("ours", "theirs"), [(max_pool, linen.max_pool), (avg_pool, linen.avg_pool)])
def test_other_ranks_and_integers(ours, theirs):
    x = images(2, 3, 5, 7, 2)

    @jax.jit
    def both(x):
        def of(pool):
            return pool(x, (2, 2)), pool(x[0, 0], (2, 2)), pool(x, (2, 2, 3)), pool(x[0], (2,), (2,))

        return of(ours), of(theirs)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), *both(x))


@pytest.mark.parametrize("pool", [max_pool, avg_pool])
def test_gradient_against_finite_differences(pool):
    x, step = images(1, 3, 4, 2), 1e-5
    f = jax.jit(jax.value_and_grad(lambda x: loss(pool, x, (2, 3), (1, 2), "SAME")))
    gradient = np.asarray(f(x)[1])
    for i in np.ndindex(x.shape):
        shift = np.zeros(x.shape)
        shift[i] = step
        difference = float(f(x + shift)[0]) - float(f(x - shift)[0])
        np.testing.assert_allclose(gradient[i], difference / (2 * step), rtol=1e-5, atol=1e-7)


def test_ties_get_a_subgradient():
    """Split between the winners; max(x + h) ≥ max(x) + ⟨g, h⟩ for any h, which giving each winner all would break."""
    x = np.random.default_rng(0).integers(0, 2, size=(4, 6, 6, 2)).astype(np.float64)

    def by_reshaping(x):
        return x.reshape(4, 3, 2, 3, 2, 2).max((2, 4)).sum()

    @jax.jit
    def total(x):
        value, gradient = jax.value_and_grad(lambda x: halved(x).sum())(x)
        return value, gradient, jax.grad(by_reshaping)(x)

    value, gradient, expected = jax.device_get(total(x))
    windows = gradient.reshape(4, 3, 2, 3, 2, 2)
    np.testing.assert_allclose(windows.sum((2, 4)), 1)
    assert (gradient[x < x.max((1, 2), keepdims=True)] >= 0).all()
    for seed in range(20):
        h = np.random.default_rng(seed).normal(size=x.shape)
        assert total(x + h)[0] >= value + np.vdot(gradient, h) - 1e-9
    np.testing.assert_allclose(gradient, expected)


def test_left_over_rows_and_columns_are_cut_off():
    x = images(1, 5, 7, 1)
    assert jax.eval_shape(lambda x: max_pool(x, (2, 3), (2, 3)), x).shape == (1, 2, 2, 1)
    gradient = np.asarray(jax.jit(jax.grad(lambda x: loss(max_pool, x, (2, 3), (2, 3))))(x))
    assert not gradient[:, 4:].any() and not gradient[:, :, 6:].any()


def test_nan_stays_visible():
    x = np.zeros((1, 2, 4, 1))
    x[0, 1, 1, 0] = np.nan
    y = np.asarray(jax.jit(halved)(x))
    assert np.isnan(y[0, 0, 0, 0]) and y[0, 0, 1, 0] == 0


def test_under_vmap_and_scan():
    x = images(3, 4, 2, 5, 4, 2)

    def step(total, x):
        return total + jax.grad(loss, 1)(max_pool, x, (3, 2), (2, 2)), None

    @jax.jit
    def both(x):
        looped = jax.vmap(lambda batches: lax.scan(step, jnp.zeros((2, 5, 4, 2)), batches)[0])(x)
        one = jax.vmap(jax.vmap(lambda b: jax.grad(loss, 1)(linen.max_pool, b, (3, 2), (2, 2))))
        return looped, one(x).sum(1)

    np.testing.assert_allclose(*both(x), rtol=1e-12)


@pytest.mark.parametrize("pool", [max_pool, avg_pool])
@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((4, 4), ((2, 2),), "inputs must be"),
        ((1, 4, 4, 1), (2,), "window_shape"),
        ((1, 4, 4, 1), ((2, 2), 2), "strides"),
        ((1, 4, 4, 1), ((2, 2), None, "FULL"), "padding"),
        ((1, 1, 4, 1), ((2, 2),), "hold no window"),
    ],
)
def test_errors_name_the_argument(pool, shape, settings, message):
    with pytest.raises(ValueError, match=message):
        pool(np.zeros(shape), *settings)
