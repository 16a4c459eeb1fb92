"""The layers against flax's own: parameters, values, gradients, loops of clients, and what they leave to flax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from fedhyper_jax import models
from fedhyper_jax.models import forms
from tests.helpers import cases, product, some_params

IMAGES, SEQUENCES = (2, 6, 5, 4), (2, 4, 3)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def close(a, b, rtol=1e-9):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol), a, b)


def lstm(rnn, cell=linen.OptimizedLSTMCell, features=5, **settings):
    return lambda **own: rnn(cell(features, **own), **settings)


def conv(**settings):
    return [functools.partial(layer.Conv, 6, **({"kernel_size": (3, 3)} | settings)) for layer in (models, linen)]


def norm(**settings):
    return [functools.partial(layer.GroupNorm, **settings) for layer in (models, linen)]


def rnn(*args, **settings):
    return [lstm(layer.RNN, *args, **settings) for layer in (models, linen)]


# Both layers, shape of the inputs, and whether ours computes (or leaves it to flax's own).
CASES = {
    "conv": (conv(), IMAGES, True),
    "conv strides": (conv(strides=2, padding="VALID"), IMAGES, True),
    "conv pairs": (conv(strides=(1, 2), padding=((2, 0), (1, 3)), kernel_dilation=(2, 1)), IMAGES, True),
    "conv int padding": (conv(padding=2, kernel_dilation=2, use_bias=False), IMAGES, True),
    "conv groups": (conv(feature_group_count=2, padding=[1, 0]), IMAGES, True),
    "conv circular": (conv(padding="CIRCULAR"), IMAGES, True),
    "conv mask": (conv(mask=np.tri(3)[:, :, None, None] * np.ones((1, 1, 4, 6))), IMAGES, True),
    "conv grey": (conv(), (2, 5, 5, 1), True),
    "conv batches": (conv(), (2, 3, 5, 5, 4), True),
    "conv one example": (conv(), (5, 5, 4), True),
    "conv sequence": (conv(kernel_size=(3,), padding="CAUSAL"), (2, 6, 4), False),
    "conv transposed": (conv(input_dilation=2, padding=1), IMAGES, False),
    "norm": (norm(num_groups=2), IMAGES, True),
    "norm sizes": (norm(num_groups=None, group_size=1, epsilon=1e-3), IMAGES, True),
    "norm plain": (norm(num_groups=4, use_bias=False, use_scale=False), (3, 8), True),
    "norm exact": (norm(num_groups=2, use_fast_variance=False), IMAGES, False),
    "norm axes": (norm(num_groups=2, reduction_axes=(1, 3)), IMAGES, False),
    "rnn": (rnn(), SEQUENCES, True),
    "rnn cell": (rnn(linen.LSTMCell), SEQUENCES, True),
    "rnn batches": (rnn(return_carry=True), (2, 3, 4, 3), True),
    "rnn no batch": (rnn(), (4, 3), True),
    "rnn time major": (rnn(time_major=True, reverse=True), SEQUENCES, True),
    "rnn backwards": (rnn(reverse=True, keep_order=True, return_carry=True), SEQUENCES, True),
    "rnn unrolled": (rnn(unroll=2), SEQUENCES, False),
    "rnn of another cell": (rnn(linen.GRUCell), SEQUENCES, False),
}


def loss(layer, params, x):
    leaves = jax.tree.leaves(layer.apply({"params": params}, x))
    return sum(jnp.sum(jnp.sin(y) * (np.arange(1, y.size + 1).reshape(y.shape) / y.size)) for y in leaves)


KINDS = ("conv pairs", "conv groups", "conv mask", "norm sizes", "rnn backwards")


# Of each layer those that use most of its settings at once.
@pytest.mark.parametrize("case", cases([case for case in CASES if CASES[case][2]], later=set(CASES) - set(KINDS)))
def test_parameters_values_and_gradients_are_those_of_flax(case):
    """Of what flax computes itself, the programs are the same: the test below."""
    factories, shape, _ = CASES[case]
    layers = [factory(param_dtype=jnp.float64) for factory in factories]
    x = normal(0, *shape)
    if len({init_program(layer, x) for layer in layers}) > 1:  # the same program gives the same parameters
        params, expected = jax.jit(lambda: [layer.init(jax.random.key(0), x).get("params", {}) for layer in layers])()
        close(params, expected, rtol=0)
    params = some_params(layers[1].init, x).get("params", {})

    @jax.jit
    def both(params, x):
        gradient = jax.value_and_grad(loss, argnums=(1, 2))
        return [(layer.apply({"params": params}, x), gradient(layer, params, x)) for layer in layers]

    close(*jax.device_get(both(params, x)))


def init_program(layer, x):
    return str(jax.make_jaxpr(layer.init)(jax.random.key(0), x))


def gradient_program(layer, params, x):
    return str(jax.make_jaxpr(jax.grad(functools.partial(loss, layer), argnums=(0, 1)))(params, x))


@pytest.mark.parametrize("case", CASES)
def test_who_computes(case):
    factories, shape, is_ours = CASES[case]
    ours, theirs = (factory(param_dtype=jnp.float64) for factory in factories)
    x = np.zeros(shape)
    params = some_params(theirs.init, x).get("params", {})
    assert (gradient_program(ours, params, x) != gradient_program(theirs, params, x)) == is_ours
    assert is_ours or init_program(ours, x) == init_program(theirs, x)


@pytest.mark.parametrize("case", ["norm", "rnn"])
def test_other_platforms_get_what_flax_computes(case, monkeypatch):
    monkeypatch.setitem(forms.FORMS, "cpu", forms.FORMS["cpu"]._replace(norm="flax", rnn="flax"))
    (ours, theirs), shape, _ = CASES[case]
    x = np.zeros(shape, np.float32)
    params = some_params(theirs().init, x)["params"]
    assert init_program(ours(), x) == init_program(theirs(), x)
    assert gradient_program(ours(), params, x) == gradient_program(theirs(), params, x)


class Net(linen.Module):
    """A user's model, with the layers of either library."""

    layers: object

    @linen.compact
    def __call__(self, x):
        x = self.layers.Conv(4, (3, 3))(x)
        x = linen.relu(self.layers.GroupNorm(num_groups=2)(x))
        x = self.layers.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = self.layers.Conv(4, (3, 3), strides=(2, 2), use_bias=False)(x)
        x = self.layers.avg_pool(self.layers.LayerNorm()(x), (2, 2), padding="SAME")
        x = self.layers.RNN(linen.OptimizedLSTMCell(3, param_dtype=jnp.float64))(x.reshape(x.shape[0], -1, 4))
        return linen.Dense(2)(x[:, -1] + self.layers.Embed(3, 3)(jnp.arange(x.shape[0]) % 3))


def trained(net, params, batches):
    """vmap over clients, each a scan over steps of its own parameters."""

    def client(params, batches):
        def step(params, x):
            value, gradient = jax.value_and_grad(functools.partial(loss, net))(params, x)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

        return lax.scan(step, params, batches)

    return jax.jit(jax.vmap(client, (None, 0)))(params, batches)


@pytest.mark.product  # the guide (layers.md) has a whole network; gradients are compared layer by layer above
def test_changing_the_imports_of_a_model_changes_no_result():
    ours, theirs = Net(models), Net(linen)
    batches = normal(0, 2, 3, 2, 6, 6, 3)  # clients, steps, batch, image
    params, expected = (jax.jit(net.init)(jax.random.key(0), batches[0, 0])["params"] for net in (ours, theirs))
    close(params, expected, rtol=0)
    assert "Conv_1" in params and "OptimizedLSTMCell_0" in params
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    close(trained(ours, params, batches), trained(theirs, params, batches))


def test_dtypes_are_those_of_flax():
    x = normal(0, *IMAGES).astype(jnp.bfloat16)
    for case in ("conv", "norm"):
        for settings in ({}, {"dtype": jnp.bfloat16}):
            ours, theirs = (factory(**settings) for factory in CASES[case][0])
            params = some_params(theirs.init, x)
            y, expected = jax.jit(lambda p, x, both=(ours, theirs): [layer.apply(p, x) for layer in both])(params, x)
            assert y.dtype == expected.dtype
            np.testing.assert_allclose(y.astype(float), expected.astype(float), rtol=0.02, atol=0.02)
    ours, theirs = (factory(dtype=jnp.bfloat16) for factory in CASES["rnn"][0])
    x = normal(0, *SEQUENCES).astype(np.float32)
    params = some_params(theirs.init, x)
    np.testing.assert_array_equal(*jax.jit(lambda p: [layer.apply(p, x) for layer in (ours, theirs)])(params))


def test_carries_and_lengths_of_sequences():
    ours, theirs = (factory(param_dtype=jnp.float64) for factory in rnn(return_carry=True))
    x, carry = normal(0, *SEQUENCES), (normal(1, 2, 5), normal(2, 2, 5))
    params = some_params(theirs.init, x)
    several = {"initial_carry": carry}, {"seq_lengths": np.array([2, 4])}, {"init_key": jax.random.key(1)}

    @jax.jit
    def given(carry):
        def of(layer):
            towards_carry = jax.grad(lambda c: jnp.sum(jnp.sin(layer.apply(params, x, initial_carry=c)[0][0])))
            return [layer.apply(params, x, **settings) for settings in several], towards_carry(carry)

        return of(ours), of(theirs)

    close(*jax.device_get(given(carry)))


@pytest.mark.product  # nothing here asks for one
@pytest.mark.parametrize("case", ["norm", "rnn"])
def test_gradient_of_a_gradient(case):
    (ours, theirs), shape, _ = CASES[case]
    x = normal(0, *shape)
    params = some_params(theirs(param_dtype=jnp.float64).init, x)["params"]

    def curvature(layer):
        gradient = jax.grad(functools.partial(loss, layer))
        return jax.grad(lambda p: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient(p, x))))(params)

    close(curvature(ours(param_dtype=jnp.float64)), curvature(theirs(param_dtype=jnp.float64)))


@pytest.mark.parametrize("case", ["conv", *(product(c) for c in ("norm", "rnn"))])
def test_shared_parameters_and_sharded_examples(case):
    (ours, _), shape, _ = CASES[case]
    layer, x = ours(param_dtype=jnp.float64), normal(0, *shape)
    params = some_params(layer.init, x)["params"]
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(AxisType.Auto,))
    gradient = jax.grad(functools.partial(loss, layer))
    specs = (PartitionSpec(), PartitionSpec("clients"))
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    close(*jax.device_get(jax.jit(lambda *given: (sharded(*given), gradient(*given)))(params, x)))


def test_no_convolution_is_left_that_is_slow_in_loops():
    x = np.zeros((2, 8, 8, 4))
    layer = conv(strides=2)[0]()
    params = some_params(layer.init, x)["params"]
    text = jax.jit(jax.grad(functools.partial(loss, layer))).lower(params, x).as_text()
    assert text.count("stablehlo.convolution") == text.count("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]") > 0


def test_errors():
    def shapes(layer, shape):
        jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))

    with pytest.raises(ValueError, match="does not fit"):
        shapes(conv(padding="VALID")[0](), (1, 2, 2, 1))
    with pytest.raises(ValueError, match="padding"):
        shapes(conv(padding="same")[0](), IMAGES)
    with pytest.raises(ValueError, match="group"):
        shapes(models.GroupNorm(num_groups=3), IMAGES)
