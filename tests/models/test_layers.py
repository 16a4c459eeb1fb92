"""`convolution`: values and gradients against lax and finite differences, vmap rules, structure of the programs."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from fedhyper_jax.models import convolution, forms, layers
from tests.helpers import product

WINDOWS = [
    ((3, 3), (1, 1), "SAME", (1, 1)),  # kernel, strides, padding, dilation
    ((5, 5), (1, 1), "SAME", (1, 1)),
    ((2, 4), (1, 1), "SAME", (1, 1)),
    ((3, 2), (1, 1), "VALID", (1, 1)),
    ((1, 1), (2, 2), "SAME", (1, 1)),
    ((3, 3), (2, 3), "SAME", (1, 1)),
    ((2, 2), (3, 2), "VALID", (1, 1)),
    ((3, 3), (1, 1), "SAME", (2, 2)),
    ((2, 3), (2, 1), "VALID", (3, 2)),
    ((3, 3), (1, 2), ((2, 0), (1, 3)), (1, 2)),
    ((2, 2), (1, 1), ((3, 4), (2, 2)), (1, 1)),  # more padding than kernel: the gradients crop
    ((3, 3), (2, 2), ((-1, 0), (0, -2)), (1, 1)),
]
# (channels, groups): up to 3 channels in one group take the im2col form.
CASES = [(4, 1, *window) for window in WINDOWS] + [(1, 1, *window) for window in WINDOWS[1::2]]
CASES += [(6, 3, *window) for window in WINDOWS[::2] + WINDOWS[-1:]]
CASES += [(channels, groups, *window) for channels, groups in [(3, 1), (4, 4)] for window in WINDOWS[5:9:3]]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def reference(x, kernel, *, strides=(1, 1), padding="SAME", dilation=(1, 1), groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def close(a, b, rtol=1e-10):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol * max(1, np.abs(v).max())), a, b)


def loss(convolve, x, kernel):
    y = convolve(x, kernel)
    return jnp.sum(jnp.sin(y) * (np.arange(1, y.size + 1).reshape(y.shape) / y.size))


def gradients(convolve):
    return jax.grad(functools.partial(loss, convolve), argnums=(0, 1))


def both(program, *operands, **settings):
    """Results of ``program(convolve)(*operands)`` for ours and for lax's, compiled together."""
    convolves = [functools.partial(convolution, **settings), functools.partial(reference, **settings)]
    together = jax.jit(lambda *operands: [program(convolve)(*operands) for convolve in convolves])
    return jax.device_get(together(*operands))


def value_and_gradients(convolve):
    return lambda x, kernel: (convolve(x, kernel), gradients(convolve)(x, kernel))


@pytest.mark.parametrize(("channels", "groups", "size", "strides", "padding", "dilation"), CASES)
def test_value_and_gradients_are_those_of_lax(channels, groups, size, strides, padding, dilation):
    x, kernel = normal(0, 2, 6, 7, channels), normal(1, *size, channels // groups, 2 * groups)
    settings = dict(strides=strides, padding=padding, dilation=dilation, groups=groups)
    close(*both(value_and_gradients, x, kernel, **settings))


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("settings", [{}, dict(strides=(2, 1), padding="VALID", dilation=(1, 2))])
def test_gradients_against_finite_differences(channels, settings):
    x, kernel = normal(0, 1, 4, 5, channels), normal(1, 2, 2, channels, 2)
    f = jax.jit(functools.partial(loss, functools.partial(convolution, **settings)))
    dx, dkernel = jax.device_get(jax.jit(jax.grad(f, argnums=(0, 1)))(x, kernel))
    for argument, gradient in enumerate((dx, dkernel)):
        operand = (x, kernel)[argument]
        for i in range(operand.size):
            step = np.zeros(operand.size)
            step[i] = 1e-5
            step = step.reshape(operand.shape)
            shifted = [float(f(x + s, kernel) if argument == 0 else f(x, kernel + s)) for s in (step, -step)]
            np.testing.assert_allclose(gradient.ravel()[i], (shifted[0] - shifted[1]) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("channels", [1, 4])
def test_gradient_of_a_gradient(channels):
    x, kernel = normal(0, 2, 5, 5, channels), normal(1, 3, 3, channels, 2)

    def curvature(convolve):
        def squared_norm(x, kernel):
            dx, dkernel = gradients(convolve)(x, kernel)
            return jnp.sum(dx**2) + jnp.sum(dkernel**2)

        return jax.grad(squared_norm, argnums=(0, 1))

    close(*both(curvature, x, kernel, strides=(2, 1)))


AXES = [(0, 0), (0, None), (None, 0), (2, 1)]


@pytest.mark.parametrize(
    ("channels", "axes", "groups"), [(c, axes, 1) for c in (1, 4) for axes in AXES] + [(4, (0, 0), 2)]
)
def test_vmap_is_that_of_lax(channels, axes, groups):
    x, kernel = normal(0, 2, 5, 4, channels), normal(1, 3, 3, channels // groups, 4)
    many = [
        operand if axis is None else np.stack([operand * (1 + m) + m for m in range(3)], axis)
        for operand, axis in zip((x, kernel), axes, strict=True)
    ]
    close(*both(lambda convolve: jax.vmap(value_and_gradients(convolve), axes), *many, groups=groups))


PAIRS = [(*pair, channels) for channels in (4, 1) for pair in itertools.product(AXES[:3], repeat=2)]
MIXED = [(AXES[1], AXES[2], 4), (AXES[2], AXES[1], 4), (AXES[0], AXES[1], 1), (AXES[1], AXES[1], 4)]
"""Each way of sharing at one level is in `test_vmap_is_that_of_lax`; here one rule hands over to another."""


@pytest.mark.parametrize(
    ("outer", "inner", "channels"),
    [*MIXED, *(pytest.param(*pair, marks=pytest.mark.product) for pair in PAIRS if pair not in MIXED)],
)
def test_nested_vmap_as_in_a_sweep_over_seeds_of_clients(outer, inner, channels):
    """Seeds, then clients; over all ways of sharing images or kernels at either level."""
    lead = [[size for size, axes in ((2, outer), (3, inner)) if axes[argument] is not None] for argument in range(2)]
    x, kernel = normal(0, *lead[0], 2, 4, 4, channels), normal(1, *lead[1], 3, 3, channels, 2)
    close(*both(lambda convolve: jax.vmap(jax.vmap(gradients(convolve), inner), outer), x, kernel))


@pytest.mark.parametrize("channels", [1, 4])
def test_local_training_of_vmapped_clients_in_a_scan(channels):
    """vmap(scan(grad)), grad(vmap), scan(vmap(grad)) and rematerialisation."""
    x, kernel = normal(0, 3, 4, 2, 5, 5, channels), normal(1, 3, 3, channels, 2)

    def train(convolve, kernel, batches):
        return lax.scan(lambda k, x: (k - 0.01 * jax.grad(loss, 2)(convolve, x, k), None), kernel, batches)[0]

    def programs(convolve):
        client = functools.partial(train, convolve)
        total = lambda k, x: jax.vmap(functools.partial(loss, convolve), (0, None))(x, k).sum()  # noqa: E731
        step = lambda k, x: (k - 0.01 * jax.grad(total)(k, x), None)  # noqa: E731
        return lambda x, kernel: (
            jax.vmap(client, (None, 0))(kernel, x),
            jax.grad(total)(kernel, x[:, 0]),
            lax.scan(step, kernel, x.swapaxes(0, 1))[0],
            jax.grad(jax.checkpoint(total))(kernel, x[:, 0]),
        )

    close(*both(programs, x, kernel))


@pytest.mark.parametrize("channels", [1, 4])
def test_shared_kernel_and_sharded_images(channels):
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(AxisType.Auto,))
    x, kernel = normal(0, 2, 4, 4, channels), normal(1, 3, 3, channels, 2)

    def gradient(x, kernel):
        return jax.grad(loss, 2)(convolution, x, kernel)  # shard_map sums over clients: the kernel is shared

    specs = (PartitionSpec("clients"), PartitionSpec())
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    close(*jax.device_get(jax.jit(lambda *operands: (sharded(*operands), gradient(*operands)))(x, kernel)))


OTHER_FORMS = [
    forms.Forms(clients, gradients, im2col, "flax", "flax", None)
    for clients, gradients, im2col in [
        ("at_once", "at_once", 3),
        ("at_once", "derived", 0),
        ("one_by_one", "derived", 4),
        ("one_by_one", "in_parts", 0),
    ]
]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("chosen", [OTHER_FORMS[1], *map(product, OTHER_FORMS[:1] + OTHER_FORMS[2:])], ids=str)
def test_the_forms_of_other_platforms_compute_the_same(chosen, channels, monkeypatch):
    """Values, both gradients and theirs, alone, in a group, and of clients."""
    monkeypatch.setitem(forms.FORMS, "cpu", chosen)
    settings = dict(strides=(2, 1), padding=((-1, 2), (1, 0)), dilation=(1, 2), groups=2 if channels == 4 else 1)
    x, kernel = normal(0, 3, 2, 6, 7, channels), normal(1, 3, 3, 2, channels // settings["groups"], 4)

    def programs(convolve):
        curve = jax.grad(lambda *operands: sum(jnp.sum(g**2) for g in gradients(convolve)(*operands)), argnums=(0, 1))
        alone = lambda x, kernel: (value_and_gradients(convolve)(x, kernel), curve(x, kernel))  # noqa: E731
        return lambda x, kernel: (alone(x[0], kernel[0]), jax.vmap(value_and_gradients(convolve))(x, kernel))

    close(*both(programs, x, kernel, **settings))


def test_each_platform_gets_the_form_of_its_line(monkeypatch):
    """Of products towards the kernel: on cuda and rocm JAX's own, two of three in forms that are not the fast one."""
    monkeypatch.setitem(forms.FORMS, "gpu", forms.ASSUMED._replace(gradients="derived"))
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 6, 6, 4), (3, 3, 4, 8)))
    traced = jax.jit(gradients(convolution)).trace(x, kernel)
    fast = "dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    counts = {name: traced.lower(lowering_platforms=(name,)).as_text().count(fast) for name in ("cpu", "cuda", "rocm")}
    assert counts == {"cpu": 3, "cuda": 1, "rocm": 1}
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count(fast) == 3  # still assumed


CLIENTS = 5


def lowered_training(convolve, channels, platform):
    """The program of clients who train their kernels in a scan, as the compiler gets it."""

    def client(kernel, batches):
        return lax.scan(lambda k, x: (k - 0.1 * jax.grad(loss, 2)(convolve, x, k), None), kernel, batches)[0]

    shapes = ((CLIENTS, 3, 3, channels, 8), (CLIENTS, 2, 4, 6, 6, channels))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(jax.vmap(client)).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def group_counts(program):
    return {int(count) for count in re.findall(r"feature_group_count = (\d+)", program)}


def test_clients_do_not_become_groups_on_cpu():
    """Reason 2 of the module's docstring; the reference shows that the test would see it."""
    assert group_counts(lowered_training(convolution, 4, "cpu")) == {1}
    assert CLIENTS in group_counts(lowered_training(reference, 4, "cpu"))
    assert CLIENTS in group_counts(lowered_training(convolution, 4, "cuda"))


def test_images_make_no_convolution_at_all_in_the_training_of_a_first_layer():
    assert "stablehlo.convolution" not in lowered_training(convolution, 1, "cpu")
    assert "stablehlo.convolution" in lowered_training(convolution, 4, "cpu")


def test_every_product_has_the_form_of_the_fast_kernel():
    """Reason 1: forward and both gradients are NHWC, HWIO -> NHWC, which StableHLO writes as below."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 6, 6, 4), (3, 3, 4, 8)))

    fast = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    text = jax.jit(gradients(convolution)).trace(x, kernel).lower().as_text()
    assert text.count("stablehlo.convolution") == text.count(f"dim_numbers = {fast}") == 3
    plain = jax.jit(gradients(reference)).trace(x, kernel).lower().as_text()
    assert plain.count(f"dim_numbers = {fast}") < plain.count("stablehlo.convolution") == 3


@pytest.mark.parametrize("gradients", ["at_once", "derived"])
def test_a_table_may_loop_over_clients_or_not(gradients, monkeypatch):
    """Also where JAX derives the gradients."""
    for clients, expected in (("one_by_one", {1}), ("at_once", {CLIENTS})):
        chosen = forms.ASSUMED._replace(clients=clients, gradients=gradients)
        monkeypatch.setitem(forms.FORMS, "gpu", chosen)
        counts = group_counts(lowered_training(convolution, 4, "cuda"))
        counts |= {int(n) for n in re.findall(r"batch_group_count = (\d+)", lowered_training(convolution, 4, "cuda"))}
        assert counts - {1} == expected - {1}


def test_shared_kernels_need_no_loop():
    x, kernel = np.zeros((5, 2, 6, 6, 4)), np.zeros((3, 3, 4, 8))
    text = jax.jit(jax.vmap(convolution, (0, None))).lower(x, kernel).as_text()
    assert "stablehlo.while" not in text and text.count("stablehlo.convolution") == 1


@pytest.mark.parametrize(
    ("batch", "size", "groups", "examples"),
    [
        pytest.param(6, 24, 1, 3, marks=pytest.mark.product),  # of 72 KiB an example: 3 of them fit into 256 KiB
        (6, 24, 2, 3),
        (5, 24, 1, 1),  # 5 divides by nothing smaller but 1
        pytest.param(2, 48, 1, 1, marks=pytest.mark.product),  # one example is too large already
        (4, 8, 1, 4),  # all fit: no parts
    ],
)
def test_gradients_towards_kernels_come_in_parts_of_the_batch(monkeypatch, batch, size, groups, examples):
    seen = set()
    at_once = layers._direct_kernel_gradient

    def recorded(window, kernel_size, x, g):
        assert len(x) == len(g)
        seen.add(len(g))
        return at_once(window, kernel_size, x, g)

    monkeypatch.setattr(layers, "_direct_kernel_gradient", recorded)
    x, kernel = normal(0, batch, size, size, 4), normal(1, 2, 2, 4 // groups, 16)
    clients = np.stack([x, 2 * x]), np.stack([kernel, -kernel])

    def alone_and_vmapped(convolve):
        return lambda x, kernel, *clients: (gradients(convolve)(x, kernel), jax.vmap(gradients(convolve))(*clients))

    close(*both(alone_and_vmapped, x, kernel, *clients, groups=groups))
    assert examples in seen and seen <= {examples, batch}  # the whole batch is the other platforms' branch


def test_common_dtype_and_numpy_operands():
    y = jax.eval_shape(convolution, np.ones((1, 3, 3, 1), np.float32), np.ones((3, 3, 1, 2), np.float64))
    assert y.dtype == jnp.float64 and y.shape == (1, 3, 3, 2)


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "settings", "message"),
    [
        ((5, 5, 1), (3, 3, 1, 2), {}, "x must be"),
        ((1, 5, 5, 2), (3, 3, 1, 2), {}, "2 channels"),
        ((1, 5, 5, 4), (3, 3, 2, 3), dict(groups=2), "multiple of groups"),
        ((1, 5, 5, 1), (3, 3, 1, 2), dict(groups=0), "groups"),
        ((1, 5, 5, 1), (3, 3, 1, 2), dict(strides=2), "strides"),
        ((1, 5, 5, 1), (3, 3, 1, 2), dict(strides=(0, 1)), "strides"),
        ((1, 5, 5, 1), (3, 3, 1, 2), dict(dilation=(1.5, 1)), "dilation"),
        ((1, 5, 5, 1), (3, 3, 1, 2), dict(padding="same"), "padding"),
        ((1, 5, 5, 1), (3, 3, 1, 2), dict(padding=(1, 1)), "padding"),
        ((1, 2, 5, 1), (3, 3, 1, 2), dict(padding="VALID"), "does not fit"),
    ],
)
def test_errors_name_the_argument(x_shape, kernel_shape, settings, message):
    with pytest.raises(ValueError, match=message):
        convolution(np.zeros(x_shape), np.zeros(kernel_shape), **settings)
