"""Facts about an optax optimizer, found by playing it: a few gradients, and what it makes of them.

Most optimizers treat all parameters alike, and are played on one number. Masks and labels (`optax.masked`,
`optax.partition`) tell parameters apart by their place, so those optimizers are played on the parameters' structure,
every axis of length 1.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from fedhyper_jax import _validate
from fedhyper_jax.base import Params, PyTree


def tells_apart(optimizer: optax.GradientTransformationExtraArgs, params: Params) -> bool:
    """Whether an optimizer treats parameters by their place, so that one number does not stand for all of them.

    Example:
      >>> tells_apart(optax.masked(optax.sgd(1.0), {"w": True}), {"w": jnp.zeros(3)})
      True
    """
    return bool(_nodes(jax.eval_shape(optimizer.init, params), (optax.PartitionState, optax.MaskedState)))


def stand_in(optimizer: optax.GradientTransformationExtraArgs, params: Params, dtype: Any = float) -> Params:
    """Zeros that stand for the parameters: one number, or for masks and labels one number a leaf."""
    if not tells_apart(optimizer, params):
        return jnp.zeros((), dtype)
    return jax.tree.map(lambda w: jnp.zeros((1,) * jnp.ndim(w), dtype), params)


def is_plain_sgd(optimizer: optax.GradientTransformationExtraArgs, params: Params | None = None) -> bool:
    """Whether an optimizer's update is −gradient, step after step; True where it is not known.

    It is known of concrete numbers only, and without parameters of optimizers that treat all of them alike.

    Example:
      >>> is_plain_sgd(optax.with_extra_args_support(optax.sgd(1.0, momentum=0.9)))
      False
    """
    gradients = (1.0, -3.0, 0.5)
    updates = _play(optimizer, gradients, params)
    return updates is None or bool(np.all(updates == -np.array(gradients)))


def why_no_weight(optimizer: optax.GradientTransformationExtraArgs, params: Params | None = None) -> str | None:
    """Why a client's update is no sum of its gradients with the same weights ≤ 0 for all parameters that move.

    None where it is, and where it is not known (as `is_plain_sgd`). Parameters that do not move have the weights 0.
    """
    sequences = ((1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0), (2.0, -3.0, 0.0, 0.0))
    played = [_play(optimizer, sequence, params) for sequence in sequences]
    if any(updates is None for updates in played):
        return None
    first, second, mixed = played
    if np.any(np.maximum(first, second) > 0) or np.any(np.abs(mixed - (2 * first - 3 * second)) > 1e-5):
        return (
            "which only a linear client optimizer gives (SGD, momentum), not one whose step depends on the size of "
            "gradients; use optax.sgd(1.0, momentum=…)"
        )
    moving = first[np.any(first != 0, axis=1)]
    if np.any(moving != moving[:1]):
        return (
            "and a_m is one number, but client_optimizer moves some parameters by other rates or momentum than others; "
            "give one optimizer to all that move, and optax.set_to_zero() to the rest"
        )
    return None


def climbing_leaf(optimizer: optax.GradientTransformationExtraArgs, params: Params) -> str | None:
    """The path of a leaf that `optax.masked` leaves out, so that its raw gradient would be added; None without one.

    A gradient that `optax.partition` passes on is meant.

    Example:
      >>> climbing_leaf(optax.masked(optax.sgd(1.0), {"a": True, "b": False}), {"a": jnp.zeros(3), "b": jnp.zeros(3)})
      "['b']"
    """
    nodes = _nodes(jax.eval_shape(optimizer.init, params), (optax.PartitionState, optax.MaskedState))
    if not any(isinstance(node, optax.MaskedState) for node in nodes):
        return None
    gradients = (1.0, -3.0, 0.5)
    updates = _play(optimizer, gradients, params)
    if updates is None:
        return None
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    climbing = [path for path, leaf in zip(paths, updates, strict=True) if np.all(leaf == gradients)]
    return jax.tree_util.keystr(climbing[0]) if climbing else None


def climbs(leaf: str) -> str:
    """The end of a message about a `climbing_leaf`."""
    return (
        f"passes the gradient of params{leaf} on as it is, and a step along it would climb: optax.masked leaves alone "
        "what it leaves out; to freeze it, give it optax.set_to_zero() by optax.partition"
    )


def _sum(params: Params) -> Array:
    return functools.reduce(operator.add, [jnp.sum(leaf) for leaf in jax.tree.leaves(params)])


def _nodes(state: PyTree, kinds: tuple[type, ...]) -> list[Any]:
    """The outermost nodes of some kinds in a state."""
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in found if isinstance(node, kinds)]


def _play(
    optimizer: optax.GradientTransformationExtraArgs, gradients: tuple[float, ...], params: Params | None
) -> np.ndarray | None:
    """The updates (leaves, steps) of parameters that start at 0 and stay there, all gradients of a step being equal.

    None where they are traced, and where no parameters are given to an optimizer that tells them apart.
    """
    number = jnp.zeros(())
    if params is None:
        try:
            if tells_apart(optimizer, number):
                return None
        except Exception:  # masks and labels for a tree that is not known yet; `init` will see it
            return None
    zeros = number if params is None else stand_in(optimizer, params)
    state, steps = optimizer.init(zeros), []
    for value in gradients:
        gradient = jax.tree.map(lambda z, value=value: jnp.full_like(z, value), zeros)
        extra = {
            "value": jnp.asarray(value),
            "gradient": gradient,
            "value_fn": _sum,
            "global_update": zeros,
        }
        update, state = optimizer.update(gradient, state, zeros, **extra)
        leaves = jax.tree.leaves(update)
        if _validate.is_traced(*leaves):
            return None
        steps.append([float(np.ravel(leaf)[0]) for leaf in leaves])
    return np.array(steps).T
