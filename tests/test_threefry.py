"""Keys whose hashes are unrolled draw the numbers that JAX's own do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import _threefry

KEYS = [jax.random.key(0), jax.random.key(2**31 - 1), jax.random.fold_in(jax.random.key(7), 2**32 - 1)]


def same(draw, key):
    """Asserts that a draw is the same with either key."""
    theirs, ours = (jax.tree.map(np.asarray, draw(k)) for k in (key, _threefry.unrolled(key)))
    assert theirs.dtype == ours.dtype
    np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_unrolled_keys(key):
    data = jax.random.key_data
    for number in (0, 1, 2**31 + 5):
        same(lambda k, n=number: data(jax.random.fold_in(k, n)), key)
    same(lambda k: data(jax.random.split(k, 5)), key)
    same(lambda k: data(jax.random.split(k, (2, 3))), key)
    same(lambda k: jax.random.bits(k, (7,)), key)


def test_numbers_of_unrolled_keys(key):
    for dtype in (jnp.uint8, jnp.uint16):
        same(lambda k, d=dtype: jax.random.bits(k, (3, 5), d), key)
    same(lambda k: jax.random.normal(k, (3, 5)), key)
    same(lambda k: jax.random.randint(k, (), 0, 1000), key)
    same(lambda k: jax.random.permutation(k, 100), key)
    same(lambda k: jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(k, i), (3,)))(jnp.arange(4)), key)
    with jax.enable_x64(True):
        same(lambda k: jax.random.normal(k, (5,), jnp.float64), key)  # 64 bits each


def test_what_is_unrolled():
    key = jax.random.key(3)
    assert jax.random.key_impl(_threefry.unrolled(key)) != jax.random.key_impl(key)
    unrolled = _threefry.unrolled(key)
    assert _threefry.unrolled(unrolled) is unrolled
    raw = _threefry.unrolled(jax.random.PRNGKey(3))  # old-style keys are numbers alone
    np.testing.assert_array_equal(jax.random.key_data(raw), jax.random.key_data(key))
    other = jax.random.key(3, impl="rbg")
    assert _threefry.unrolled(other) is other
    with jax.threefry_partitionable(False):  # other numbers, which are not ours to change
        assert _threefry.unrolled(key) is key
