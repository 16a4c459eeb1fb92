"""Losses against optax's, and where theirs answers wrongly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax.base import Model
from fedhyper_jax.tasks import losses

optax_own = optax.losses.softmax_cross_entropy_with_integer_labels


@pytest.mark.parametrize("shape", [(6,), (4, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_cross_entropy_and_its_gradient(shape, dtype, tolerance, key):
    """Against the formula in float64; optax may be a unit of the largest logit off."""
    logits = (30 * jax.random.normal(key, (*shape, 5))).astype(dtype)
    labels = np.asarray(jax.random.randint(key, shape, 0, 5))
    exact = np.asarray(logits, np.float64)
    exponentials = np.exp(exact - exact.max(-1, keepdims=True))
    chances = exponentials / exponentials.sum(-1, keepdims=True)
    chosen = np.eye(5)[labels]
    expected = -np.log((chances * chosen).sum(-1))

    losses_of = losses.softmax_cross_entropy
    np.testing.assert_allclose(np.asarray(losses_of(logits, labels), float), expected, rtol=tolerance, atol=tolerance)
    gradient = jax.grad(lambda x: losses_of(x, labels).sum())(logits)
    np.testing.assert_allclose(np.asarray(gradient, float), chances - chosen, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(losses_of(logits, labels), optax_own(logits, labels), rtol=tolerance, atol=1e-5)


def test_a_label_that_is_no_class_has_no_loss():
    """(optax counts −1 from the end, as Python does, and so trains on a class that nobody named)"""
    logits = jnp.array([[2.0, 0.0, 1.0]] * 4)
    model = Model(init=None, apply=lambda params, x: x + params)
    values = losses.cross_entropy(model)(jnp.zeros(3), {"x": logits, "y": jnp.array([-1, 0, 2, 3])})
    assert np.isnan(values).tolist() == [True, False, False, True]
