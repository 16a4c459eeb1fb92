"""Losses against optax's, and where theirs answers wrongly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax.base import Model
from fedhyper_jax.tasks import losses

THEIRS = optax.losses.softmax_cross_entropy_with_integer_labels


@pytest.mark.parametrize("shape", [(6,), (4, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cross_entropy_and_its_gradient_are_optax_own(shape, dtype, key):
    logits = (30 * jax.random.normal(key, (*shape, 5))).astype(dtype)
    labels = jax.random.randint(key, shape, 0, 5)
    ours, theirs = (
        jax.value_and_grad(lambda x, f=f: f(x, labels).sum())(logits) for f in (losses.softmax_cross_entropy, THEIRS)
    )
    np.testing.assert_array_equal(losses.softmax_cross_entropy(logits, labels), THEIRS(logits, labels))
    np.testing.assert_allclose(*(np.asarray(g, np.float32) for _, g in (ours, theirs)), rtol=1e-6, atol=1e-7)


def test_a_label_that_is_no_class_has_no_loss():
    """(optax counts −1 from the end, as Python does, and so trains on a class that nobody named)"""
    logits = jnp.array([[2.0, 0.0, 1.0]] * 4)
    model = Model(init=None, apply=lambda params, x: x + params)
    values = losses.cross_entropy(model)(jnp.zeros(3), {"x": logits, "y": jnp.array([-1, 0, 2, 3])})
    assert np.isnan(values).tolist() == [True, False, False, True]
