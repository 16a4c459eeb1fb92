"""Loss functions ``(params, batch) -> per-example losses``; the trainer masks and averages them."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fedhyper_jax import _validate
from fedhyper_jax.base import Batch, LossFunction, Model, Params


def cross_entropy(model: Model, *, ignore: int | None = None) -> LossFunction:
    r"""Softmax cross-entropy of a classifier on integer labels.

    .. math:: \ell(w; x, y) = -\log \mathrm{softmax}(f(w, x))_y

    Args:
      model: its ``apply`` returns logits, shape (batch, classes); or of sequences (batch, positions..., classes), and
        then the loss of one is the mean over its positions.
      ignore: a label that stands for none, such as −1 or −100; then the mean is over the other positions. An example
        without any has the loss 0, and still counts as an example in the mean over a batch and in its client's weight.

    Returns:
      ``loss_fn(params, {"x": inputs, "y": integer labels}) -> (batch,)``, labels of the shape of the logits without
      classes. Runs refuse labels that are no class before they compile; called by itself, it is NaN for them.

    Raises:
      ValueError: when called, labels that are no integers or of another shape, one-hot ones among them.

    Example:
      >>> import jax.numpy as jnp
      >>> model = Model(init=None, apply=lambda params, x: x @ params)
      >>> batch = {"x": jnp.ones((2, 3)), "y": jnp.array([0, 1])}
      >>> [round(loss, 4) for loss in cross_entropy(model)(jnp.zeros((3, 10)), batch).tolist()]  # log 10
      [2.3026, 2.3026]
    """
    check = label_check(model, ignore)

    def example_loss(logits, labels):
        return mean_over_positions(softmax_cross_entropy(logits, labels), labels_that_count(labels, ignore))

    loss_fn = with_model(model, example_loss)
    loss_fn.check = check
    return loss_fn


def softmax_cross_entropy(
    logits: Float[Array, "*shape classes"], labels: Int[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """``−log softmax(logits)`` of the labelled class; NaN where a label is none of the classes.

    optax's takes the label's logit by a gather, whose gradient is a scatter: slow, and long to compile. A sum over the
    classes of which all but one are left out is the same number.
    """
    _check_form(labels, logits.shape)
    labels = _signed(labels)
    chosen = jnp.arange(logits.shape[-1]) == jnp.expand_dims(labels, -1)
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    label_logits = jnp.sum(jnp.where(chosen, shifted, 0.0), axis=-1)
    losses = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - label_logits
    return jnp.where((labels >= 0) & (labels < logits.shape[-1]), losses, jnp.nan)


def mean_over_positions(
    values: Float[Array, "batch *positions"], counts: Bool[Array, "batch *positions"] | None = None
) -> Float[Array, " batch"]:
    """One value per example: the mean over the positions of a sequence; the values themselves where there are none.

    Where ``counts`` is given, over those positions where it holds; 0 of none.
    """
    positions = tuple(range(1, values.ndim))
    if counts is None:
        return jnp.mean(values, axis=positions) if positions else values
    number = jnp.sum(counts, axis=positions, dtype=jnp.int32)
    return jnp.sum(jnp.where(counts, values, 0.0), axis=positions) / jnp.maximum(number, 1).astype(values.dtype)


def labels_that_count(labels: Int[Array, "*shape"], ignore: int | None) -> Bool[Array, "*shape"] | None:
    """Where labels are not ``ignore``; None where that is None, and all count."""
    return None if ignore is None else _signed(labels) != ignore


def _signed(labels: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """As integers that can be compared with any class and with −1."""
    return labels.astype(jnp.promote_types(labels.dtype, jnp.int32))


def label_check(model: Model, ignore: int | None) -> Callable[..., None]:
    """The ``check`` (see `LossFunction`) of functions of a classifier: every label is a class, or ``ignore``.

    The number of classes is that of the model's outputs, found without running it.

    Raises:
      ValueError: an ``ignore`` that is no integer.
    """
    integer = isinstance(ignore, int | np.integer) and not isinstance(ignore, bool)
    if ignore is not None and not (integer and -(2**31) <= ignore < 2**31):
        raise ValueError(f"ignore must be an integer label, got {ignore!r}; give e.g. -1")

    def check(params: Params, examples: Batch, rows=None, name: str = "examples") -> None:
        labels, inputs = examples["y"], examples["x"]
        if _validate.is_traced(labels, rows):
            return
        logits = jax.eval_shape(
            model.apply, jax.tree.map(_shape_of, params), jax.tree.map(lambda x: _shape_of(x, 1), inputs)
        )
        _check_form(labels, (len(labels), *logits.shape[1:]), name=f"{name}['y']")
        _check_classes(np.asarray(labels), logits.shape[-1], ignore, rows, f"{name}['y']")

    return check


def _shape_of(array, length: int | None = None) -> jax.ShapeDtypeStruct:
    """Shape and type as JAX has them; with another length, where one is given."""
    shape = np.shape(array) if length is None else (length, *np.shape(array)[1:])
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(jnp.result_type(array)))


def _check_form(labels, logits_shape: tuple[int, ...], name: str = "labels") -> None:
    """Raises ValueError unless labels are integers, one where the logits have a row of classes."""
    shape, dtype, wanted = np.shape(labels), jnp.result_type(labels), logits_shape[:-1]
    if shape == wanted and (dtype.kind in "iub"):
        return
    if shape == wanted:
        remedy = "use astype(int) for whole numbers"
    elif shape == logits_shape:
        remedy = "use argmax(axis=-1) for one-hot rows"
    elif shape == (*wanted, 1):
        remedy = "use [..., 0] for a column"
    else:
        remedy = f"the model's outputs have shape {logits_shape}"
    raise ValueError(f"{name} must be integer classes of shape {wanted}, got shape {shape} of {dtype}; {remedy}")


def _check_classes(labels: np.ndarray, classes: int, ignore: int | None, rows, name: str) -> None:
    """Raises ValueError for a label outside of 0 … classes − 1, in any row or in those that are given."""
    if labels.size == 0 or (labels.min() >= 0 and labels.max() < classes):
        return
    wrong = (labels < 0) | (labels >= classes)
    if ignore is not None:
        wrong &= labels != ignore
    if rows is not None:
        strangers = np.ones(len(labels), bool)
        strangers[np.asarray(rows)] = False
        wrong[strangers] = False
    if not wrong.any():
        return
    row, *position = np.argwhere(wrong)[0].tolist()
    label = labels[(row, *position)].item()
    remedy = "give the model as many outputs as there are classes, or leave such examples out"
    if label < 0:
        remedy = f"ignore={label} in the loss and its metrics leaves such labels out"
    elif labels.min() == 1 and labels.max() == classes:
        remedy = "labels that begin with 1 want 1 subtracted"
    where = f"row {row}" + (f", position {position[0] if len(position) == 1 else position}" if position else "")
    raise ValueError(f"{name} has label {label} in {where}, but the classes are 0 to {classes - 1}; {remedy}")


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
