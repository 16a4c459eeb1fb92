"""Narrow computation behind float32 parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import fedhyper, simulate
from fedhyper_jax.data import local_steps
from fedhyper_jax.models import cnn, compute_in, mlp
from fedhyper_jax.tasks.losses import cross_entropy
from tests.helpers import product, some_params


@pytest.mark.parametrize(("model", "shape"), [product(mlp(3), (4, 5)), (cnn(3, channels=(2,)), (4, 8, 8, 1))])
def test_products_are_narrow_and_everything_else_is_not(model, shape):
    narrow = compute_in(model, "bfloat16")
    inputs = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    programs = {str(jax.make_jaxpr(of.init)(jax.random.key(0), inputs)) for of in (narrow, model)}
    assert len(programs) == 1  # the same parameters
    params = some_params(model.init, inputs)
    text = str(jax.make_jaxpr(narrow.apply)(params, inputs))
    assert "bf16" in text
    wide, close = jax.jit(lambda params: (model.apply(params, inputs), narrow.apply(params, inputs)))(params)
    assert close.dtype == wide.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(close) - np.asarray(wide)).max() < 0.05
    gradient = jax.eval_shape(jax.grad(lambda w: jnp.sum(narrow.apply(w, inputs) ** 2)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_rates_and_products_stay_float32(key, federation):
    model = compute_in(mlp(3, hidden=(4,)), jnp.bfloat16)
    algorithm = fedhyper(cross_entropy(model), "G+SL+CL", work=local_steps(3, 8), local_rate=0.05)
    state = algorithm.init(some_params(model.init, federation.examples["x"][:1]))
    state, history = simulate(algorithm, key, state, federation, rounds=2, cohort_size=4)
    floats = [leaf for leaf in jax.tree.leaves((state, history)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    assert np.isfinite(history.info.inner_product).all()


@pytest.mark.parametrize("dtype", ["int8", "small"])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match="must be a floating-point type"):
        compute_in(mlp(3), dtype)
