"""The simulator equals the independent NumPy transcription of SPEC.md section 2, fed the same batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax import fedavg, fedhyper
from fedhyper_jax.data import Cohort, client_batches, local_epochs, local_steps, pack, sample_cohort
from tests.reference import fedhyper_numpy as reference

CLASSES, FEATURES, POPULATION, COHORT = 3, 5, 20, 6
COMBINATIONS = ["G", "SL", "CL", "G+SL", "G+CL", "SL+CL", "G+SL+CL"]
SERVER_OPTIMIZERS = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adagrad": optax.adagrad(1e-2),
    "yogi": optax.yogi(1e-2),
}
CLIENT_OPTIMIZERS = {"sgd": optax.sgd(1.0), "momentum": optax.sgd(1.0, momentum=0.9)}


def loss_fn(params, batch):
    logits = batch["x"] @ params["weights"] + params["bias"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def flatten(params):
    """In the reference's order: weights row by row, then bias."""
    return np.concatenate([np.asarray(params["weights"], float).ravel(), np.asarray(params["bias"], float)])


def unflatten(vector, dtype):
    weights, bias = np.split(np.asarray(vector), [FEATURES * CLASSES])
    return {"weights": jnp.asarray(weights.reshape(FEATURES, CLASSES), dtype), "bias": jnp.asarray(bias, dtype)}


class Duel:
    """One run in the package and what the reference needs to repeat it."""

    def __init__(self, ragged, dtype, work, rounds=20, seed=0):
        examples, rows = ragged
        self.dtype, self.rounds, self.key = dtype, rounds, jax.random.key(seed)
        self.inputs = examples["x"].astype(np.dtype(dtype))
        self.data = pack({"x": self.inputs, "y": examples["y"].astype(np.int32)}, rows)
        self.problem = reference.softmax_regression(self.inputs.astype(np.float64), examples["y"], CLASSES)
        self.sizes = np.array([len(r) for r in rows])
        self.start = np.random.default_rng(seed).normal(size=self.problem.size) * 0.1
        self.start = flatten(unflatten(self.start, dtype))  # what the dtype holds of it
        keys = jax.random.split(jax.random.key(seed + 1), rounds)
        self.cohorts = [np.asarray(sample_cohort(k, POPULATION, COHORT)) for k in keys]
        draw = jax.vmap(jax.vmap(lambda t, m: client_batches(self.key, t, self.data, m, work), (None, 0)))
        drawn = jax.tree.map(np.asarray, jax.jit(draw)(jnp.arange(rounds), jnp.asarray(np.array(self.cohorts))))
        self.batches = [
            {
                int(client): [drawn.rows[t, s, k][drawn.mask[t, s, k]] for k in range(drawn.num_steps[t, s])]
                for s, client in enumerate(cohort)
            }
            for t, cohort in enumerate(self.cohorts)
        ]

    def package(self, algorithm):
        state = algorithm.init(unflatten(self.start, self.dtype))
        round_fn = jax.jit(algorithm.round)
        states, infos = [state], []
        for cohort in self.cohorts:
            state, info = round_fn(self.key, state, Cohort(data=self.data, client_ids=jnp.asarray(cohort)))
            states.append(state)
            infos.append(info)
        return states, infos

    def reference(self, **settings):
        return reference.run(self.problem.gradient, self.start, self.cohorts, self.batches, self.sizes, **settings)


def assert_same(states, infos, records, tolerance):
    for state, info, record in zip(states[1:], infos, records, strict=True):
        where = f"round {record.round}"
        distance = np.linalg.norm(flatten(state.params) - record.w) / np.linalg.norm(record.w)
        assert distance <= tolerance, where
        np.testing.assert_allclose(info.global_rate, record.alpha, rtol=tolerance, err_msg=where)
        np.testing.assert_allclose(info.local_rate, record.beta, rtol=tolerance, err_msg=where)
        previous = states[record.round].pseudo_gradient
        scale = np.linalg.norm(flatten(previous)) * np.linalg.norm(record.pseudo_gradient)
        assert abs(float(info.inner_product) - record.inner_product) <= tolerance * scale + 1e-30, where
        finals = record.client_final_rates[record.survived]
        np.testing.assert_allclose(
            [info.client_rate_min, info.client_rate_median, info.client_rate_max],
            [finals.min(), np.median(finals), finals.max()],
            rtol=tolerance,
            err_msg=where,
        )
        assert int(info.global_rate_updates) == record.alpha_updates, where
        assert int(info.local_rate_updates) == record.beta_updates, where
        assert int(info.global_rate_clipped) == record.alpha_clipped, where
        assert int(info.local_rate_clipped) == record.beta_clipped, where


DUELS = {}


def cached_duel(dtype, work, ragged):
    """The same federation, cohorts and batches for all tests of one kind of work."""
    if (dtype, work) not in DUELS:
        DUELS[dtype, work] = Duel(ragged, dtype, work)
    return DUELS[dtype, work]


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("work", [local_epochs(2, batch_size=8), local_steps(7, batch_size=6)], ids=["epochs", "steps"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-9)], ids=["float32", "float64"])
def test_every_combination_equals_the_reference(ragged, combination, work, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        duel = cached_duel(dtype, work, ragged)
        # Every rate moves and some updates are clipped, yet the run is stable.
        settings = {"hyper_rate": 0.1, "global_rate": 1.0, "local_rate": 0.05}
        states, infos = duel.package(fedhyper(loss_fn, combination, work=work, **settings))
        records = duel.reference(
            schedulers=frozenset(combination.split("+")),
            alpha=1.0,
            beta=float(np.dtype(dtype).type(0.05)),
            kappa_global=0.1,
            kappa_server_local=0.1,
            kappa_client=0.1,
        )
        assert_same(states, infos, records, tolerance)
        moved = {"G": [float(i.global_rate) for i in infos], "SL": [float(i.local_rate) for i in infos]}
        for scheduler in set(combination.split("+")) & set(moved):
            assert len(set(moved[scheduler])) > 5
        if "CL" in combination:
            assert any(float(i.client_rate_max) > float(i.client_rate_min) for i in infos)


@pytest.mark.parametrize(
    ("server", "client", "weighting", "combination"),
    [
        ("sgd", "sgd", "examples", ""),
        ("adam", "momentum", "examples", ""),
        *((server, "sgd", "examples", "G+SL+CL") for server in SERVER_OPTIMIZERS if server != "sgd"),
        ("sgd", "momentum", "examples", "G+SL+CL"),
        ("momentum", "momentum", "uniform", "G+SL+CL"),
    ],
)
def test_any_optimizers_on_either_side_equal_the_reference(ragged, float64, server, client, weighting, combination):
    work = local_epochs(1, batch_size=8)
    duel = cached_duel(jnp.float64, work, ragged)
    settings = {
        "work": work,
        "global_rate": 0.9,
        "local_rate": 0.02,
        "server_optimizer": SERVER_OPTIMIZERS[server],
        "client_optimizer": CLIENT_OPTIMIZERS[client],
        "weighting": weighting,
    }
    if combination:
        algorithm = fedhyper(loss_fn, combination, hyper_rate=0.1, **settings)
    else:
        algorithm = fedavg(loss_fn, **settings)
    records = duel.reference(
        schedulers=frozenset(combination.split("+")) - {""},
        alpha=0.9,
        beta=0.02,
        kappa_global=0.1,
        kappa_server_local=0.1,
        kappa_client=0.1,
        server_optimizer=server,
        client_optimizer=client,
        weighting=weighting,
    )
    assert_same(*duel.package(algorithm), records, 1e-9)


def test_schedules_of_both_rates_equal_the_reference(ragged, float64):
    work = local_steps(4, batch_size=8, with_replacement=True)
    duel = Duel(ragged, jnp.float64, work)
    algorithm = fedavg(
        loss_fn,
        work=work,
        global_rate=optax.linear_schedule(1.0, 0.5, 15),
        local_rate=lambda t: 0.1 * 0.9**t,
        schedule_rounds=20,
    )
    records = duel.reference(
        beta=0.1, alpha_schedule=lambda t: max(0.5, 1.0 - 0.5 * t / 15), beta_schedule=lambda t: 0.1 * 0.9**t
    )
    assert_same(*duel.package(algorithm), records, 1e-9)


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_where_the_raw_rule_diverges_each_round_equals_the_reference(ragged, float64, combination):
    """Errors grow without bound along a diverging run, so each round starts from the package's own state."""
    work = local_epochs(3, batch_size=8)
    duel = Duel(ragged, jnp.float64, work, rounds=20)
    states, infos = duel.package(fedhyper(loss_fn, combination, work=work, local_rate=3.0, hyper_rate=1.0))
    clipped = sum(int(i.global_rate_clipped) + int(i.local_rate_clipped) for i in infos)
    assert clipped >= 5 or combination in ("G", "SL", "G+SL")
    for t, (state, info) in enumerate(zip(states[:-1], infos, strict=True)):
        before = reference.ServerState(
            w=flatten(state.params),
            alpha=float(state.global_rate.rate),
            beta=float(state.local_rate.rate),
            previous_pseudo_gradient=flatten(state.pseudo_gradient),
            previous_direction=flatten(state.pseudo_gradient),
            optimizer={},
            round=t,
        )
        record = reference.round_from_state(
            duel.problem.gradient,
            before,
            duel.cohorts[t],
            duel.batches[t],
            duel.sizes,
            schedulers=frozenset(combination.split("+")),
            local_bounds=(0.3, 30.0),
        )
        after = states[t + 1]
        assert np.linalg.norm(flatten(after.params) - record.w) <= 1e-9 * np.linalg.norm(record.w)
        np.testing.assert_allclose(info.global_rate, record.alpha, rtol=1e-9)
        np.testing.assert_allclose(after.local_rate.rate, record.state.beta, rtol=1e-9)


def test_clients_that_are_not_finite_are_left_out_as_in_the_reference(ragged, float64):
    """Client 2 overflows; both renormalise the weights over the others."""
    examples, rows = ragged
    examples = {**examples, "x": examples["x"].copy()}
    examples["x"][rows[2]] *= 1e200
    work = local_epochs(1, batch_size=8)
    duel = Duel((examples, rows), jnp.float64, work, rounds=1)
    duel.cohorts = [np.array([0, 2, 5, 7, 9, 11])]
    draw = {int(m): client_batches(duel.key, 0, duel.data, int(m), work) for m in duel.cohorts[0]}
    duel.batches = [
        {m: [np.asarray(b.rows[k])[np.asarray(b.mask[k])] for k in range(int(b.num_steps))] for m, b in draw.items()}
    ]
    algorithm = fedhyper(loss_fn, "G+CL", work=work, local_rate=0.05)
    states, infos = duel.package(algorithm)
    with np.errstate(all="ignore"):
        records = duel.reference(schedulers=frozenset({"G", "CL"}), beta=0.05)
    assert not records[0].survived[1]
    assert int(infos[0].left_out) == 1
    assert int(infos[0].participants) == 5
    np.testing.assert_allclose(flatten(states[1].params), records[0].w, rtol=1e-9)
