"""The simulator equals the independent NumPy transcription of SPEC.md section 2, fed the same batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax import fedavg, fedhyper
from fedhyper_jax.data import local_epochs, local_steps
from tests.duel import Duel, cached_duel, flatten
from tests.helpers import cases, product
from tests.helpers import logistic_loss as loss_fn
from tests.reference import fedhyper_numpy as reference

COMBINATIONS = ["G", "SL", "CL", "G+SL", "G+CL", "SL+CL", "G+SL+CL"]
SERVER_OPTIMIZERS = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "adam": optax.adam(1e-2),
    "adagrad": optax.adagrad(1e-2),
    "yogi": optax.yogi(1e-2),
}
CLIENT_OPTIMIZERS = {"sgd": optax.sgd(1.0), "momentum": optax.sgd(1.0, momentum=0.9)}


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


WORKS = {"epochs": local_epochs(2, batch_size=8), "steps": local_steps(7, batch_size=6)}
DTYPES = {"float32": (jnp.float32, 1e-5), "float64": (jnp.float64, 1e-9)}


@functools.cache
def round_of(combination, work):
    """The compiled round, to which rates and hyper rates are data."""
    return jax.jit(fedhyper(loss_fn, combination, work=work, local_rate=0.1).round)


def settings_of_the_paper():
    """All three by epochs in float64 and by steps in float32; one by one test_contracts.py transcribes them."""
    for combination in COMBINATIONS:
        for work in WORKS:
            for dtype in DTYPES:
                again = combination != "G+SL+CL" or (work, dtype) not in (("epochs", "float64"), ("steps", "float32"))
                case = (combination, WORKS[work], *DTYPES[dtype])
                yield (product if again else pytest.param)(*case, id=f"{dtype}-{work}-{combination}")


@pytest.mark.parametrize(("combination", "work", "dtype", "tolerance"), list(settings_of_the_paper()))
def test_every_combination_equals_the_reference(ragged, combination, work, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        duel = cached_duel(dtype, work, ragged)
        # Every rate moves and some updates are clipped, yet the run is stable.
        settings = {"hyper_rate": 0.1, "global_rate": 1.0, "local_rate": 0.05}
        algorithm = fedhyper(loss_fn, combination, work=work, **settings)
        states, infos = duel.package(algorithm, round_of(combination, work))
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
        ("momentum", "momentum", "uniform", "G+SL+CL"),
        # (What stands above joins the same doors, and has the product with the step that the server made; these
        # servers, and the plain product beside one, are worked out by hand in test_known_mistakes.py.)
        product("adam", "momentum", "examples", ""),
        product("yogi", "sgd", "examples", "G+SL+CL"),
        product("sgd", "sgd", "examples", ""),
        *(product(server, "sgd", "examples", "G+SL+CL") for server in ("momentum", "adam", "adagrad")),
        product("sgd", "momentum", "examples", "G+SL+CL"),
    ],
)
def test_any_optimizers_on_either_side_equal_the_reference(ragged, float64, server, client, weighting, combination):
    work = WORKS["epochs"]
    duel = cached_duel(jnp.float64, work, ragged)
    inner_product = "applied" if weighting == "uniform" else "pseudo_gradient"
    settings = {
        "work": work,
        "global_rate": 0.9,
        "local_rate": 0.02,
        "server_optimizer": SERVER_OPTIMIZERS[server],
        "client_optimizer": CLIENT_OPTIMIZERS[client],
        "weighting": weighting,
    }
    if combination:
        algorithm = fedhyper(loss_fn, combination, hyper_rate=0.1, inner_product=inner_product, **settings)
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
        inner_product=inner_product,
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


@pytest.mark.parametrize("combination", cases(COMBINATIONS, later=set(COMBINATIONS) - {"G+SL+CL"}))
def test_where_the_raw_rule_diverges_each_round_equals_the_reference(ragged, float64, combination):
    """Errors grow without bound along a diverging run, so each round starts from the package's own state."""
    work = WORKS["epochs"]
    duel = cached_duel(jnp.float64, work, ragged)
    algorithm = fedhyper(loss_fn, combination, work=work, local_rate=3.0, hyper_rate=1.0)
    states, infos = duel.package(algorithm, round_of(combination, work))
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
    work = WORKS["epochs"]
    duel = Duel((examples, rows), jnp.float64, work, rounds=1, cohorts=[np.int32([0, 2, 5, 7, 9, 11])])
    algorithm = fedhyper(loss_fn, "G+SL+CL", work=work, local_rate=0.05)
    states, infos = duel.package(algorithm, round_of("G+SL+CL", work))
    with np.errstate(all="ignore"):
        records = duel.reference(schedulers=frozenset({"G", "SL", "CL"}), beta=0.05)
    assert not records[0].survived[1]
    assert int(infos[0].left_out) == 1
    assert int(infos[0].participants) == 5
    np.testing.assert_allclose(flatten(states[1].params), records[0].w, rtol=1e-9)
