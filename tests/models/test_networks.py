"""Built-in models: sizes, initialisation, dtypes, the same network by plain means, errors, the registry."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fedhyper_jax import losses, metrics
from fedhyper_jax.models import MODELS, char_lstm, cnn, from_linen, logistic, make_model, mlp, networks, resnet18
from tests.helpers import cases, product, some_params

IMAGES = (2, 28, 28, 1)
TEXT = (2, 7)
SLOW = ("resnet18",)
"""Initialised by the same adapter as the CNN, and its 62 parameters take long to compile one by one."""
SMALL = {"resnet18": {"width": 4}, "char_lstm": {"hidden": 6, "layers": 1}, "cnn": {"hidden": (64,)}}


def small(name):
    """The model of that name, its inputs' shape, and their dtype."""
    model = make_model(name, 10, **SMALL.get(name, {}))
    return (model, TEXT, jnp.int32) if name == "char_lstm" else (model, IMAGES, jnp.float32)


def init_shapes(model, shape=IMAGES, dtype=jnp.float32):
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))


@functools.cache
def initialised(name, seed=0):
    """Parameters of the small model of that name, compiled once for all seeds."""
    return jax.device_get(compiled_init(name)(jax.random.key(seed)))


@functools.cache
def compiled_init(name):
    model, shape, dtype = small(name)
    return jax.jit(lambda key: model.init(key, jnp.zeros(shape, dtype)))


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


def norms(channels):
    return 2 * channels


def stage(inputs, outputs):
    """Two blocks of two 3×3 convolutions, the first with a 1×1 one around where channels change."""
    shortcut = inputs * outputs + norms(outputs) if inputs != outputs else 0
    return 9 * inputs * outputs + 3 * 9 * outputs**2 + 4 * norms(outputs) + shortcut


@pytest.mark.parametrize("width", [product(4), 64])
def test_parameters_of_resnet18(width):
    model, images = resnet18(10, width=width), jnp.zeros((2, 32, 32, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    expected = 27 * width + norms(width) + sum(stage(*pair) for pair in itertools.pairwise(widths)) + 80 * width + 10
    assert size(params) == expected
    assert width != 64 or expected == 11_173_962  # the usual ResNet-18 for CIFAR
    assert jax.eval_shape(model.apply, params, images).shape == (2, 10)


def lstm_size(inputs, hidden):
    return 4 * ((inputs + hidden) * hidden + hidden)


@pytest.mark.parametrize(
    ("settings", "sizes"), [({}, (80, 8, 256, 2)), ({"embedding": 3, "layers": 1}, (80, 3, 256, 1))]
)
def test_parameters_of_char_lstm(settings, sizes):
    vocabulary, embedding, hidden, layers = sizes
    model, text = char_lstm(**settings), jnp.zeros(TEXT, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), text)
    lstms = lstm_size(embedding, hidden) + (layers - 1) * lstm_size(hidden, hidden)
    assert size(params) == vocabulary * embedding + lstms + (hidden + 1) * vocabulary
    assert jax.eval_shape(model.apply, params, text).shape == (*TEXT, vocabulary)


def test_colour_images_and_sizes_that_do_not_halve():
    params = jax.eval_shape(cnn(10).init, jax.random.key(0), jnp.zeros((1, 31, 17, 3)))
    assert jax.eval_shape(cnn(10).apply, params, jnp.zeros((2, 31, 17, 3))).shape == (2, 10)


def test_weights_have_variance_one_over_fan_in_and_are_not_truncated():
    params = initialised("cnn", seed=1)
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


# The CNN is made by an adapter as the ResNet is, the MLP by hand as logistic regression is.
@pytest.mark.parametrize("name", cases(MODELS, later=(*SLOW, "logistic", "char_lstm")))
def test_init_depends_on_the_key_and_the_shapes_only(name):
    model, shape, dtype = small(name)
    programs = {
        str(jax.make_jaxpr(functools.partial(model.init, inputs=inputs))(jax.random.key(0)))
        for inputs in (np.zeros(shape, dtype), np.ones(shape, dtype), jax.ShapeDtypeStruct(shape, dtype))
    }
    assert len(programs) == 1  # the last has no numbers to read
    first = initialised(name)
    eager = model.init(jax.random.key(0), np.zeros(shape, dtype))
    of_more = model.init(jax.random.key(0), jax.ShapeDtypeStruct((64, *shape[1:]), dtype))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, eager, of_more)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), eager, first)
    assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, first, initialised(name, seed=1))))


@pytest.mark.parametrize("name", cases(MODELS, later=(*SLOW, "logistic", "char_lstm")))
def test_vmapped_init_for_a_sweep_over_seeds(name):
    model, shape, dtype = small(name)
    inputs = jnp.zeros(shape, dtype)
    many = jax.eval_shape(jax.vmap(model.init, (0, None)), jax.random.split(jax.random.key(0), 3), inputs)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(many)} == {3}
    assert size(many) == 3 * size(jax.eval_shape(model.init, jax.random.key(0), inputs))


IMAGE_MODELS = [name for name in MODELS if name != "char_lstm"]


@pytest.mark.parametrize("name", cases(IMAGE_MODELS, later=SLOW))
def test_parameters_follow_the_inputs_dtype(name):
    model = small(name)[0]
    with jax.enable_x64(True):
        for inputs, expected in [(jnp.float64, jnp.float64), (jnp.float32, jnp.float32), (jnp.uint8, jnp.float32)]:
            images = jax.ShapeDtypeStruct(IMAGES, inputs)
            params = jax.eval_shape(model.init, jax.random.key(0), images)
            assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(expected)}
            assert jax.eval_shape(model.apply, params, images).dtype == expected


@pytest.mark.parametrize("name", cases(IMAGE_MODELS, later=(*SLOW, "logistic")))
def test_integer_images_are_not_scaled(name):
    model, pixels = small(name)[0], np.random.default_rng(0).integers(0, 256, IMAGES).astype(np.uint8)
    both = jax.jit(lambda params, x: (model.apply(params, x), model.apply(params, x.astype(jnp.float32))))
    np.testing.assert_array_equal(*both(initialised(name), pixels))


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
        x = np.random.default_rng(0).normal(size=(3, 9, 8, 2))
        params = some_params(model.init, x)

        @jax.jit
        def both(params):
            applies = (model.apply, plain_cnn)
            return [jax.value_and_grad(lambda p, f=f: jnp.sum(jnp.sin(f(p, x))))(params) for f in applies]

        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), *both(params))


def test_mlp_is_the_plain_network():
    model, x = mlp(3, hidden=(4,)), np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    params = some_params(model.init, x)
    first, last = params["dense_0"], params["dense_1"]
    h = np.maximum(x.reshape(5, 6) @ first["kernel"] + first["bias"], 0)
    np.testing.assert_allclose(jax.jit(model.apply)(params, x), h @ last["kernel"] + last["bias"], rtol=1e-5, atol=1e-6)


def plain_block(params, x, stride):
    def norm(x, name):
        groups = x.reshape(*x.shape[:3], 2, -1)
        mean, variance = groups.mean((1, 2, 4), keepdims=True), groups.var((1, 2, 4), keepdims=True)
        return ((groups - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape) * params[name]["scale"] + params[name][
            "bias"
        ]

    def conv(x, name, stride, pad):
        dimensions = ("NHWC", "HWIO", "NHWC")
        kernel, pads = params[name]["kernel"], ((pad, pad),) * 2
        return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=dimensions)

    y = norm(conv(jax.nn.relu(norm(conv(x, "conv_0", stride, 1), "norm_0")), "conv_1", 1, 1), "norm_1")
    return jax.nn.relu(y + (norm(conv(x, "conv_shortcut", stride, 0), "norm_shortcut") if stride == 2 else x))


@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 2)])
def test_a_block_of_resnet18_is_the_plain_one_in_value_and_gradient(channels, stride):
    with jax.enable_x64(True):
        block, x = networks._Block(channels, stride, 2), np.random.default_rng(0).normal(size=(2, 6, 5, 4))
        params = some_params(block.init, x)["params"]
        applies = (lambda p: block.apply({"params": p}, x), lambda p: plain_block(p, jnp.asarray(x), stride))

        @jax.jit
        def both(params):
            return [jax.value_and_grad(lambda p, f=f: jnp.sum(jnp.sin(f(p))))(params) for f in applies]

        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), *both(params))


def finite_everywhere(gradient):
    return all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(gradient)))


def test_gradients_of_a_resnet_are_finite_and_reach_every_parameter():
    model = from_linen(networks._ResNet(10, 4, 2, (1, 1)))  # two stages of one block compile faster than four of two
    images = np.random.default_rng(0).integers(0, 10, (2, 5, 4, 3)).astype(np.float32)
    batch = {"x": images, "y": np.arange(2)}
    gradient = jax.jit(jax.grad(lambda p: losses.cross_entropy(model)(p, batch).mean()))
    assert finite_everywhere(gradient(some_params(model.init, images)))


@pytest.fixture(scope="module")
def of_text():
    """A model of text: (params, batch) -> logits, losses, what is measured, and the gradient of the mean loss."""
    model = small("char_lstm")[0]

    def everything(params, batch):
        def mean(params):
            values = losses.cross_entropy(model)(params, batch)
            return values.mean(), values

        gradient, values = jax.grad(mean, has_aux=True)(params)
        return model.apply(params, batch["x"]), values, metrics.classification(model)(params, batch), gradient

    params = some_params(model.init, np.zeros((3, 7), np.int32))
    return functools.partial(jax.jit(everything), params)


@pytest.fixture(scope="module")
def texts():
    text = np.random.default_rng(0).integers(0, 10, (3, 8)).astype(np.int32)
    return {"x": text[:, :-1], "y": text[:, 1:]}


def test_the_loss_of_a_sequence_is_the_mean_over_its_positions(of_text, texts):
    logits, loss, values, _ = jax.device_get(of_text(texts))
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_softmax, texts["y"][..., None], 2)[..., 0].mean(1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(values["accuracy"], (logits.argmax(-1) == texts["y"]).mean(1), rtol=1e-6)


def test_gradients_of_an_lstm_are_finite_and_reach_every_parameter(of_text, texts):
    assert finite_everywhere(of_text(texts)[-1])


def test_later_characters_change_no_earlier_logits(of_text, texts):
    other = {**texts, "x": texts["x"].copy()}
    other["x"][:, 4] = (other["x"][:, 4] + 1) % 10
    changed = np.asarray(of_text(texts)[0]) != np.asarray(of_text(other)[0])
    assert not changed[:, :4].any() and changed[:, 4:].any(-1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resnet18(10, width=7), "groups must divide width"),
        (lambda: resnet18(10, groups=0), "groups must"),
        (lambda: init_shapes(resnet18(10), (2, 28, 28)), "give grey images their channel axis"),
        (lambda: char_lstm(layers=0), "layers"),
        (lambda: init_shapes(char_lstm(), (7,), jnp.int32), "inputs must be integers"),
        (lambda: init_shapes(char_lstm(), (2, 7), jnp.float32), "integer"),
        (lambda: make_model("char_lstm", 10, width=3), "known: embedding, hidden, layers"),
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
        (lambda: init_shapes(cnn(10), (2, 28, 28)), "give grey images their channel axis"),
        (lambda: init_shapes(cnn(10), (2, 784)), "batch, height, width, channels"),
        (lambda: init_shapes(cnn(10), (2, 3, 28, 1)), "cannot be halved 2 times"),
        (lambda: cnn(10).apply({}, jnp.zeros((28, 28, 1))), "batch axis"),
        (lambda: init_shapes(mlp(10), (784,)), "batch, features"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
