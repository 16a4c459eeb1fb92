"""Which convolutions of a program XLA:CPU runs naively, and the warning of them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from fedhyper_jax import fedavg, local_steps, simulate
from fedhyper_jax.data import pack
from fedhyper_jax.engine.convolutions import plain_convolutions
from fedhyper_jax.engine.diagnoses import SlowConvolutionWarning, warn_of_plain_convolutions
from fedhyper_jax.models import cnn, convolution

FAST = ("NHWC", "HWIO", "NHWC")
IMAGES, KERNEL = jax.ShapeDtypeStruct((4, 14, 14, 16), jnp.float32), (3, 3, 16, 32)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def looped(function):
    """``function`` as the body of a scan whose carry depends on it."""

    def program(*operands):
        def body(total, _):
            return total + jnp.sum(function(*operands)), None

        return lax.scan(body, jnp.zeros(()), length=3)[0]

    return program


def found(function, *arguments):
    return plain_convolutions(jax.make_jaxpr(function)(*arguments))


# Measured by docs/reproducers/convolution_forms.py: whether the loop is slower than the entry computation.
FORMS = [
    (FAST, (4, 14, 14, 16), KERNEL, {}, False),
    (FAST, (4, 14, 14, 16), KERNEL, dict(window_strides=(2, 2)), False),
    (FAST, (4, 14, 14, 16), KERNEL, dict(lhs_dilation=(2, 2), padding=((1, 1), (1, 1))), False),
    (FAST, (4, 14, 14, 16), KERNEL, dict(rhs_dilation=(2, 2)), False),
    (FAST, (4, 14, 14, 16), (3, 3, 8, 32), dict(feature_group_count=2), False),
    (FAST, (4, 14, 14, 16), KERNEL, dict(batch_group_count=2), True),
    (("NWHC", "WHIO", "NWHC"), (4, 14, 14, 16), KERNEL, {}, False),
    (("NWHC", "HWIO", "NWHC"), (4, 14, 14, 16), KERNEL, {}, True),
    (("NHC", "HIO", "NHC"), (4, 196, 16), (9, 16, 32), dict(window_strides=(1,)), False),
    (("NCH", "OIH", "NCH"), (4, 16, 196), (32, 16, 9), dict(window_strides=(1,)), True),
    (("NDHWC", "DHWIO", "NDHWC"), (4, 6, 8, 8, 16), (3, 3, 3, 16, 8), dict(window_strides=(1, 1, 1)), False),
    (("NCHW", "OIHW", "NCHW"), (4, 16, 14, 14), (32, 16, 3, 3), {}, True),
    (("NHWC", "OIHW", "NHWC"), (4, 14, 14, 16), (32, 16, 3, 3), {}, True),
    (("NHWC", "HWIO", "NCHW"), (4, 14, 14, 16), KERNEL, {}, True),
    (("NHWC", "HWOI", "NHWC"), (4, 14, 14, 16), (3, 3, 32, 16), {}, True),
    (("CHWN", "IHWO", "HWNC"), (4, 14, 14, 16), (4, 14, 14, 32), dict(padding=((1, 1), (1, 1))), True),
    (("NCHW", "OIHW", "NCHW"), (4, 16, 14, 14), (32, 16, 1, 1), {}, False),  # a matrix product
    (("NCHW", "OIHW", "NCHW"), (4, 16, 14, 14), (16, 1, 3, 3), dict(feature_group_count=16), False),  # depthwise
    (("NCHW", "OIHW", "NCHW"), (2, 2, 4, 4), (2, 2, 3, 3), {}, False),  # tiny
]


@pytest.mark.parametrize(("numbers", "x", "kernel", "settings", "plain"), FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forms(numbers, x, kernel, settings, plain, dtype):
    settings = {"window_strides": (1, 1), "padding": "SAME"} | settings

    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=numbers, **settings)

    operands = shape(*x, dtype=dtype), shape(*kernel, dtype=dtype)
    assert len(found(looped(convolve), *operands)) == plain
    assert found(convolve, *operands) == ()


def pytorch_order(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "OIHW", "NHWC"))


def test_description():
    (only,) = found(looped(pytorch_order), IMAGES, shape(32, 16, 3, 3))
    assert (only.layer, only.form) == ("", "NHWC, OIHW -> NHWC")
    assert (only.input_shape, only.kernel_shape, only.output_shape) == (IMAGES.shape, (32, 16, 3, 3), (4, 14, 14, 32))
    assert only.multiply_adds == 4 * 14 * 14 * 32 * 9 * 16


def summed(x, kernel):
    return jnp.sum(pytorch_order(x, kernel))


def added(x, kernel):
    return x + summed(x, kernel)


def untouched(x, kernel):
    return x


def scanned(x, kernel, **settings):
    return lax.scan(lambda total, _: (total + summed(x, kernel), None), jnp.zeros(()), **settings)[0]


def in_while(x, kernel):
    return lax.while_loop(lambda total: total < 3, lambda total: total + summed(x, kernel), jnp.zeros(()))


def in_cond(x, kernel):
    return lax.cond(x[0, 0, 0, 0] > 0, added, untouched, x, kernel)


def in_shard_map(x, kernel):
    mesh = jax.make_mesh((1,), ("clients",), axis_types=(AxisType.Auto,))
    specs = PartitionSpec("clients"), PartitionSpec()
    inner = looped(lambda x, kernel: lax.pmean(summed(x, kernel), "clients"))
    sharded = jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return sharded(x, kernel)


def with_its_own(transform, define):
    """``added`` as a function with a rule of its own, which is not called here."""
    function = transform(added)
    getattr(function, define)(*[print] * (1 + (define == "defvjp")))
    return looped(function)


def by_platform(**branches):
    return looped(lambda x, kernel: lax.platform_dependent(x, kernel, **branches))


PROGRAMS = {
    "while": (in_while, 1),
    "fori": (lambda x, kernel: lax.fori_loop(0, 3, lambda _, total: total + summed(x, kernel), 0.0), 1),
    "map": (lambda x, kernel: lax.map(lambda s: added(x, kernel) * s, jnp.ones(3)), 1),
    "scan of one step": (lambda x, kernel: scanned(x, kernel, length=1), 1),
    "unrolled": (lambda x, kernel: scanned(x, kernel, length=3, unroll=True), 0),
    "unrolled in part": (lambda x, kernel: scanned(x, kernel, length=4, unroll=2), 1),
    "cond alone": (in_cond, 0),
    "cond in scan": (looped(in_cond), 1),
    "jit and checkpoint in scan": (looped(jax.jit(jax.checkpoint(added))), 1),
    "scan in jit": (jax.jit(looped(added)), 1),
    "shard_map": (in_shard_map, 1),
    "custom_vjp": (with_its_own(jax.custom_vjp, "defvjp"), 1),
    "custom_jvp": (with_its_own(jax.custom_jvp, "defjvp"), 1),
    "custom_vmap": (with_its_own(jax.custom_batching.custom_vmap, "def_vmap"), 1),
    "for the CPU": (by_platform(cpu=added, default=untouched), 1),
    "for others": (by_platform(cpu=untouched, default=added), 0),
    "by default": (by_platform(cuda=untouched, default=added), 1),
    "not by default": (by_platform(cuda=added, default=untouched), 0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_walks_into(name):
    program, count = PROGRAMS[name]
    assert len(found(program, IMAGES, shape(32, 16, 3, 3))) == count


class Network(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(32, (3, 3))(x))
        return linen.Conv(32, (3, 3), strides=2, name="second")(x).mean((1, 2))


def training(apply):
    """Clients, under vmap, who each train for two local steps in a scan."""

    def loss(params, x):
        return jnp.sum(apply(params, x) ** 2)

    def step(params, x):
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, jax.grad(loss)(params, x)), None

    return jax.vmap(lambda params, batches: lax.scan(step, params, batches)[0], (None, 0))


def test_training_of_a_plain_network_by_vmapped_clients():
    module = Network()
    params = jax.eval_shape(module.init, jax.random.key(0), IMAGES)
    entries = found(training(module.apply), params, shape(5, 2, *IMAGES.shape))
    assert [entry.layer for entry in entries] == ["Network/second", "Network/second", "Network/Conv_0"]
    assert {entry.form for entry in entries} == {"CHWN, IHWO -> HWNC", "NHWC, HWOI -> NHWC"}
    (step,) = {len(found(jax.grad(lambda p, x: module.apply(p, x).sum()), params, IMAGES))}
    assert step == 0  # no loop


@pytest.mark.parametrize("in_axes", [(None, 0), (0, 0)])
def test_silent_for_ours(in_axes):
    model = cnn(10, channels=(8, 16))
    params = jax.eval_shape(model.init, jax.random.key(0), shape(1, 28, 28, 3))
    batches = shape(5, 2, 16, 28, 28, 3)
    assert found(training(model.apply), params, batches) == ()
    settings = dict(strides=(2, 1), dilation=(1, 2), groups=4)
    apply = lambda kernel, x: convolution(x, kernel, **settings)  # noqa: E731
    assert found(training(apply), shape(3, 3, 4, 32), shape(5, 2, *IMAGES.shape)) == ()


OPERANDS = IMAGES, shape(32, 16, 3, 3)


def test_warns_once_per_loss_function():
    def loss_fn():
        pass

    with pytest.warns(SlowConvolutionWarning) as caught:
        warn_of_plain_convolutions(looped(pytorch_order), *OPERANDS, loss_fn=loss_fn)
    (message,) = (str(warning.message) for warning in caught)
    assert "NHWC, OIHW -> NHWC of (4, 14, 14, 16) by (32, 16, 3, 3)" in message
    assert "models.Conv" in message and "docs/layers.md" in message and caught[0].filename == __file__

    def must_not_be_traced(*operands):
        raise AssertionError

    warn_of_plain_convolutions(must_not_be_traced, *OPERANDS, loss_fn=loss_fn)
    with pytest.warns(SlowConvolutionWarning):
        warn_of_plain_convolutions(looped(pytorch_order), *OPERANDS, loss_fn=lambda: None)


class Method:
    def loss(self):
        pass


def test_whose_warning_it_is():
    program = looped(pytorch_order)
    with pytest.warns(SlowConvolutionWarning):
        warn_of_plain_convolutions(program, *OPERANDS)
    warn_of_plain_convolutions(program, *OPERANDS)
    traced = jax.make_jaxpr(looped(pytorch_order))(shape(3, *IMAGES.shape[1:]), OPERANDS[1])
    with pytest.warns(SlowConvolutionWarning):
        warn_of_plain_convolutions(traced)
    warn_of_plain_convolutions(traced.jaxpr)
    with pytest.warns(SlowConvolutionWarning):
        warn_of_plain_convolutions(traced, loss_fn=Method().loss)
    warn_of_plain_convolutions(traced, loss_fn=Method().loss)
    warn_of_plain_convolutions(traced, loss_fn=[])  # neither hashes nor takes weak references: by its convolutions


def test_long_lists_are_cut():
    def many(*operands):
        return sum(looped(pytorch_order)(x, operands[-1]) for x in operands[:-1])

    images = [shape(batch, *IMAGES.shape[1:]) for batch in range(2, 12)]
    with pytest.warns(SlowConvolutionWarning, match="and 2 more"):
        warn_of_plain_convolutions(many, *images, OPERANDS[1])


def test_silent_where_nothing_is_slow(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_plain_convolutions(pytorch_order, *OPERANDS)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        warn_of_plain_convolutions(looped(pytorch_order), *OPERANDS)


def test_the_simulator_warns_of_a_users_model(recwarn):
    """Once, however many rounds and programs; never of the layers that are meant for it."""
    rng = np.random.default_rng(0)
    examples = {"x": rng.normal(size=(8, 14, 14, 16)).astype(np.float32), "y": np.zeros(8, np.int32)}
    clients = pack(examples, [np.arange(4), np.arange(4, 8)])

    def train(apply, params, lengths=(1, 2)):
        def loss_fn(params, batch):
            return jnp.mean(apply(params, batch["x"]) ** 2, (1, 2, 3))

        for rounds in lengths:
            algorithm = fedavg(loss_fn, work=local_steps(2, batch_size=4), local_rate=0.1)
            state, settings = algorithm.init(params), {"rounds": rounds, "cohort_size": 2}
            jax.eval_shape(lambda s: simulate(algorithm, jax.random.key(0), s, clients, **settings), state)  # noqa: B023

    plain = linen.Conv(32, (3, 3))
    params = jax.jit(plain.init)(jax.random.key(0), examples["x"])
    with pytest.warns(SlowConvolutionWarning) as caught:
        train(plain.apply, params)
    assert len(caught) == 1 and "CHWN, IHWO -> HWNC" in str(caught[0].message)
    recwarn.clear()
    train(lambda params, x: convolution(x, params["params"]["kernel"]), params, lengths=(1,))
    assert not recwarn.list
