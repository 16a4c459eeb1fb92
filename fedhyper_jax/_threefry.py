"""JAX's random numbers, written so that XLA:CPU makes one function of the twenty rounds of a hash, not a loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random
from jaxtyping import Array, Int, UInt32


def unrolled(key: Array) -> Array:
    """The same key, with the same numbers, which on a CPU are drawn several times faster.

    There JAX writes threefry's twenty rounds as a loop over arrays in memory, some ten compiled functions for every
    place that draws. Written one after the other they are part of the one function that uses the numbers.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32" or not jax.config.jax_threefry_partitionable:
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_UNROLLED)


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_PARITY = np.uint32(0x1BD11BDA)


@jax.jit
def _threefry(key: UInt32[Array, "2"], high: UInt32[Array, "*shape"], low: UInt32[Array, "*shape"]):
    """Threefry-2x32 with 20 rounds (Salmon, Moraes, Dror, Shaw, `Parallel Random Numbers: As Easy as 1, 2, 3
    <https://doi.org/10.1145/2063384.2063405>`_, 2011) of counters of two words.
    """
    schedule = [jax.lax.full_like(low, word) for word in (key[0], key[1], key[0] ^ key[1] ^ _KEY_PARITY)]
    x, y = jax.lax.add(high, schedule[0]), jax.lax.add(low, schedule[1])
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = jax.lax.add(x, y)
            left = jax.lax.shift_left(y, np.uint32(rotation))
            right = jax.lax.shift_right_logical(y, np.uint32(32 - rotation))
            y = jax.lax.bitwise_xor(x, jax.lax.bitwise_or(left, right))
        x = jax.lax.add(x, schedule[(group + 1) % 3])
        y = jax.lax.add(jax.lax.add(y, schedule[(group + 2) % 3]), np.uint32(group + 1))
    return x, y


def _of_counters(key: UInt32[Array, "2"], number: int):
    """The hashes of the counters 0, 1, …"""
    return _threefry(key, jnp.zeros(number, jnp.uint32), jax.lax.iota(jnp.uint32, number))


def _once(keys: UInt32[Array, "*shape 2"]) -> UInt32[Array, "*shape 2"]:
    """Keys that XLA does not hash again in every function that uses them; to it twenty rounds look cheap."""
    return jax.lax.optimization_barrier(keys)


def _seed(seed: Int[Array, ""]) -> UInt32[Array, "2"]:
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def _fold_in(key: UInt32[Array, "2"], data: UInt32[Array, ""]) -> UInt32[Array, "2"]:
    return _once(jnp.stack(_threefry(key, jnp.zeros((), jnp.uint32), jnp.asarray(data, jnp.uint32))))


def _split(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> UInt32[Array, "*shape 2"]:
    return _once(jnp.stack(_of_counters(key, math.prod(shape)), axis=-1).reshape(*shape, 2))


def _bits(key: UInt32[Array, "2"], bit_width: int, shape: tuple[int, ...]) -> Array:
    number = math.prod(shape)
    if number > 2**32:  # counters with an upper word
        rolled = jax.random.wrap_key_data(key, impl="threefry2x32")
        return jax.random.bits(rolled, shape, jnp.dtype(f"uint{bit_width}"))
    high, low = _of_counters(key, number)
    if bit_width == 64:
        bits = (high.astype(jnp.uint64) << np.uint64(32)) | low.astype(jnp.uint64)
    else:
        bits = (high ^ low).astype(jnp.dtype(f"uint{bit_width}"))
    return bits.reshape(shape)


_UNROLLED = random.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_bits,
    fold_in=_fold_in,
    name="threefry2x32_unrolled",
    tag="fhu",
)
