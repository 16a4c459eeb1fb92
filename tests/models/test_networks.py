"""Built-in models: sizes, initialisation, dtypes, the same network by plain means, errors, the registry."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedhyper_jax.models import MODELS, cnn, logistic, make_model, mlp

IMAGES = (2, 28, 28, 1)


def initialised(model, shape=IMAGES, dtype=jnp.float32, seed=0):
    return model.init(jax.random.key(seed), jnp.zeros(shape, dtype))


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (logistic(10), 7_850),
        (mlp(10), 50_890),
        (mlp(3, hidden=(20, 5)), 785 * 20 + 21 * 5 + 6 * 3),
        (cnn(10), 28_938),
        (cnn(10, hidden=(64,)), 416 + 12_832 + 1569 * 64 + 65 * 10),
        (cnn(4, channels=(3,), kernel_size=3), 30 + (14 * 14 * 3 + 1) * 4),
    ],
)
def test_parameters_and_output_shape(model, expected):
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(IMAGES))
    assert size(params) == expected
    classes = jax.tree.leaves(params)[-1].shape[-1]
    assert jax.eval_shape(model.apply, params, jnp.zeros((5, 28, 28, 1))).shape == (5, classes)


def test_colour_images_and_sizes_that_do_not_halve():
    params = jax.eval_shape(cnn(10).init, jax.random.key(0), jnp.zeros((1, 31, 17, 3)))
    assert jax.eval_shape(cnn(10).apply, params, jnp.zeros((2, 31, 17, 3))).shape == (2, 10)


def test_weights_have_variance_one_over_fan_in_and_are_not_truncated():
    params = initialised(cnn(10, channels=(64, 128), hidden=(256,)), seed=1)
    for name, weights in [(f"conv_{i}_kernel", params[f"conv_{i}_kernel"]) for i in range(2)] + [
        (f"dense_{i}", params[f"dense_{i}"]["kernel"]) for i in range(2)
    ]:
        fan_in, n = int(np.prod(weights.shape[:-1])), weights.size
        scaled = np.asarray(weights).ravel() * np.sqrt(fan_in)
        # Standard errors of mean, variance and fourth moment of n normals: 1, √2, √96, over √n.
        assert abs(scaled.mean()) < 5 / np.sqrt(n), name
        assert abs(scaled.var() - 1) < 5 * np.sqrt(2 / n), name
        # The normal's fourth moment is 3; cut at two standard deviations and rescaled it would be 2.4.
        assert abs((scaled**4).mean() - 3) < 5 * np.sqrt(96 / n), name
    assert not any(params[f"conv_{i}_bias"].any() or params[f"dense_{i}"]["bias"].any() for i in range(2))


@pytest.mark.parametrize("name", MODELS)
def test_init_depends_on_the_key_and_the_shapes_only(name):
    model = make_model(name, 10)
    first, again = initialised(model), model.init(jax.random.key(0), jnp.full(IMAGES, jnp.nan))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, first, again)))
    shapes_only = model.init(jax.random.key(0), jax.ShapeDtypeStruct((64, *IMAGES[1:]), jnp.float32))
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, first, shapes_only)))
    jitted = jax.jit(model.init)(jax.random.key(0), jnp.zeros(IMAGES))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), first, jitted)
    other = initialised(model, seed=1)
    assert not jnp.array_equal(jax.tree.leaves(first)[-1], jax.tree.leaves(other)[-1])


@pytest.mark.parametrize("name", MODELS)
def test_vmapped_init_for_a_sweep_over_seeds(name):
    model = make_model(name, 10)
    many = jax.jit(jax.vmap(model.init, (0, None)))(jax.random.split(jax.random.key(0), 3), jnp.zeros(IMAGES))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(many)} == {3}
    assert size(many) == 3 * size(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(IMAGES)))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_follow_the_inputs_dtype(name):
    model = make_model(name, 10)
    with jax.enable_x64(True):
        for inputs, expected in [(jnp.float64, jnp.float64), (jnp.float32, jnp.float32), (jnp.uint8, jnp.float32)]:
            images = jax.ShapeDtypeStruct(IMAGES, inputs)
            params = jax.eval_shape(model.init, jax.random.key(0), images)
            assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(expected)}
            assert jax.eval_shape(model.apply, params, images).dtype == expected


@pytest.mark.parametrize("name", MODELS)
def test_integer_images_are_not_scaled(name):
    model, pixels = make_model(name, 10), np.random.default_rng(0).integers(0, 256, IMAGES).astype(np.uint8)
    params = initialised(model, dtype=jnp.uint8)
    np.testing.assert_array_equal(model.apply(params, pixels), model.apply(params, pixels.astype(np.float32)))


def plain_cnn(params, x):
    for i in range(2):
        dimensions = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, params[f"conv_{i}_kernel"], (1, 1), "SAME", dimension_numbers=dimensions)
        y = jax.nn.relu(y + params[f"conv_{i}_bias"])
        x = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(x.shape[0], -1) @ params["dense_0"]["kernel"] + params["dense_0"]["bias"]
    return jax.nn.relu(x) @ params["dense_1"]["kernel"] + params["dense_1"]["bias"]


def test_cnn_is_the_plain_network_in_value_and_gradient():
    with jax.enable_x64(True):
        model = cnn(3, channels=(4, 5), kernel_size=3, hidden=(7,))
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9, 8, 2)))
        params = model.init(jax.random.key(0), x)
        params = jax.tree.map(lambda leaf: leaf + 0.1, params)
        values = [
            jax.value_and_grad(lambda p, f=f: jnp.sum(jnp.sin(f(p, x))))(params) for f in (model.apply, plain_cnn)
        ]
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), *values)


def test_mlp_is_the_plain_network():
    model, x = mlp(3, hidden=(4,)), jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 3)), jnp.float32)
    params = model.init(jax.random.key(0), x)
    first, last = params["dense_0"], params["dense_1"]
    h = np.maximum(x.reshape(5, 6) @ first["kernel"] + first["bias"], 0)
    np.testing.assert_allclose(model.apply(params, x), h @ last["kernel"] + last["bias"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: logistic(0), "num_classes"),
        (lambda: mlp(10, hidden=64), "hidden must be a sequence"),
        (lambda: mlp(10, hidden=(64, 0)), r"hidden\[1\]"),
        (lambda: cnn(10.0), "num_classes"),
        (lambda: cnn(10, channels=()), "channels"),
        (lambda: cnn(10, channels=(16, -1)), r"channels\[1\]"),
        (lambda: cnn(10, kernel_size=2.5), "kernel_size"),
        (lambda: make_model("resnet152", 10), "known: logistic, mlp, cnn"),
        (lambda: make_model("mlp", 10, width=3), "no setting width; known: hidden"),
        (lambda: make_model("logistic", 10, width=3), "known: none"),
        (lambda: initialised(cnn(10), (2, 28, 28)), "give grey images their channel axis"),
        (lambda: initialised(cnn(10), (2, 784)), "batch, height, width, channels"),
        (lambda: initialised(cnn(10), (2, 3, 28, 1)), "cannot be halved 2 times"),
        (lambda: cnn(10).apply(initialised(cnn(10)), jnp.zeros((28, 28, 1))), "batch axis"),
        (lambda: initialised(mlp(10), (784,)), "batch, features"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
