"""Small things that several tests share."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax.data import Cohort


def product(*values, **settings):
    """Parameters of a case that only the full product runs (``make test-all``)."""
    return pytest.param(*values, marks=pytest.mark.product, **settings)


def cases(names, *, later):
    """All of ``names`` as cases of one parameter; those in ``later`` run with the full product only."""
    return [product(name) if name in later else name for name in names]


def without_pictures(monkeypatch):
    """Commands leave an empty folder of pictures: to draw them takes longer than a tiny run."""
    from fedhyper_jax.shell import compare, train

    for module in (train, compare):
        monkeypatch.setattr(module, "plot_folder", lambda folder: (folder / "plots").mkdir(exist_ok=True))


def logistic_loss(params, batch):
    """Softmax regression on 5 features and 3 classes."""
    logits = batch["x"] @ params["weights"] + params["bias"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def logistic_params(dtype=jnp.float32):
    """A start that is not zero, so that every product has something to multiply."""
    weights = 0.1 * jax.random.normal(jax.random.key(5), (5, 3), dtype)
    return {"weights": weights, "bias": jnp.zeros(3, dtype)}


def mixed_params():
    """Weights in bfloat16 and a bias in float32, as where a model keeps its norms in float32."""
    params = logistic_params(jnp.float32)
    return {**params, "weights": params["weights"].astype(jnp.bfloat16)}


def some_params(init, inputs, seed=0):
    """Normal numbers of the shapes that ``init`` gives; an initialisation takes long to compile."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(init, jax.random.key(0), inputs)
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / 3).astype(leaf.dtype), shapes)


def play(algorithm, key, data, cohorts, params=None, jit=True):
    """Runs one round per cohort; returns the last state and all infos."""
    state = algorithm.init(logistic_params() if params is None else params)
    round_fn = jax.jit(algorithm.round) if jit else algorithm.round
    infos = []
    for cohort in cohorts:
        state, info = round_fn(key, state, Cohort(data=data, client_ids=jnp.asarray(cohort, jnp.int32)))
        infos.append(info)
    return state, infos


def in_a_new_process(program: str) -> str:
    """Output of a Python program where JAX has not started yet: the number of devices is fixed when it does."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
