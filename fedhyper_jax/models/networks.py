"""Built-in models: flax linen modules behind `Model(init, apply)`, and the registry of their names.

All of them: outputs are logits; weights are normal (not truncated) with variance 1/fan-in, biases 0; parameters take
the dtype of the inputs given to ``init`` if that is a floating one (float64 stays float64), else float32. Integer
inputs (uint8 images) are converted to the parameters' dtype as they are, *without* scaling: dividing by 255 or
standardising belongs to the data.
"""

import inspect
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array

from fedhyper_jax import _validate
from fedhyper_jax.base import Model
from fedhyper_jax.models.adapters import from_linen
from fedhyper_jax.models.layers import convolution
from fedhyper_jax.models.pooling import max_pool

# fan-in of a convolution kernel is kernel_height · kernel_width · channels.
_kernel_init = linen.initializers.variance_scaling(1.0, "fan_in", "normal")


def _parameter_dtype(inputs: Array):
    return inputs.dtype if jnp.issubdtype(inputs.dtype, jnp.floating) else jnp.float32


class _Classifier(linen.Module):
    """Convolutional stages (conv, ReLU, pool), hidden dense layers (ReLU), a dense layer to the logits."""

    num_classes: int
    channels: tuple[int, ...]
    kernel_size: int
    hidden: tuple[int, ...]

    @linen.compact
    def __call__(self, inputs):
        dtype, x = _parameter_dtype(inputs), inputs
        for i, outputs in enumerate(self.channels):
            size = (self.kernel_size, self.kernel_size, x.shape[-1], outputs)
            kernel = self.param(f"conv_{i}_kernel", _kernel_init, size, dtype)
            bias = self.param(f"conv_{i}_bias", linen.initializers.zeros, (outputs,), dtype)
            x = max_pool(jax.nn.relu(convolution(x, kernel) + bias))
        x = x.reshape(x.shape[0], -1)
        for i, outputs in enumerate((*self.hidden, self.num_classes)):
            x = linen.Dense(outputs, param_dtype=dtype, kernel_init=_kernel_init, name=f"dense_{i}")(
                x if i == 0 else jax.nn.relu(x)
            )
        return x


def _sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise ValueError(f"{name} must be a sequence of layer sizes, got {sizes!r}; e.g. (64,), or () for none")
    for i, size in enumerate(sizes):
        _validate.positive_integer(**{f"{name}[{i}]": size})
    return tuple(int(size) for size in sizes)


def _checked(model: Model, check: Callable[[tuple[int, ...]], None]) -> Model:
    """The model, with the shape of its inputs checked first."""

    def init(key, inputs):
        check(jnp.shape(inputs))
        return model.init(key, inputs)

    def apply(params, inputs):
        check(jnp.shape(inputs))
        return model.apply(params, inputs)

    return Model(init, apply)


def _check_flattened(shape):
    if len(shape) < 2 or math.prod(shape[1:]) == 0:
        raise ValueError(f"inputs must be (batch, features...), got shape {shape}; give one example as x[None]")


def logistic(num_classes: int) -> Model:
    """Multinomial logistic regression: f(x) = xᵀW + b, the convex model.

    Args:
      num_classes: number of logits.

    Returns:
      ``Model``: inputs (batch, features...), flattened; outputs (batch, num_classes).

    Raises:
      ValueError: ``num_classes`` is no integer ≥ 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fedhyper_jax.models import logistic
      >>> model = logistic(10)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
      >>> print(sum(leaf.size for leaf in jax.tree.leaves(params)))
      7850
    """
    return mlp(num_classes, hidden=())


def mlp(num_classes: int, hidden: Sequence[int] = (64,)) -> Model:
    """Multilayer perceptron: h_0 = x, h_{i+1} = ReLU(h_iᵀW_i + b_i), and no ReLU after the last layer.

    Args:
      num_classes: number of logits.
      hidden: sizes of the hidden layers; () makes it logistic regression.

    Returns:
      ``Model``: inputs (batch, features...), flattened; outputs (batch, num_classes).

    Raises:
      ValueError: a size is no integer ≥ 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fedhyper_jax.models import mlp
      >>> model = mlp(10, hidden=(64,))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 784)))
      >>> print(model.apply(params, jnp.ones((5, 784))).shape)
      (5, 10)
    """
    _validate.positive_integer(num_classes=num_classes)
    module = _Classifier(int(num_classes), channels=(), kernel_size=1, hidden=_sizes("hidden", hidden))
    return _checked(from_linen(module), _check_flattened)


def cnn(
    num_classes: int, channels: Sequence[int] = (16, 32), kernel_size: int = 5, hidden: Sequence[int] = ()
) -> Model:
    """Convolutional network: per entry of ``channels`` conv (SAME)-ReLU-maxpool 2×2, then dense layers.

    Without normalisation layers, so that a client's model is its parameters. Fast under ``scan`` and ``vmap``
    through `convolution`.

    Args:
      num_classes: number of logits.
      channels: outputs of each convolution.
      kernel_size: height and width of every kernel, in pixels.
      hidden: sizes of hidden dense layers (ReLU) between the last pooling and the logits.

    Returns:
      ``Model``: inputs (batch, height, width, channels), height and width at least 2^len(channels); outputs
      (batch, num_classes).

    Raises:
      ValueError: a size is no integer ≥ 1, ``channels`` is empty; from ``init`` and ``apply``, inputs of another rank
        or too small to be pooled so often.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fedhyper_jax.models import cnn
      >>> model = cnn(10)
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
      >>> print(sum(leaf.size for leaf in jax.tree.leaves(params)))
      28938
    """
    _validate.positive_integer(num_classes=num_classes, kernel_size=kernel_size)
    channels = _sizes("channels", channels)
    if not channels:
        raise ValueError("channels must name at least one convolution, got (); use mlp for a model without any")
    smallest = 2 ** len(channels)

    def check(shape):
        if len(shape) != 4 or shape[3] == 0:
            raise ValueError(
                f"inputs must be images (batch, height, width, channels), got shape {shape}; "
                "give grey images their channel axis with x[..., None], one example its batch axis with x[None]"
            )
        if min(shape[1:3]) < smallest:
            raise ValueError(
                f"images of {shape[1]}×{shape[2]} pixels cannot be halved {len(channels)} times; "
                f"use at least {smallest}×{smallest} pixels or fewer entries in channels={channels}"
            )

    module = _Classifier(int(num_classes), channels, int(kernel_size), _sizes("hidden", hidden))
    return _checked(from_linen(module), check)


MODELS: dict[str, Callable[..., Model]] = {"logistic": logistic, "mlp": mlp, "cnn": cnn}
"""Factories of the built-in models by name; each takes ``num_classes`` and its own settings."""


def make_model(name: str, num_classes: int, **settings) -> Model:
    """A built-in model by name: ``MODELS[name](num_classes, **settings)``.

    Args:
      name: a key of ``MODELS``.
      num_classes: number of logits.
      settings: the factory's own keyword arguments.

    Returns:
      ``Model``.

    Raises:
      ValueError: the name or a setting is unknown (the message lists the known ones), or its value is refused.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fedhyper_jax.models import make_model
      >>> model = make_model("mlp", 10, hidden=(32, 32))
      >>> params = model.init(jax.random.key(0), jnp.zeros((1, 784)))
      >>> print(sorted(params))
      ['dense_0', 'dense_1', 'dense_2']
    """
    _validate.one_of(MODELS, name=name)
    known = list(inspect.signature(MODELS[name]).parameters)[1:]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"model {name!r} has no setting {', '.join(unknown)}; known: {', '.join(known) or 'none'}")
    return MODELS[name](num_classes, **settings)
