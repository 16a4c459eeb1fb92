"""The adapters: flax linen and NNX modules as Model(init, apply), and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from fedhyper_jax.base import Model
from fedhyper_jax.models import from_linen, from_nnx

INPUTS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)])
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.norm(self.layers[0](x))))


class LinenNet(linen.Module):
    norm: type

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8)(x)
        x = self.norm(use_running_average=False)(x) if self.norm is linen.BatchNorm else self.norm()(x)
        return linen.Dense(3)(x)


def trains(model: Model):
    """Parameters are a plain tree of arrays that jit, grad, vmap and scan take; training lowers the loss."""

    def loss(params, targets):
        return jnp.mean((model.apply(params, INPUTS) - targets) ** 2)

    def client(targets):
        def step(params, _):
            value, gradient = jax.value_and_grad(loss)(params, targets)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

        return jax.lax.scan(step, params, length=20)[1]

    params = jax.jit(model.init)(jax.random.key(0), INPUTS)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    losses = np.asarray(jax.jit(jax.vmap(client))(np.stack([INPUTS[:, :3], -INPUTS[:, :3]])))
    assert (losses[:, -1] < 0.5 * losses[:, 0]).all()


def test_from_linen():
    module = LinenNet(linen.LayerNorm)
    model = from_linen(module)

    @jax.jit
    def both(key):
        params, variables = model.init(key, INPUTS), module.init(key, INPUTS)
        return (params, variables["params"]), (model.apply(params, INPUTS), module.apply(variables, INPUTS))

    parameters, outputs = both(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, *parameters)
    np.testing.assert_allclose(*outputs, rtol=1e-6)
    trains(model)


def test_from_linen_refuses_other_state_and_other_things():
    with pytest.raises(ValueError, match="LinenNet has the variables batch_stats"):
        jax.eval_shape(from_linen(LinenNet(linen.BatchNorm)).init, jax.random.key(0), INPUTS)
    with pytest.raises(TypeError, match=r"instance of flax\.linen\.Module"):
        from_linen(linen.Dense)


def test_from_nnx_factory():
    model = from_nnx(lambda rngs: NnxNet(rngs))

    @jax.jit
    def both(key):
        return model.apply(model.init(key, INPUTS), INPUTS), NnxNet(nnx.Rngs(key))(INPUTS)

    ours, theirs = both(jax.random.key(1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert not np.array_equal(ours, both(jax.random.key(2))[0])
    trains(model)
    many = jax.eval_shape(jax.vmap(model.init, (0, None)), jax.random.split(jax.random.key(0), 3), INPUTS)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(many)} == {3}


def test_from_nnx_module_keeps_its_parameters():
    module = NnxNet(nnx.Rngs(3))
    expected = jax.jit(nnx.clone(module))(INPUTS)
    model = from_nnx(module)
    module.layers[1].bias[...] = np.ones(3, np.float32)  # trained on elsewhere, afterwards
    apply = jax.jit(model.apply)
    for key in range(2):
        params = model.init(jax.random.key(key), INPUTS)
        np.testing.assert_allclose(apply(params, INPUTS), expected, rtol=1e-6)
    trains(model)


class NnxWithState(nnx.Module):
    def __init__(self, rngs, extra):
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.extra = extra(rngs)

    def __call__(self, x):
        return self.extra(self.linear(x))


def test_from_nnx_refuses_other_state():
    def extra(rngs):
        return nnx.BatchNorm(3, rngs=rngs)

    for given in (NnxWithState(nnx.Rngs(0), extra), lambda rngs: NnxWithState(rngs, extra)):
        with pytest.raises(ValueError, match="NnxWithState has variables of type BatchStat next to Param"):
            from_nnx(given)


@pytest.mark.parametrize("given", [NnxNet, 3, lambda rngs: None])
def test_from_nnx_refuses_what_is_no_module(given):
    with pytest.raises(TypeError, match=r"nnx\.Module"):
        from_nnx(given)
