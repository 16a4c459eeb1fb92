"""Losses that draw random numbers: a key of their own for every round, client and step, and nothing else."""

import chex
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import fedhyper_jax as fh
from fedhyper_jax import data, losses, models
from tests.helpers import product

RATE, STEPS, ROUNDS = 0.5, 3, 2
CLIENTS = data.pack({"x": np.zeros((4, 1), np.float32)}, [[0], [1, 2], [3]])


def noise(params, batch, key):
    """Its gradient is a random number, the same for all examples of the batch."""
    return jnp.full(len(batch["x"]), params * jax.random.normal(key))


def fold(key, *numbers):
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


@pytest.mark.parametrize("strategy", ["vectorized", product("chunked(2)")])
def test_the_key_is_of_run_round_client_and_step(key, strategy):
    """Δ_m = β Σ_k noise(key_{t,m,k}), with keys as jax.random folds them."""
    algorithm = fh.fedavg(noise, work=fh.local_steps(STEPS, 2), local_rate=RATE, weighting="uniform", strategy=strategy)
    state, expected = algorithm.init(0.0), 0.0
    state, _ = fh.simulate(algorithm, key, state, CLIENTS, rounds=ROUNDS, cohort_size=3)
    for number in range(ROUNDS):
        clients_key = jax.random.split(fold(key, number))[1]
        draws = [
            [jax.random.normal(fold(clients_key, m, 3, k)) for k in range(STEPS)] for m in range(CLIENTS.population)
        ]
        assert len(np.unique(draws)) == CLIENTS.population * STEPS
        expected -= RATE * np.sum(draws, axis=1).mean()
    np.testing.assert_allclose(state.params, expected, rtol=1e-5)


def test_full_gradients_draw_numbers_of_their_own(key):
    """MIME's momentum after round 0 is the mean gradient at w: Σ_m p_m mean_j noise(key_{m, K + j})."""
    algorithm = fh.mime_lite(noise, work=fh.local_steps(1, 1), local_rate=RATE, weighting="uniform", momentum=0.5)
    state, _ = fh.simulate(algorithm, key, algorithm.init(0.0), CLIENTS, rounds=1, cohort_size=3)
    clients_key = jax.random.split(fold(key, 0))[1]
    sizes = np.asarray(CLIENTS.client_sizes)
    own = [np.mean([jax.random.normal(fold(clients_key, m, 3, 1 + j)) for j in range(n)]) for m, n in enumerate(sizes)]
    momentum = optax.tree.get(state.terms, "trace")
    np.testing.assert_allclose(momentum, np.mean(own), rtol=1e-5)


class Dropped(linen.Module):
    @linen.compact
    def __call__(self, x, training):
        return linen.Dropout(0.5, deterministic=not training)(linen.Dense(3)(x))


class Field(linen.Module):
    deterministic: bool

    @linen.compact
    def __call__(self, x):
        return linen.Dropout(0.5, deterministic=self.deterministic)(linen.Dense(3)(x))


class Module(nnx.Module):
    def __init__(self, rngs, **options):
        self.dense, self.dropout = nnx.Linear(2, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs, **options)

    def __call__(self, x):
        return self.dropout(self.dense(x))


WITH_DROPOUT = {
    "an argument": lambda: models.from_linen(Dropped()),
    "two modules": lambda: models.from_linen(Field(True), train=Field(False)),
    "nnx": lambda: models.from_nnx(lambda rngs: Module(rngs)),
    "an nnx module": lambda: models.from_nnx(Module(nnx.Rngs(0))),
    "narrow": lambda: models.compute_in(models.from_linen(Dropped()), jnp.bfloat16),
}


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_dropout_trains_with_a_key_and_is_deterministic_in_evaluation(name, key):
    model, x = WITH_DROPOUT[name](), jnp.ones((20, 2))
    params = model.init(key, x)
    outputs = model.apply(params, x)
    np.testing.assert_array_equal(outputs, model.apply(params, x))
    assert np.all(outputs != 0)
    ones, others = (np.asarray(model.train(params, x, jax.random.key(n))) for n in (1, 2))
    assert 0.3 < np.mean(ones == 0) < 0.7 and np.any((ones == 0) != (others == 0))
    np.testing.assert_allclose(ones[ones != 0], 2 * np.asarray(outputs)[ones != 0], rtol=1e-2)
    assert losses.takes_key(losses.cross_entropy(model))


def test_a_module_that_is_made_deterministic_stays_so(key):
    model, x = models.from_nnx(lambda rngs: Module(rngs, deterministic=True)), jnp.ones((20, 2))
    params = model.init(key, x)
    np.testing.assert_array_equal(model.train(params, x, key), model.apply(params, x))


def test_dropout_in_a_run(key):
    """Another key of the run, other masks; the same key, the same run."""
    model = models.from_linen(Dropped())
    examples = {"x": np.ones((4, 2), np.float32), "y": np.array([0, 1, 2, 0])}
    clients = data.pack(examples, [[0, 1], [2, 3]])
    algorithm = fh.fedavg(losses.cross_entropy(model), work=fh.local_steps(1, 2), local_rate=0.1)
    state = algorithm.init(model.init(key, examples["x"]))
    one, again, other = (
        fh.simulate(algorithm, jax.random.key(n), state, clients, rounds=2, cohort_size=2)[0].params for n in (1, 1, 2)
    )
    chex.assert_trees_all_equal(one, again)
    assert not np.allclose(one["Dense_0"]["bias"], other["Dense_0"]["bias"])


def test_what_draws_in_evaluation_is_refused(key):
    model = models.from_linen(Field(False))
    params = model.init(key, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="Field draws random numbers in evaluation; give its __call__ an argument"):
        model.apply(params, jnp.ones((1, 2)))


@pytest.mark.parametrize("loss_fn", [lambda w: w, lambda w, batch, key, more: w, lambda w, *, batch: w])
def test_losses_that_take_something_else(loss_fn):
    with pytest.raises(TypeError, match=r"loss_fn must take \(params, batch\), or \(params, batch, key\)"):
        fh.fedavg(loss_fn, work=fh.local_steps(1, 1), local_rate=0.1)
