"""Loss functions ``(params, batch) -> per-example losses``; the trainer masks and averages them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedhyper_jax.base import LossFunction, Model


def cross_entropy(model: Model) -> LossFunction:
    r"""Softmax cross-entropy of a classifier on integer labels.

    .. math:: \ell(w; x, y) = -\log \mathrm{softmax}(f(w, x))_y

    Args:
      model: its ``apply`` returns logits, shape (batch, classes); or of sequences (batch, positions..., classes), and
        then the loss of one is the mean over its positions.

    Returns:
      ``loss_fn(params, {"x": inputs, "y": integer labels}) -> (batch,)``, labels of the shape of the logits without
      classes.

    Example:
      >>> import jax.numpy as jnp
      >>> model = Model(init=None, apply=lambda params, x: x @ params)
      >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.array([0, 1])}
      >>> [round(loss, 4) for loss in cross_entropy(model)(jnp.zeros((3, 10)), batch).tolist()]  # log 10
      [2.3026, 2.3026]
    """

    def example_loss(logits, labels):
        return mean_over_positions(softmax_cross_entropy(logits, labels))

    return with_model(model, example_loss)


def softmax_cross_entropy(
    logits: Float[Array, "*shape classes"], labels: Int[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """``−log softmax(logits)`` of the labelled class; NaN where a label is none of the classes.

    optax's takes the label's logit by a gather, whose gradient is a scatter: slow, and long to compile. A sum over the
    classes of which all but one are left out is the same number.
    """
    chosen = jnp.arange(logits.shape[-1]) == jnp.expand_dims(labels, -1)
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    label_logits = jnp.sum(jnp.where(chosen, shifted, 0.0), axis=-1)
    losses = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - label_logits
    return jnp.where((labels >= 0) & (labels < logits.shape[-1]), losses, jnp.nan)


def mean_over_positions(values: Float[Array, "batch *positions"]) -> Float[Array, " batch"]:
    """One value per example: the mean over the positions of a sequence; the values themselves where there are none."""
    return values if values.ndim == 1 else jnp.mean(values, axis=tuple(range(1, values.ndim)))


def squared_error(model: Model) -> LossFunction:
    r"""Half the squared error, summed over the outputs of an example: ``½‖f(w, x) − y‖²``.

    Args:
      model: its outputs have the shape of the targets, (batch, *shape).

    Raises:
      ValueError: when called, outputs and targets of different shapes, which would be broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> model = Model(init=None, apply=lambda params, x: x * params)
      >>> squared_error(model)(jnp.array(2.0), {"x": jnp.array([1.0, 2.0]), "y": jnp.array([2.0, 3.0])}).tolist()
      [0.0, 0.5]
    """

    def example_loss(outputs, targets):
        return 0.5 * squared_distance(outputs, targets)

    return with_model(model, example_loss)


def squared_distance(
    outputs: Float[Array, "batch *shape"], targets: Float[Array, "batch *shape"]
) -> Float[Array, " batch"]:
    """``‖outputs − targets‖²`` of each example; refuses shapes that differ, which would be broadcast."""
    if outputs.shape != targets.shape:
        raise ValueError(
            f"outputs and targets must have one shape, got {outputs.shape} and {targets.shape}; reshape the targets"
        )
    return jnp.sum(jnp.square(outputs - targets).reshape(outputs.shape[0], -1), axis=1)


def with_model(model: Model, example_loss: Callable[[Array, Array], Float[Array, " batch"]]) -> LossFunction:
    """A loss function from a model and one's own ``example_loss(outputs, batch["y"]) -> (batch,)``."""

    def loss_fn(params, batch):
        return example_loss(model.apply(params, batch["x"]), batch["y"])

    return loss_fn
