"""Per-example metrics and the merge-able statistic that averages them over batches, clients and devices."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedhyper_jax.base import Batch, Model, Params
from fedhyper_jax.tasks.losses import (
    label_check,
    labels_that_count,
    mean_over_positions,
    softmax_cross_entropy,
    squared_distance,
)


class Mean(NamedTuple):
    """A weighted mean that can be merged: ``merge(zero, m) = m``, and merging is associative and commutative.

    Attributes:
      total: the sum of values times weights.
      weight: the sum of weights.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def zero(cls) -> "Mean":
        """The identity of `merge`."""
        return cls(jnp.zeros(()), jnp.zeros(()))

    @classmethod
    def of(cls, values: Float[Array, " batch"], mask: Bool[Array, " batch"]) -> "Mean":
        """The mean of the values where ``mask`` holds."""
        return cls(jnp.sum(jnp.where(mask, values, 0.0)), jnp.sum(mask).astype(values.dtype))

    def merge(self, other: "Mean") -> "Mean":
        """The mean over both sets of values."""
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> Float[Array, ""]:
        """The mean; NaN of nothing."""
        return self.total / self.weight


MetricsFunction = Callable[[Params, Batch], Mapping[str, Float[Array, " batch"] | Mean]]
"""``metrics_fn(params, batch)``: named values, one per example.

Where examples do not count alike, a metric is a `Mean` of two such arrays: weights, and values times weights. A weight
of 0 leaves the example out.
"""


def classification(model: Model, *, ignore: int | None = None) -> MetricsFunction:
    """Accuracy (0 or 1) and cross-entropy of each example; of a sequence, the means over its positions.

    Args:
      model: a classifier, as for `losses.cross_entropy`.
      ignore: a label that stands for none: such positions do not count, nor do examples that have no other.

    Example:
      >>> import jax.numpy as jnp
      >>> model = Model(init=None, apply=lambda params, x: x)
      >>> batch = {"x": jnp.array([[2.0, 0.0], [2.0, 0.0]]), "y": jnp.array([0, 1])}
      >>> classification(model)(None, batch)["accuracy"].tolist()
      [1.0, 0.0]
    """
    check = label_check(model, ignore)

    def metrics_fn(params, batch):
        logits, labels = model.apply(params, batch["x"]), batch["y"]
        cross_entropy = softmax_cross_entropy(logits, labels)
        # Diverged parameters give NaN logits, whose argmax is 0: a right answer for a tenth of the examples. Not here.
        right = (jnp.argmax(logits, axis=-1) == labels) & jnp.all(jnp.isfinite(logits), axis=-1)
        counts = labels_that_count(labels, ignore)
        values = {
            "accuracy": mean_over_positions(right.astype(jnp.float32), counts),
            "loss": mean_over_positions(cross_entropy, counts),
        }
        if counts is None:
            return values
        weight = jnp.any(counts, axis=tuple(range(1, counts.ndim)))
        return {name: Mean(value, weight.astype(value.dtype)) for name, value in values.items()}

    metrics_fn.check = check
    return metrics_fn


def regression(model: Model) -> MetricsFunction:
    """Squared error of each example, summed over its outputs, and half of it, the loss of `losses.squared_error`.

    Example:
      >>> import jax.numpy as jnp
      >>> model = Model(init=None, apply=lambda params, x: x)
      >>> batch = {"x": jnp.array([[2.0], [0.0]]), "y": jnp.array([[1.0], [3.0]])}
      >>> regression(model)(None, batch)["squared_error"].tolist()
      [1.0, 9.0]
    """

    def metrics_fn(params, batch):
        error = squared_distance(model.apply(params, batch["x"]), batch["y"])
        return {"squared_error": error, "loss": 0.5 * error}

    return metrics_fn
