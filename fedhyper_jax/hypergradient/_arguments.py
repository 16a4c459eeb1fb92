"""Extra arguments of an update, which optax's wrappers hand on as they are while they change the updates."""

import jax
import jax.numpy as jnp
import optax

from fedhyper_jax.base import PyTree


def like_updates(tree: PyTree, updates: PyTree, *, name: str) -> PyTree:
    """``tree`` at the leaves that the updates have.

    Inside `optax.masked` and `optax.partition` an `optax.MaskedNode` stands for each leaf of another group, while an
    extra argument arrives whole.

    Raises:
      ValueError: a tree of another structure or of other shapes, which would broadcast.
    """

    def is_masked(node) -> bool:
        return isinstance(node, optax.MaskedNode)

    try:
        tree = jax.tree.map(lambda leaf, part: leaf if is_masked(leaf) else part, updates, tree, is_leaf=is_masked)
    except ValueError:
        pass  # another structure: the message is below
    given, wanted = _shapes(tree), _shapes(updates)
    if given == wanted and jax.tree.structure(tree) == jax.tree.structure(updates):
        return jax.tree.map(jnp.asarray, tree)
    place = next((place for place in wanted if given.get(place) != wanted[place]), None)
    if place is None:
        found = f"{jax.tree.structure(tree)} beside {jax.tree.structure(updates)}"
    else:
        here = f"an array of shape {given[place]}" if place in given else "no array"
        found = f"{here} at {place or 'the root'}, where the updates have one of shape {wanted[place]}"
    raise ValueError(
        f"{name} must be a tree like the updates, got {found}; hand over the tree that the outermost transform gets "
        "(inside optax.flatten: jax.flatten_util.ravel_pytree of it)"
    )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
