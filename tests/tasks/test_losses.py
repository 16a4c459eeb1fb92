"""Losses against optax's, and where theirs answers wrongly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax.base import Model
from fedhyper_jax.tasks import losses, metrics

optax_own = optax.losses.softmax_cross_entropy_with_integer_labels


@pytest.mark.parametrize("shape", [(6,), (4, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_cross_entropy_and_its_gradient(shape, dtype, tolerance):
    """Against the formula in float64; optax may be a unit of the largest logit off."""
    rng = np.random.default_rng(0)
    logits, labels = (30 * rng.normal(size=(*shape, 5))).astype(dtype), rng.integers(0, 5, shape)
    exact = np.asarray(logits, np.float64)
    exponentials = np.exp(exact - exact.max(-1, keepdims=True))
    chances = exponentials / exponentials.sum(-1, keepdims=True)
    chosen = np.eye(5)[labels]
    expected = -np.log((chances * chosen).sum(-1))

    @jax.jit
    def given(logits):
        gradient = jax.grad(lambda x: losses.softmax_cross_entropy(x, labels).sum())(logits)
        return losses.softmax_cross_entropy(logits, labels), gradient, optax_own(logits, labels)

    values, gradient, theirs = given(logits)
    np.testing.assert_allclose(np.asarray(values, float), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.asarray(gradient, float), chances - chosen, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(values, theirs, rtol=tolerance, atol=1e-5)


def test_a_label_that_is_no_class_has_no_loss():
    """(optax counts −1 from the end, as Python does, and so trains on a class that nobody named)"""
    logits = np.array([[2.0, 0.0, 1.0]] * 4, np.float32)
    model = Model(init=None, apply=lambda params, x: x + params)
    values = jax.jit(losses.cross_entropy(model))(np.zeros(3), {"x": logits, "y": np.array([-1, 0, 2, 3])})
    assert np.isnan(values).tolist() == [True, False, False, True]


LOGITS = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
ITSELF = Model(init=None, apply=lambda params, x: x + params)


@pytest.mark.parametrize(("ignore", "dtype"), [(-1, np.int32), (-100, np.int8), (0, np.uint8), (255, np.uint8)])
def test_ignored_positions_are_left_out_of_the_mean(ignore, dtype):
    """Against the formula; an example without a label has loss 0, and no position without one has a gradient."""
    labels = np.array([[1, 2, 3], [4, 1, 1], [2, 2, 2], [3, 3, 3]])
    ignored = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]], bool)
    batch = {"x": LOGITS, "y": np.where(ignored, ignore, labels).astype(dtype)}
    exact = LOGITS.astype(float)
    entropies = np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, labels[..., None], -1)[..., 0]
    expected = [entropies[row][~ignored[row]].mean() if not ignored[row].all() else 0.0 for row in range(4)]
    loss_fn = losses.cross_entropy(ITSELF, ignore=ignore)

    @jax.jit
    def given(x):
        losses, pull_back = jax.vjp(lambda x: loss_fn(np.zeros(5), {**batch, "x": x}), x)
        return losses, pull_back(jnp.ones(4))[0]

    values, gradient = given(LOGITS)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert np.array_equal(np.any(np.asarray(gradient) != 0, axis=-1), ~ignored)


ONE = {"x": np.zeros((4, 3), np.float32)}
MANY = {"x": LOGITS}
SIXES = np.full((4, 3), 4)
SIXES[2, 1] = 5


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({**ONE, "y": np.array([0, 2, 3, 1])}, r"\['y'\] has label 3 in row 2, but the classes are 0 to 2; give the"),
        ({**ONE, "y": np.array([1, 2, 3, 1])}, "has label 3 in row 2, .* labels that begin with 1 want 1 subtracted"),
        ({**ONE, "y": np.array([0, -1, 2, 1])}, "has label -1 in row 1, .* ignore=-1 in the loss and its metrics"),
        ({**ONE, "y": np.array([0, 1, 2, 200], np.uint8)}, "has label 200 in row 3"),
        ({**MANY, "y": SIXES}, "has label 5 in row 2, position 1, but the classes are 0 to 4"),
        ({**ONE, "y": np.array([0, 1, 2, 1.0])}, r"must be integer classes of shape \(4,\), .*float.*astype\(int\)"),
        ({**ONE, "y": np.eye(3)[[0, 1, 2, 1]]}, r"got shape \(4, 3\) of float.*; use argmax\(axis=-1\) for one-hot"),
        ({**ONE, "y": np.eye(3, dtype=int)[[0, 1, 2, 1]]}, r"got shape \(4, 3\) of int.*; use argmax"),
        ({**ONE, "y": np.zeros((4, 1), int)}, r"got shape \(4, 1\) of int.*; use \[..., 0\] for a column"),
        ({**MANY, "y": np.zeros(4, int)}, r"of shape \(4, 3\), got shape \(4,\).*outputs have shape \(4, 3, 5\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(examples, message):
    """By loss and metrics alike; those of a wrong form also when the function itself is called, as in a trace."""
    params = jnp.zeros(examples["x"].shape[-1])
    for function in (losses.cross_entropy(ITSELF), metrics.classification(ITSELF)):
        with pytest.raises(ValueError, match=message):
            function.check(params, examples)
        if "has label" not in message:
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(function, params, jax.tree.map(jnp.asarray, examples))


def test_labels_that_are_classes_pass():
    """As do rows that nobody owns, labels to ignore, truth values, and labels that are known only when they run."""
    check, params = losses.cross_entropy(ITSELF).check, jnp.zeros(3)
    check(params, {**ONE, "y": np.array([0, 1, 2, 1], np.uint8)})
    check(params, {**ONE, "y": np.array([True, False, True, True])})
    check(params, {**ONE, "y": np.array([0, -1, 2, 1])}, rows=np.array([3, 0]))
    jax.eval_shape(lambda y: check(params, {**ONE, "y": y}), jnp.array([7, 7, 7, 7]))
    losses.cross_entropy(ITSELF, ignore=-1).check(params, {**ONE, "y": np.array([0, -1, 2, 1])})
    with pytest.raises(ValueError, match="has label -2 in row 1"):
        losses.cross_entropy(ITSELF, ignore=-1).check(params, {**ONE, "y": np.array([-1, -2, 2, 1])})


@pytest.mark.parametrize("ignore", [True, 0.5, "none", 2**31])
def test_what_is_no_label_cannot_be_ignored(ignore):
    for make in (losses.cross_entropy, metrics.classification):
        with pytest.raises(ValueError, match="ignore must be an integer label, got"):
            make(ITSELF, ignore=ignore)
