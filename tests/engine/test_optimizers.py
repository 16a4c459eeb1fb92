"""Optimizers of clients that draw noise, or treat some parameters otherwise than others.

With the loss ½(Σ w − x)², x = 1 for one client and 3 for the other, every parameter has the gradient Σ w − x.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax import _random, fedavg, fedhyper, fednova, fedsps, scaffold, terms
from fedhyper_jax.data import Cohort, local_steps, pack
from tests.helpers import play, product

TWO_STEPS = local_steps(2, batch_size=1)
COMMON = {"work": TWO_STEPS, "local_rate": 0.1}
FROZEN = {"t": optax.sgd(1.0), "f": optax.set_to_zero()}
LABELS = {"a": "t", "b": "f"}
PARAMS = {"a": jnp.zeros(1), "b": jnp.zeros((1, 1))}


@pytest.fixture(scope="module")
def pair():
    """Two clients of one number each."""
    return pack({"x": np.array([1.0, 3.0], np.float32)}, [[0], [1]])


def loss_fn(params, batch):
    return (sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)) - batch["x"]) ** 2 / 2


def by_function(tree):
    """Labels of parameters or updates: vectors are trained, matrices are not."""
    return jax.tree.map(lambda w: "t" if w.ndim == 1 else "f", tree)


# --------------------------------------------------------------------------------------------------------------- noise


def test_noise_is_each_clients_and_each_rounds_own(key):
    """100 clients without gradients add noise of deviation 1: that of their mean is 1/√100, and new in every round."""
    data = pack({"x": np.zeros(100, np.float32)}, [[m] for m in range(100)])

    noisy = optax.chain(optax.add_noise(1.0, 0.0, 0), optax.sgd(1.0))
    settings = {"work": local_steps(1, batch_size=1), "local_rate": 1.0, "client_optimizer": noisy}
    algorithm = fedavg(lambda w, batch: batch["x"] + 0 * jnp.sum(w), **settings)
    state, round_fn, updates = algorithm.init(jnp.zeros(400)), jax.jit(algorithm.round), []
    for _ in range(2):
        state, _ = round_fn(key, state, Cohort(data=data, client_ids=jnp.arange(100)))
        updates.append(np.asarray(state.pseudo_gradient))
    for update in updates:
        assert np.std(update) == pytest.approx(0.1, rel=0.15)
    assert abs(np.corrcoef(*updates)[0, 1]) < 0.25


def test_keys_of_optimizers_depend_on_the_seed_and_on_the_clients_key():
    """Typed and old-style keys alike; whatever is no key is as it was, and without keys none is asked for."""

    def keys_of(seed, own):
        typed = optax.add_noise(1.0, 0.0, seed).init(jnp.zeros(2))
        raw = optax.contrib.hutchinson_estimator_diag_hessian(jax.random.PRNGKey(seed)).init(jnp.zeros(2))
        state = {"typed": typed, "raw": raw, "count": jnp.zeros(2, jnp.uint32)}
        assert _random.has_keys(typed) and _random.has_keys(raw) and not _random.has_keys(state["count"])
        new = _random.with_own_keys(state, lambda: jax.random.key(own))
        assert jax.tree.structure(new) == jax.tree.structure(state)
        np.testing.assert_array_equal(new["count"], state["count"])
        return tuple(jax.random.key_data(new["typed"].rng_key).tolist()), tuple(new["raw"].key.tolist())

    found = [keys_of(seed, own) for seed in (0, 1) for own in (5, 6)]
    assert all(typed == raw for typed, raw in found) and len(set(found)) == 4
    assert found[0] == keys_of(0, 5)

    def never():
        raise AssertionError

    _random.with_own_keys(optax.adam(1.0).init(jnp.zeros(2)), never)


def test_keys_of_a_round_differ_by_purpose_and_client(key):
    made = [
        derive(key, client)
        for derive in (_random.batch_key, _random.failure_key, _random.optimizer_key)
        for client in (jnp.int32(0), jnp.int32(1))
    ]
    assert len({tuple(jax.random.key_data(k).tolist()) for k in made}) == 6


def test_noise_in_an_optimizer_that_stands_still_is_refused():
    noisy = optax.chain(optax.add_noise(1.0, 0.0, 0), optax.sgd(1.0))
    with pytest.raises(ValueError, match="same in every step of every client"):
        fedavg(loss_fn, terms=[terms.frozen_optimizer(noisy)], **COMMON).init(PARAMS)
    with pytest.raises(ValueError, match="only a linear client optimizer gives"):
        scaffold(loss_fn, population=2, client_optimizer=noisy, **COMMON)
    with pytest.raises(ValueError, match="step along the gradient: leave client_optimizer out"):
        fedsps(loss_fn, client_optimizer=noisy, **COMMON)


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("labels", [LABELS, by_function], ids=["labels", "function"])
def test_frozen_parameters_stay(key, pair, labels):
    """a: 0 → 0.1 · 2 → 0.2 + 0.1 · 1.8, on average over the clients."""
    algorithm = fedavg(loss_fn, client_optimizer=optax.partition(FROZEN, labels), **COMMON)
    state, _ = play(algorithm, key, pair, [[0, 1]], PARAMS)
    assert state.params["a"].item() == pytest.approx(0.38) and state.params["b"].item() == 0


@pytest.mark.parametrize("method", ["scaffold", "CL", product("fednova")])
def test_methods_with_frozen_parameters_are_those_without_them(key, pair, method):
    """(Momentum, so that a_m is not the sum of the rates.) CL's products are of the gradients of what moves."""
    make = {
        "scaffold": lambda **more: scaffold(loss_fn, population=2, **COMMON, **more),
        "fednova": lambda **more: fednova(loss_fn, **COMMON, **more),
        "CL": lambda **more: fedhyper(loss_fn, "CL", hyper_rate=0.01, **COMMON, **more),
    }[method]
    optimizer = optax.sgd(1.0, momentum=0.5)
    frozen = optax.partition({"t": optimizer, "f": optax.set_to_zero()}, LABELS)
    cohorts = [[0, 1]] * 2
    state, infos = play(make(client_optimizer=frozen), key, pair, cohorts, PARAMS)
    alone, expected = play(make(client_optimizer=optimizer), key, pair, cohorts, {"a": jnp.zeros(1)})
    assert state.params["b"].item() == 0
    np.testing.assert_allclose(state.params["a"], alone.params["a"], rtol=1e-6)
    np.testing.assert_allclose(infos[-1].client_rate_median, expected[-1].client_rate_median, rtol=1e-6)
    if method == "scaffold":
        rows = state.clients["control_variates"]
        np.testing.assert_allclose(rows["a"], alone.clients["control_variates"]["a"], rtol=1e-6)
        assert not rows["b"].any() and rows["a"].all()


def test_a_mask_of_everything_is_the_optimizer_itself():
    whole = optax.masked(optax.sgd(1.0), {"w": True})
    for algorithm in (
        fedavg(loss_fn, client_optimizer=whole, server_optimizer=whole, **COMMON),
        fedsps(loss_fn, client_optimizer=whole, **COMMON),
        fednova(loss_fn, client_optimizer=whole, **COMMON),
    ):
        assert algorithm.init({"w": jnp.zeros(3)}).params["w"].shape == (3,)


SGD_FOR_A = optax.masked(optax.sgd(1.0), {"a": True, "b": False})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: fedavg(loss_fn, client_optimizer=SGD_FOR_A, **COMMON),
            r"client_optimizer passes.*params\['b'\].*climb",
        ),
        (
            lambda: fedavg(loss_fn, server_optimizer=SGD_FOR_A, **COMMON),
            r"server_optimizer passes.*params\['b'\].*climb",
        ),
        (lambda: fedavg(loss_fn, terms=[terms.frozen_optimizer(SGD_FOR_A)], **COMMON), "frozen_optimizer's .*climb"),
        (
            lambda: fedsps(loss_fn, client_optimizer=optax.partition(FROZEN, LABELS), **COMMON),
            "the Polyak step is the length of a step along the gradient: leave client_optimizer out",
        ),
        (
            lambda: fednova(
                loss_fn,
                client_optimizer=optax.partition({**FROZEN, "f": optax.sgd(0.5)}, LABELS),
                **COMMON,
            ),
            "a_m is one number, but client_optimizer moves some parameters by other rates",
        ),
        (
            lambda: scaffold(
                loss_fn,
                population=2,
                client_optimizer=optax.partition({**FROZEN, "t": optax.adam(1.0)}, LABELS),
                **COMMON,
            ),
            "only a linear client optimizer gives",
        ),
        (
            lambda: fedavg(loss_fn, client_optimizer=optax.masked(optax.sgd(1.0), {"w": True}), **COMMON),
            r"client_optimizer does not take these parameters \(pytree.*must have their structure, .*'a': \*, 'b': \*",
        ),
    ],
    ids=["client", "server", "mime", "fedsps", "fednova", "scaffold", "foreign"],
)
def test_masks_without_a_meaning_are_refused_with_the_reason(make, message):
    algorithm = make()
    with pytest.raises(ValueError, match=message):
        algorithm.init(PARAMS)


def test_a_mask_whose_rest_is_frozen_or_climbs_on_purpose_is_taken():
    rest = optax.masked(optax.set_to_zero(), {"a": False, "b": True})
    for optimizer in (
        optax.chain(SGD_FOR_A, rest),
        optax.chain(optax.masked(optax.add_decayed_weights(0.1), {"a": True, "b": False}), optax.sgd(1.0)),
        optax.partition({"t": optax.sgd(1.0), "f": optax.scale(1.0)}, LABELS),  # descent and ascent
    ):
        fedavg(loss_fn, client_optimizer=optimizer, **COMMON).init(PARAMS)
