"""Loss functions ``(params, batch) -> per-example losses``; the trainer masks and averages them."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedhyper_jax.base import Batch, LossFunction, Model, Params


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
    """A loss function from a model and one's own ``example_loss(outputs, batch["y"]) -> (batch,)``.

    It takes a key where the model draws random numbers in training.
    """

    def loss_fn(params, batch):
        return example_loss(model.apply(params, batch["x"]), batch["y"])

    def loss_with_noise(params, batch, key):
        return example_loss(model.train(params, batch["x"], key), batch["y"])

    return loss_fn if model.train is None else loss_with_noise


def losses_of(
    loss_fn: LossFunction, params: Params, batch: Batch, number: int, key: Array | None = None
) -> Float[Array, " batch"]:
    """A batch's losses, checked; ``key`` where the loss takes one."""
    values = loss_fn(params, batch) if key is None else loss_fn(params, batch, key)
    check_per_example(values, number, name="loss_fn")
    return values


def check_per_example(values: Array, batch_size: int, *, name: str) -> None:
    """Raises ValueError unless a function returned one value per example: a mean or a column would mix up the mask."""
    if isinstance(values, tuple | list | dict):
        raise ValueError(
            f"{name} must return one value per example, shape ({batch_size},), got a {type(values).__name__} of "
            f"{len(values)}; return the array alone"
        )
    if jnp.shape(values) != (batch_size,):
        raise ValueError(
            f"{name} must return one value per example, shape ({batch_size},), got shape {jnp.shape(values)}; "
            "leave averaging over examples to the caller"
        )


def takes_key(loss_fn: LossFunction) -> bool:
    """Whether a loss is to be called as ``loss_fn(params, batch, key)``.

    Raises:
      TypeError: it takes neither two arguments nor three.

    Example:
      >>> takes_key(lambda params, batch: batch["x"]), takes_key(lambda params, batch, key: batch["x"])
      (False, True)
      >>> takes_key(lambda params, batch, temperature=1.0: batch["x"])  # an option of one's own
      False
    """
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):  # of a built-in
        return False
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    open_ended = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if (len(by_position) < 2 and not open_ended) or len(needed) > 3 or len(needed) > len(by_position):
        raise TypeError(
            f"loss_fn must take (params, batch), or (params, batch, key) if it draws random numbers, but it takes "
            f"({', '.join(p.name for p in parameters)}); bind what else it needs with functools.partial"
        )
    return len(needed) == 3 or any(p.name == "key" for p in by_position[2:3])
