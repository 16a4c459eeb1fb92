"""Operations on trees of arrays that optax.tree lacks."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedhyper_jax.base import PyTree


def accumulator_dtype(tree: PyTree) -> Any:
    """float64 if a leaf is float64, else float32: the dtype of rates and of inner products over ``tree``."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return jnp.dtype(jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in leaves) else jnp.float32)


def inner_product(a: PyTree, b: PyTree) -> Float[Array, ""]:
    """⟨a, b⟩ = Σ over all leaves of a·b, in float32 at least; float64 for float64 leaves."""
    dtype = accumulator_dtype((a, b))
    products = jax.tree.map(lambda x, y: jnp.sum(x.astype(dtype) * y.astype(dtype)), a, b)
    return functools.reduce(operator.add, jax.tree.leaves(products), jnp.zeros((), dtype))


def norm(tree: PyTree) -> Float[Array, ""]:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(inner_product(tree, tree))


def select(condition: Bool[Array, ""], on_true: PyTree, on_false: PyTree) -> PyTree:
    """``on_true`` where the scalar ``condition`` holds, else ``on_false``, leaf by leaf, in ``on_false``'s dtypes."""

    def leaf(x, y):
        chosen = jnp.where(condition, x, y)
        return chosen if chosen.dtype == y.dtype else chosen.astype(y.dtype)  # keys cannot be cast, not even to keys

    return jax.tree.map(leaf, on_true, on_false)


def is_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number of every leaf is finite; integers are, and so are the keys of a noisy optimizer."""
    checks = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, checks, jnp.array(True))


def scale(tree: PyTree, factor: Float[Array, ""]) -> PyTree:
    """``factor · tree``; each leaf keeps its dtype, whatever the factor's."""
    return jax.tree.map(lambda x: (factor.astype(accumulator_dtype(x)) * x).astype(x.dtype), tree)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """``a − b``."""
    return jax.tree.map(operator.sub, a, b)
