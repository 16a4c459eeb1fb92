"""Built-in models: flax linen modules behind `Model(init, apply)`, and the registry of their names.

All of them: outputs are logits; parameters take the dtype of the inputs given to ``init`` if that is a floating one
(float64 stays float64), else float32. Weights are normal (not truncated) with variance 1/fan-in, biases 0, scales 1;
`char_lstm` says what differs. Integer inputs (uint8 images) are converted to the parameters' dtype as they are,
*without* scaling: dividing by 255 or standardising belongs to the data.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array

from fedhyper_jax import _validate
from fedhyper_jax.base import Model
from fedhyper_jax.models.adapters import from_linen
from fedhyper_jax.models.layers import convolution
from fedhyper_jax.models.modules import RNN, Conv, Embed, GroupNorm
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
            x = max_pool(jax.nn.relu(convolution(x, kernel) + bias), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for i, outputs in enumerate((*self.hidden, self.num_classes)):
            x = linen.Dense(outputs, param_dtype=dtype, kernel_init=_kernel_init, name=f"dense_{i}")(
                x if i == 0 else jax.nn.relu(x)
            )
        return x


class _Block(linen.Module):
    """Basic block: x + norm(conv(ReLU(norm(conv(x))))), then ReLU; where shapes differ, x goes through 1×1 and norm."""

    channels: int
    stride: int
    groups: int

    @linen.compact
    def __call__(self, x):
        settings = {"use_bias": False, "kernel_init": _kernel_init, "param_dtype": x.dtype}
        conv, norm = functools.partial(Conv, self.channels, **settings), functools.partial(_norm, self.groups, x.dtype)
        y = conv((3, 3), strides=self.stride, padding=1, name="conv_0")(x)
        y = jax.nn.relu(norm("norm_0")(y))
        y = norm("norm_1")(conv((3, 3), padding=1, name="conv_1")(y))
        if x.shape != y.shape:
            x = conv((1, 1), strides=self.stride, padding=0, name="conv_shortcut")(x)
            x = norm("norm_shortcut")(x)
        return jax.nn.relu(x + y)


def _norm(groups: int, dtype, name: str) -> GroupNorm:
    return GroupNorm(groups, epsilon=1e-5, param_dtype=dtype, name=name)


class _ResNet(linen.Module):
    """Stem, stages of basic blocks of which each halves the image but the first, mean over pixels, dense layer."""

    num_classes: int
    width: int
    groups: int
    blocks: tuple[int, ...]

    @linen.compact
    def __call__(self, inputs):
        dtype = _parameter_dtype(inputs)
        settings = {"kernel_init": _kernel_init, "param_dtype": dtype}
        x = Conv(self.width, (3, 3), padding=1, use_bias=False, name="stem", **settings)(inputs)
        x = jax.nn.relu(_norm(self.groups, dtype, "stem_norm")(x))
        for i, blocks in enumerate(self.blocks):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                x = _Block(self.width * 2**i, stride, self.groups, name=f"stage_{i}_block_{j}")(x)
        return linen.Dense(self.num_classes, name="dense_0", **settings)(x.mean((1, 2)))


class _CharLSTM(linen.Module):
    """Embedding, layers of LSTM, dense layer at every position."""

    vocabulary: int
    embedding: int
    hidden: int
    layers: int

    @linen.compact
    def __call__(self, inputs):
        x = Embed(self.vocabulary, self.embedding, name="embedding")(inputs)
        for i in range(self.layers):
            # A carry of the parameters' dtype, which tests and `compute_in` change behind flax's back.
            zeros = jnp.zeros((x.shape[0], self.hidden), x.dtype)
            cell = linen.OptimizedLSTMCell(self.hidden, name=f"lstm_{i}")
            x = RNN(cell)(x, initial_carry=(zeros, zeros))
        return linen.Dense(self.vocabulary, kernel_init=_kernel_init, name="dense_0")(x)


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

    def checked(function):
        def call(params, inputs, *key):
            check(jnp.shape(inputs))
            return function(params, inputs, *key)

        return call

    return Model(init, checked(model.apply), model.train and checked(model.train))


def _check_flattened(shape):
    if len(shape) < 2 or math.prod(shape[1:]) == 0:
        raise ValueError(f"inputs must be (batch, features...), got shape {shape}; give one example as x[None]")


def _check_images(shape):
    if len(shape) != 4 or shape[3] == 0:
        raise ValueError(
            f"inputs must be images (batch, height, width, channels), got shape {shape}; "
            "give grey images their channel axis with x[..., None], one example its batch axis with x[None]"
        )


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
      >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
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
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 784)))
      >>> print(jax.jit(model.apply)(params, jnp.ones((5, 784))).shape)
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
      >>> params = jax.eval_shape(cnn(10).init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
      >>> print(sum(leaf.size for leaf in jax.tree.leaves(params)))
      28938
    """
    _validate.positive_integer(num_classes=num_classes, kernel_size=kernel_size)
    channels = _sizes("channels", channels)
    if not channels:
        raise ValueError("channels must name at least one convolution, got (); use mlp for a model without any")
    smallest = 2 ** len(channels)

    def check(shape):
        _check_images(shape)
        if min(shape[1:3]) < smallest:
            raise ValueError(
                f"images of {shape[1]}×{shape[2]} pixels cannot be halved {len(channels)} times; "
                f"use at least {smallest}×{smallest} pixels or fewer entries in channels={channels}"
            )

    module = _Classifier(int(num_classes), channels, int(kernel_size), _sizes("hidden", hidden))
    return _checked(from_linen(module), check)


def resnet18(num_classes: int, width: int = 64, groups: int = 2) -> Model:
    """ResNet-18 for small images such as CIFAR's, with GroupNorm: 11 million parameters.

    3×3 stem without pooling; four stages of two basic blocks, of width, 2·width, 4·width and 8·width channels, each
    but the first at half the resolution of the one before; mean over pixels; dense layer. Basic block:

    y = ReLU(s(x) + GN(W₂ * ReLU(GN(W₁ * x)))), where s is the identity or, where shapes differ, GN(1×1 convolution).

    BatchNorm stands where GroupNorm does in the paper: its statistics are no parameters, and those of clients differ.

    Args:
      num_classes: number of logits.
      width: channels of the first stage.
      groups: of every GroupNorm, a divisor of ``width``; two as in Reddi et al.

    Returns:
      ``Model``: inputs (batch, height, width, channels); outputs (batch, num_classes).

    Raises:
      ValueError: a size is no integer ≥ 1, ``groups`` does not divide ``width``; from ``init`` and ``apply``, inputs of
        another rank.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fedhyper_jax.models import resnet18
      >>> params = jax.eval_shape(resnet18(10).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      >>> print(sum(leaf.size for leaf in jax.tree.leaves(params)))
      11173962

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv 1512.03385; GroupNorm in its
      place: Hsieh et al., "The Non-IID Data Quagmire of Decentralized Machine Learning", ICML 2020, arXiv 1910.00189;
      two groups: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295.
    """
    _validate.positive_integer(num_classes=num_classes, width=width, groups=groups)
    if width % groups:
        raise ValueError(f"groups must divide width, got groups={groups} and width={width}; e.g. groups=2, width=64")
    return _checked(from_linen(_ResNet(int(num_classes), int(width), int(groups), (2, 2, 2, 2))), _check_images)


def _check_text(shape):
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(
            f"inputs must be integers (batch, length), got shape {shape}; give one sequence its batch axis with x[None]"
        )


def char_lstm(vocabulary: int = 80, embedding: int = 8, hidden: int = 256, layers: int = 2) -> Model:
    """Next-character model: embedding, LSTM layers, and logits over the vocabulary at every position.

    h⁰_t = E[x_t], h^l_t = LSTM_l(h^{l−1}_t, h^l_{t−1}), f(x)_t = h^L_t W + b. ``cross_entropy`` and
    ``classification`` take the mean over positions, so an example is a sequence.

    E is normal with variance 1/embedding, recurrent kernels are orthogonal, kernels towards the gates truncated normal
    with variance 1/fan-in: flax's own. Parameters are float32.

    Args:
      vocabulary: number of characters, which are the integers below it; an integer out of range gives NaN.
      embedding: size of a character's vector.
      hidden: size of each LSTM layer.
      layers: number of LSTM layers.

    Returns:
      ``Model``: inputs (batch, length) of integers; outputs (batch, length, vocabulary).

    Raises:
      ValueError: a size is no integer ≥ 1; from ``init`` and ``apply``, inputs of another rank or no integers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fedhyper_jax.models import char_lstm
      >>> params = jax.eval_shape(char_lstm(90).init, jax.random.key(0), jnp.zeros((1, 80), jnp.int32))
      >>> print(sum(leaf.size for leaf in jax.tree.leaves(params)))  # as in Reddi et al.
      820522

    Reference: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
      2017, arXiv 1602.05629; Reddi et al., "Adaptive Federated Optimization", ICLR 2021, arXiv 2003.00295.
    """
    _validate.positive_integer(vocabulary=vocabulary, embedding=embedding, hidden=hidden, layers=layers)
    module = _CharLSTM(int(vocabulary), int(embedding), int(hidden), int(layers))
    return _checked(from_linen(module), _check_text)


MODELS: dict[str, Callable[..., Model]] = {
    "logistic": logistic,
    "mlp": mlp,
    "cnn": cnn,
    "resnet18": resnet18,
    "char_lstm": char_lstm,
}
"""Factories of the built-in models by name; each takes ``num_classes`` (`char_lstm`: ``vocabulary``) and settings."""


def make_model(name: str, num_classes: int, **settings: Any) -> Model:
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
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 784)))
      >>> print(sorted(params))
      ['dense_0', 'dense_1', 'dense_2']
    """
    _validate.one_of(MODELS, name=name)
    known = list(inspect.signature(MODELS[name]).parameters)[1:]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(
            f"model {name!r} has no setting {', '.join(unknown)}; {_validate.instead_of(unknown[0], known)}"
        )
    return MODELS[name](num_classes, **settings)
