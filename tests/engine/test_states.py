"""States: whose arrays they are, and whose rates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax import (
    delta_sgd,
    fedavg,
    fedcm,
    fedexp,
    fedhyper,
    fednova,
    fedprox,
    fedsls,
    parts,
    rates,
    scaffold,
    simulate,
)
from fedhyper_jax.base import FederatedAlgorithm
from fedhyper_jax.data import Cohort, local_steps, pack
from tests.helpers import product

COMMON = {"work": local_steps(2, batch_size=1), "local_rate": 0.05}
ROUNDS = {"rounds": 1, "cohort_size": 2}
KEY = jax.random.key(3)


def loss_fn(w, batch):
    return jnp.sum((w - batch["x"]) ** 2, axis=-1) / 2


@pytest.fixture(scope="module")
def pair():
    """Two clients of one number each, 1 and 3."""
    return pack({"x": np.array([[1.0], [3.0]], np.float32)}, [[0], [1]])


def buffers(tree):
    """Where the numbers of each leaf are."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    typed = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    data = [jax.random.key_data(leaf) if key else leaf for leaf, key in zip(leaves, typed, strict=True)]
    return [leaf.unsafe_buffer_pointer() for leaf in data if leaf.size]


# --------------------------------------------------------------------------------------------------------------- memory

NOISE = optax.chain(optax.add_noise(1.0, 0.0, jax.random.key(0)), optax.sgd(1.0))
MAKERS = {
    "fedavg": lambda: fedavg(loss_fn, **COMMON),
    "a schedule": lambda: fedavg(loss_fn, **{**COMMON, "local_rate": lambda t: 0.1 * 0.5**t}),
    "fedexp": lambda: fedexp(loss_fn, **COMMON),
    "SL": lambda: fedhyper(loss_fn, "SL", **COMMON),
    "CL, a rate a client": lambda: fedhyper(loss_fn, "CL", client_rates="per_client", population=2, **COMMON),
    "scaffold": lambda: scaffold(loss_fn, population=2, **COMMON),
    "fedprox, a plateau": lambda: fedprox(loss_fn, **{**COMMON, "local_rate": rates.reduce_on_plateau(0.1)}),
    "a noisy server": lambda: fedavg(loss_fn, server_optimizer=NOISE, guard=parts.guards.rollback(2.0), **COMMON),
}


@pytest.mark.parametrize("name", MAKERS)
def test_first_states_are_made_of_arrays_of_their_own(name):
    """No two leaves share memory, none with the caller's, none with those of another first state."""
    algorithm, params = MAKERS[name](), jnp.ones(1)
    first, second = algorithm.init(params), algorithm.init(params)
    found = [*buffers(first), *buffers(second), *buffers(params), *buffers(NOISE.init(params))]
    assert len(set(found)) == len(found)
    compiled = jax.jit(algorithm.init)(params)
    batched = jax.vmap(algorithm.init)(params[None])
    assert not {*buffers(compiled), *buffers(batched)} & {*buffers(first), *buffers(params), *buffers(params[None])}


@pytest.mark.parametrize("name", ["a noisy server", product("fedavg"), product("fedexp")])
def test_states_can_be_given_away_again_and_again(pair, name):
    algorithm, params = MAKERS[name](), jnp.zeros(1)
    ends = [simulate(algorithm, KEY, algorithm.init(params), pair, donate=True, **ROUNDS)[0] for _ in range(2)]
    np.testing.assert_array_equal(ends[0].params, ends[1].params)
    assert params.tolist() == [0.0] and ends[0].params.tolist() != [0.0]


# ---------------------------------------------------------------------------------------------------------------- rates


def rated(scheduler, local_rate, **settings):
    if scheduler == "fedavg":
        return fedavg(loss_fn, **{**COMMON, "local_rate": local_rate, **settings})
    return fedhyper(loss_fn, scheduler, **{**COMMON, "local_rate": local_rate, **settings})


def test_a_state_goes_on_with_other_rates_in_the_same_program(pair):
    """Two steps at 0.2 leave (1 − 0.2)² of the way to the mean, 2; α = 0.5 takes half of what is gone."""
    fast, slow = rated("fedavg", 0.2), rated("fedavg", 0.01, global_rate=0.5)
    round_fn, cohort = jax.jit(fast.round), Cohort(data=pair, client_ids=jnp.arange(2))
    state, _ = round_fn(KEY, fast.init(jnp.zeros(1)), cohort)
    w = 2 - 2 * 0.8**2
    assert state.params.item() == pytest.approx(w)
    changed = slow.with_rates(state)
    for _ in range(2):  # and not for one round only
        changed, info = round_fn(KEY, changed, cohort)
        w += 0.5 * (2 - w) * (1 - 0.99**2)
        assert changed.params.item() == pytest.approx(w)
    assert (float(info.local_rate), float(info.global_rate)) == pytest.approx((0.01, 0.5))
    assert round_fn._cache_size() == 1


def test_rules_start_afresh_and_schedules_go_on():
    def at_round_3(algorithm):
        return dataclasses.replace(algorithm.init(jnp.zeros(1)), round=jnp.int32(3), params=jnp.ones(1))

    slow = rated("SL+CL", 0.01)
    moved = slow.with_rates(at_round_3(rated("SL+CL", 0.2)))
    np.testing.assert_allclose(moved.local_rate[:4], slow.init(jnp.zeros(1)).local_rate[:4])  # bounds and κ too
    np.testing.assert_allclose(moved.client_rule.rule.upper, 0.1)
    assert int(moved.round) == 3 and moved.params.item() == 1

    per_client = {"client_rates": "per_client", "population": 2}
    moved = rated("CL", 0.01, **per_client).with_rates(at_round_3(rated("CL", 0.2, **per_client)))
    np.testing.assert_allclose(moved.clients["rate"], [0.01, 0.01])
    moved = rated("fedavg", 0.01).with_rates(at_round_3(rated("CL", 0.2, **per_client)))
    assert moved.clients == {}

    halving = rated("fedavg", lambda t: 0.8 * 0.5**t, schedule_rounds=8)
    moved = halving.with_rates(at_round_3(rated("G", 0.2)))
    assert float(moved.local_rate.rate) == pytest.approx(0.1)

    with pytest.raises(ValueError, match="state does not belong to this algorithm"):
        rated("fedavg", 0.01).with_rates(at_round_3(scaffold(loss_fn, population=2, **COMMON)))
    bare = FederatedAlgorithm(init=halving.init, round=halving.round)
    with pytest.raises(ValueError, match="does not say how a state gets its rates"):
        bare.with_rates(moved)


def test_a_running_average_is_evaluated(pair):
    """Round t counts for 9/(t + 9), by hand: the first one alone, and w^0 not at all."""
    algorithm = fedavg(loss_fn, evaluate_at="running_average", **COMMON)
    state, average = algorithm.init(jnp.zeros(1)), None
    round_fn = jax.jit(algorithm.round)
    for number in range(4):
        state, _ = round_fn(KEY, state, Cohort(data=pair, client_ids=np.arange(2)))
        w = 2 * (1 - 0.95 ** (2 * (number + 1)))  # two local steps a round towards the clients' mean, 2
        average = w if average is None else average + 9 / (number + 9) * (w - average)
        np.testing.assert_allclose(state.params, [w], rtol=1e-6)
        np.testing.assert_allclose(algorithm.evaluated_params(state), [average], rtol=1e-6)


def test_a_global_rule_moves_before_its_first_use_and_a_local_one_after(pair):
    """`RateRule.init` says where a rate starts: that is β^0, and what α^0 is made of."""

    def growing():
        def update(state, feedback):
            return state._replace(rate=1.1 * state.rate), parts.RateReport.none()

        return rates.hypergradient(1.0)._replace(update=update)

    algorithm = rated("fedavg", growing(), global_rate=growing())
    assert float(algorithm.init(jnp.zeros(1)).global_rate.rate) == 1.0
    _, history = simulate(algorithm, KEY, algorithm.init(jnp.zeros(1)), pair, rounds=2, cohort_size=2)
    np.testing.assert_allclose(history.info.global_rate, [1.1, 1.21], rtol=1e-6)
    np.testing.assert_allclose(history.info.local_rate, [1.0, 1.1], rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------- rate 0

WARM_UP = {**COMMON, "local_rate": lambda t: 0.1 * (t % 2), "schedule_rounds": 4}
WARMED = {
    "scaffold+fedexp": lambda **more: (scaffold(population=2) + fedexp(epsilon=0.0))(loss_fn, **more),
    "fednova+fedexp": lambda **more: (fednova() + fedexp(epsilon=0.0))(loss_fn, **more),
    "fedcm": lambda **more: fedcm(loss_fn, **more),
    "delta_sgd": lambda **more: delta_sgd(loss_fn, **more),
    "fedsls": lambda **more: fedsls(loss_fn, **more),
}


@pytest.mark.parametrize("name", WARMED)
def test_a_round_at_rate_zero_moves_nothing(pair, name):
    """Rates 0, 0.1, 0: parameters, rows and terms move in round 1 only; nobody is left out."""
    algorithm = WARMED[name](**{**WARM_UP, "work": local_steps(3, batch_size=1)})
    state, round_fn, states = algorithm.init(jnp.ones(1)), jax.jit(algorithm.round), []
    for _ in range(3):
        before = state.params, state.clients, state.terms
        state, info = round_fn(KEY, state, Cohort(data=pair, client_ids=jnp.arange(2)))
        assert int(info.participants) == 2 and np.isfinite(info.global_rate)
        states.append(jax.tree.leaves([before, (state.params, state.clients, state.terms)]))
        assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in states[-1]])).all()
        half = len(states[-1]) // 2
        same = all(np.array_equal(a, b) for a, b in zip(states[-1][:half], states[-1][half:], strict=True))
        assert same == (int(info.round) % 2 == 0)


def test_warm_ups_from_zero_are_taken_and_others_told_what_helps():
    for schedule in (optax.linear_schedule(0.0, 0.1, 5), optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 50)):
        settings = {**COMMON, "local_rate": schedule, "schedule_rounds": 60}
        assert float(fedavg(loss_fn, **settings).init(0.0).local_rate.rate) == 0
    with pytest.raises(ValueError, match="where the schedule of local_rate starts, which is 0; start it above 0"):
        fedhyper(loss_fn, "CL", **{**COMMON, "local_rate": optax.linear_schedule(0.0, 0.1, 5)})
