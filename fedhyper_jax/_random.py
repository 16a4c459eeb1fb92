"""How keys are derived: by round number and client id, never by position; so order and chunks change nothing."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fedhyper_jax._threefry import unrolled
from fedhyper_jax.base import PyTree


class RoundKeys(NamedTuple):
    """The keys of a round, one a purpose."""

    cohort: Array
    clients: Array
    server: Array


def round_keys(key: Array, round_number: Int[Array, ""]) -> RoundKeys:
    """The keys of a round, from the key of the run."""
    return RoundKeys(*jax.random.split(jax.random.fold_in(unrolled(key), round_number), len(RoundKeys._fields)))


def batch_key(clients_key: Array, client_id: Int[Array, ""]) -> Array:
    """Key of a client's batches in the round that ``clients_key`` belongs to."""
    return _of_client(clients_key, client_id, 0)


def failure_key(clients_key: Array, client_id: Int[Array, ""]) -> Array:
    """Key of what goes wrong with a client in that round."""
    return _of_client(clients_key, client_id, 1)


def optimizer_key(clients_key: Array, client_id: Int[Array, ""]) -> Array:
    """Key of the noise of a client's optimizer in that round."""
    return _of_client(clients_key, client_id, 2)


def loss_key(clients_key: Array, client_id: Int[Array, ""]) -> Array:
    """Key of what a client's losses draw in that round; folded with the number of the step."""
    return _of_client(clients_key, client_id, 3)


def _of_client(clients_key: Array, client_id: Int[Array, ""], purpose: int) -> Array:
    return jax.random.fold_in(jax.random.fold_in(clients_key, client_id), purpose)


_KEY_FIELDS = ("key", "rng_key")
"""Names under which optimizers keep old-style keys, which by their type are numbers like others."""


def has_keys(tree: PyTree) -> bool:
    """Whether a tree holds keys: typed ones, or old-style ones in a field that is named for it."""
    return any(_is_key(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))


def with_own_keys(tree: PyTree, own_key: Callable[[], Array]) -> PyTree:
    """The tree with the words of ``own_key()`` folded into all its keys, so that they depend on both.

    A tree without keys is as it was, and asks for none.
    """

    def leaf(path, value):
        if not _is_key(path, value):
            return value
        words = jax.random.key_data(own_key()).ravel()
        typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        keys = value if typed else jax.random.wrap_key_data(value)
        fold = functools.partial(functools.reduce, jax.random.fold_in, words)
        for _ in range(keys.ndim):
            fold = jax.vmap(fold)
        folded = fold(keys)
        return folded if typed else jax.random.key_data(folded)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _is_key(path: tuple, leaf: Array) -> bool:
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    name = getattr(path[-1], "name", getattr(path[-1], "key", None)) if path else None
    old_style = jax.eval_shape(jax.random.PRNGKey, 0)
    return name in _KEY_FIELDS and dtype == old_style.dtype and jnp.shape(leaf)[-1:] == old_style.shape
