"""Keys whose hashes are unrolled draw the numbers that JAX's own do."""

import jax
import jax.numpy as jnp
import numpy as np

from fedhyper_jax import _threefry

KEYS = [jax.random.key(0), jax.random.key(2**31 - 1), jax.random.fold_in(jax.random.key(7), 2**32 - 1)]


def same(draws, *keys):
    """Asserts that all of the draws, in one program, are the same with either kind of key."""
    draws = jax.jit(draws)
    for key in keys:
        for theirs, ours in zip(draws(key), draws(_threefry.unrolled(key)), strict=True):
            assert theirs.dtype == ours.dtype
            np.testing.assert_array_equal(theirs, ours)


def test_keys_of_unrolled_keys():
    def draws(key):
        numbers = jnp.array([0, 1, 2**31 + 5], jnp.uint32)
        made = [jax.random.fold_in(key, n) for n in numbers], jax.random.split(key, 5), jax.random.split(key, (2, 3))
        return [*map(jax.random.key_data, jax.tree.leaves(made)), jax.random.bits(key, (7,))]

    same(draws, *KEYS)


def test_numbers_of_unrolled_keys(key):
    def draws(key):
        return [
            *(jax.random.bits(key, (3, 5), dtype) for dtype in (jnp.uint8, jnp.uint16)),
            jax.random.normal(key, (3, 5)),
            jax.random.randint(key, (), 0, 1000),
            jax.random.permutation(key, 100),
            jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), (3,)))(jnp.arange(4)),
        ]

    same(draws, key)
    with jax.enable_x64(True):
        same(lambda k: [jax.random.normal(k, (5,), jnp.float64)], key)  # 64 bits each


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
