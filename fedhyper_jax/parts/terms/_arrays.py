"""Small operations that terms share."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fedhyper_jax import _tree
from fedhyper_jax.base import Params, PyTree


def model_bytes(tree: PyTree) -> float:
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))


def scalar_bytes(params: Params) -> float:
    """Of one number that a client sends."""
    return float(_tree.accumulator_dtype(params).itemsize)


def scalar(value: Any, params: Params) -> Array:
    return jnp.asarray(value, _tree.accumulator_dtype(params))


def accumulated(tree: PyTree) -> PyTree:
    """In the dtype of sums over clients."""
    return jax.tree.map(lambda x: x.astype(_tree.accumulator_dtype(x)), tree)


def divide(tree: PyTree, divisor: Array) -> PyTree:
    """``tree / divisor`` in the dtype of sums; 0 where the divisor is 0, which is a client without steps."""
    safe = jnp.where(divisor > 0, divisor, 1)
    return jax.tree.map(lambda x: jnp.where(divisor > 0, x.astype(safe.dtype) / safe, 0), tree)


def squared_distance(a: Params, b: Params) -> Array:
    difference = _tree.subtract(accumulated(a), accumulated(b))
    return _tree.inner_product(difference, difference)
