"""simulate, run, sweep and evaluation."""

import warnings

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax import (
    EvaluationData,
    fedavg,
    fedhyper,
    make_evaluation,
    metrics,
    rounds_to_target,
    run,
    simulate,
    sweep,
)
from fedhyper_jax.base import Model
from fedhyper_jax.data import Cohort, local_epochs, pack, sample_cohort
from fedhyper_jax.engine.simulation import RoundError
from fedhyper_jax.tasks.evaluation import client_summary
from tests.helpers import logistic_loss, logistic_params, product

WORK = local_epochs(1, batch_size=8)
MODEL = Model(init=None, apply=lambda params, x: x @ params["weights"] + params["bias"])
EVALUATE = make_evaluation(metrics.classification(MODEL), batch_size=16)


def algorithm(**settings):
    return fedhyper(logistic_loss, "G+SL+CL", work=WORK, **{"local_rate": 0.05, "hyper_rate": 0.3, **settings})


@pytest.fixture(scope="module")
def evaluation_data(federation):
    return EvaluationData(test=federation.examples, clients=federation)


SETTINGS = {"rounds": 6, "cohort_size": 5, "eval_every": 4, "evaluate": EVALUATE}


@pytest.fixture(scope="module")
def whole(key, federation, evaluation_data):
    """(algorithm, start, end, history) of six rounds by `simulate`; tests below come to the same in other ways."""
    chosen = algorithm(strategy="sequential")
    start = chosen.init(logistic_params())
    return chosen, start, *simulate(chosen, key, start, federation, evaluation_data=evaluation_data, **SETTINGS)


def test_simulate_equals_rounds_one_by_one(key, federation, whole):
    chosen, state, end, history = whole
    round_fn = jax.jit(chosen.round)
    for t in range(6):
        cohort_key, _ = jax.random.split(jax.random.fold_in(key, t))
        state, info = round_fn(key, state, Cohort(data=federation, client_ids=sample_cohort(cohort_key, 20, 5)))
        chex.assert_trees_all_close(jax.tree.map(lambda leaf, t=t: leaf[t], history.info), info, rtol=1e-5)
    chex.assert_trees_all_close(end, state, rtol=1e-5)


# (test_compare.py and test_resume.py have short last chunks)
@pytest.mark.parametrize("rounds_per_chunk", [3, product(4), product(6)])
def test_run_equals_simulate_whatever_the_chunks(key, federation, evaluation_data, rounds_per_chunk, whole):
    chosen, start, end, history = whole
    seen = []
    run_end, run_history = run(
        chosen,
        key,
        start,
        federation,
        rounds_per_chunk=rounds_per_chunk,
        callbacks=[lambda progress: seen.append((progress.first_round, progress.rounds_done, progress.total_rounds))],
        evaluation_data=evaluation_data,
        **SETTINGS,
    )
    assert history.evaluated.tolist() == [False, False, False, True, False, True]
    assert np.isfinite(history.evaluation["test_accuracy"]).tolist() == history.evaluated.tolist()
    assert seen == {3: [(0, 3, 6), (3, 6, 6)], 4: [(0, 4, 6), (4, 6, 6)], 6: [(0, 6, 6)]}[rounds_per_chunk]
    chex.assert_trees_all_close(run_end, end, rtol=1e-5)
    chex.assert_trees_all_close(run_history, jax.tree.map(np.asarray, history), rtol=1e-5)


@pytest.mark.product  # as `fedhyper run --strategy debug` does, in test_cli.py
def test_run_without_jit_serves_the_debug_strategy(key, federation, evaluation_data):
    settings = {
        "evaluate": EVALUATE,
        "evaluation_data": evaluation_data,
        "eval_every": 2,
        "rounds": 3,
        "cohort_size": 3,
    }
    fast, slow = algorithm(), algorithm(strategy="debug")
    end, history = run(fast, key, fast.init(logistic_params()), federation, **settings)
    slow_end, slow_history = run(slow, key, slow.init(logistic_params()), federation, compiles=False, **settings)
    chex.assert_trees_all_close(slow_end, end, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(slow_history, history, rtol=1e-4, atol=1e-5)

    def broken(params, batch):
        raise TypeError("bad layer")

    chosen = fedavg(broken, work=WORK, local_rate=0.1, strategy="debug")
    with pytest.raises(RoundError, match=r"round 0: client \d+, local step 0: bad layer"):
        run(chosen, key, chosen.init(logistic_params()), federation, compiles=False, rounds=1, cohort_size=2)


def test_a_run_compiles_once_whatever_the_length_of_a_chunk_and_the_rates(key, federation):
    traces = []

    def counted_loss(params, batch):
        traces.append(1)
        return logistic_loss(params, batch)

    def make(rate):
        return fedavg(counted_loss, work=WORK, local_rate=rate)

    chosen = make(0.05)
    settings = {"rounds_per_chunk": 2, "cohort_size": 4}
    run(chosen, key, chosen.init(logistic_params()), federation, rounds=1, **settings)
    once = len(traces)
    run(chosen, key, make(0.3).init(logistic_params()), federation, rounds=5, **settings)  # the last chunk is shorter
    assert len(traces) == once


@pytest.mark.product  # as the sweep below does
def test_simulate_is_pure_and_vmaps_over_seeds(federation):
    chosen = algorithm()
    keys = jax.random.split(jax.random.key(3), 3)
    start = chosen.init(logistic_params())

    def one(key):
        return simulate(chosen, key, start, federation, rounds=3, cohort_size=4)[0].params

    together = jax.vmap(one)(keys)
    for index, key in enumerate(keys):
        chex.assert_trees_all_close(jax.tree.map(lambda p, i=index: p[i], together), one(key), rtol=1e-4, atol=1e-6)


def test_sweep_equals_runs_one_by_one(key, federation, evaluation_data, whole):
    """Of rates and seeds, each seed with a start of its own."""
    _, _, end, expected = whole
    keys = jnp.stack([jax.random.key(3), key, jax.random.key(4)])
    params = jax.tree.map(lambda p: jnp.stack([2 * p, p, p]), logistic_params())
    finals, history = sweep(
        lambda local_rate: algorithm(local_rate=local_rate, strategy="sequential"),
        {"local_rate": jnp.array([0.01, 0.05])},
        keys,
        params,
        federation,
        rounds_per_chunk=3,
        evaluation_data=evaluation_data,
        **SETTINGS,
    )
    assert history.info.round.shape == (2, 3, 6)
    chex.assert_trees_all_close(jax.tree.map(lambda p: p[1, 1], finals), end.params, rtol=1e-4, atol=1e-6)
    mine = jax.tree.map(lambda leaf: leaf[1, 1], history)
    chex.assert_trees_all_close(mine, jax.tree.map(np.asarray, expected), rtol=1e-4, atol=1e-5)
    for other in ((0, 1), (1, 0), (1, 2)):
        assert not np.allclose(history.info.client_loss[other], history.info.client_loss[1, 1], rtol=1e-3)


def test_rounds_that_are_not_due_are_not_evaluated_even_under_vmap(federation, evaluation_data):
    """A batched condition would become a select, and every round would pay for an evaluation."""
    chosen = algorithm()
    keys = jax.random.split(jax.random.key(0), 2)

    def one(key):
        return simulate(
            chosen,
            key,
            chosen.init(logistic_params()),
            federation,
            rounds=4,
            cohort_size=2,
            evaluate=EVALUATE,
            evaluation_data=evaluation_data,
            eval_every=2,
        )[1].evaluation

    assert "cond[" in str(jax.make_jaxpr(jax.vmap(one))(keys))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "rounds must be an integer ≥ 1, got 0"),
        ({"rounds": 2.0}, "rounds must be an integer ≥ 1, got 2.0"),
        ({"cohort_size": 21}, "cohort_size=21 and population=20; use cohort_size ≤ 20"),
        ({"eval_every": 0}, "eval_every must be an integer ≥ 1, got 0"),
        ({"evaluate": EVALUATE}, "give both evaluate and evaluation_data"),
    ],
)
@pytest.mark.parametrize("runner", [simulate, run])
def test_bad_runs_are_refused(key, federation, settings, message, runner):
    chosen = algorithm()
    with pytest.raises(ValueError, match=message):
        runner(chosen, key, chosen.init(logistic_params()), federation, **{"rounds": 2, "cohort_size": 2, **settings})


def test_a_schedule_shorter_than_the_run_is_refused(key, federation):
    chosen = fedavg(logistic_loss, work=WORK, local_rate=optax.cosine_decay_schedule(0.1, 5), schedule_rounds=5)
    with pytest.raises(ValueError, match="schedule of local_rate is tabulated for 5 rounds, but the run has 6"):
        simulate(chosen, key, chosen.init(logistic_params()), federation, rounds=6, cohort_size=2)


def test_sweeps_check_their_settings(key, federation):
    def make(local_rate, hyper_rate=1.0):
        return algorithm(local_rate=local_rate, hyper_rate=hyper_rate)

    params = jax.tree.map(lambda p: p[None], logistic_params())
    for settings, message in [
        ({"local_rate": jnp.array([0.1, -0.1])}, "local_rate must be finite and > 0, got -0.1"),
        ({"local_rate": jnp.ones(2), "hyper_rate": jnp.ones(3)}, "one common length"),
        ({}, "one common length"),
        ({"local_rate": np.array([0.1, 1e300])}, r"settings\['local_rate'\] has 1e\+300 in row 1, which float32"),
        ({"local_rate": [0.1, 0.2], "hyper_rate": [1.0, 1e-50]}, r"settings\['hyper_rate'\] must lie in the range of"),
        ({"local_rate": [0.1], "seed": np.array([2**32])}, r"settings\['seed'\] has 4294967296 in row 0, which int32"),
    ]:
        with pytest.raises(ValueError, match=message):
            sweep(make, settings, key[None], params, federation, rounds=1, cohort_size=1)
    broken = jax.tree.map(lambda p: jnp.stack([p, jnp.full_like(p, jnp.nan)]), logistic_params())
    with pytest.raises(ValueError, match=r"params\['bias'\] has NaN or infinite entries"):  # of the second seed
        sweep(make, {"local_rate": [0.1]}, jax.random.split(key), broken, federation, rounds=1, cohort_size=1)


# ------------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("batch_size", [7, 10_000, product(1), product(16)])
def test_evaluation_is_exact_whatever_the_batch_size(federation, evaluation_data, batch_size):
    params = logistic_params()
    evaluate = make_evaluation(metrics.classification(MODEL), batch_size=batch_size)
    values = jax.jit(evaluate)(params, evaluation_data)
    logits = np.asarray(federation.examples["x"]) @ np.asarray(params["weights"])
    labels = np.asarray(federation.examples["y"])
    right = logits.argmax(axis=1) == labels
    log_z = np.log(np.exp(logits).sum(axis=1))
    losses = log_z - logits[np.arange(len(labels)), labels]
    assert float(values["test_accuracy"]) == pytest.approx(right.mean(), rel=1e-6)
    assert float(values["test_loss"]) == pytest.approx(losses.mean(), rel=1e-5)
    own = np.split(np.asarray(federation.order), np.asarray(federation.offsets[1:-1]))
    per_client = np.array([right[rows].mean() for rows in own])
    assert float(values["client_accuracy_mean"]) == pytest.approx(per_client.mean(), rel=1e-5)
    assert float(values["client_accuracy_std"]) == pytest.approx(per_client.std(), rel=1e-5)
    assert float(values["client_accuracy_worst_decile"]) == pytest.approx(np.sort(per_client)[:2].mean(), rel=1e-5)
    client_losses = np.sort([losses[rows].mean() for rows in own])
    assert float(values["client_loss_worst_decile"]) == pytest.approx(client_losses[-2:].mean(), rel=1e-5)


def test_clients_without_examples_do_not_count():
    summary = client_summary(jnp.array([0.5, 9.0, 1.0]), jnp.array([True, False, True]))
    assert {name: float(value) for name, value in summary.items()} == {"mean": 0.75, "std": 0.25, "worst_decile": 0.5}


def test_the_worst_decile_is_the_mean_of_the_lowest_tenth():
    values = jnp.arange(30.0)[::-1]
    assert float(client_summary(values, jnp.ones(30, bool))["worst_decile"]) == 1.0
    assert float(client_summary(values, jnp.ones(30, bool), highest_is_worst=True)["worst_decile"]) == 28.0


def test_diverged_parameters_count_no_example_as_right(federation):
    params = jax.tree.map(lambda p: p * jnp.nan, logistic_params())
    assert not np.any(metrics.classification(MODEL)(params, federation.examples)["accuracy"])


def test_rounds_to_target_takes_three_evaluations():
    assert rounds_to_target([4, 9, 14, 19], [0.9, 0.1, 0.8, 0.9], 0.6) == 15
    assert rounds_to_target([4, 9, 14, 19], [0.9, 0.1, 0.5, 0.9], 0.6) is None
    assert rounds_to_target([4, 9], [0.9, 0.9], 0.6) is None
    assert rounds_to_target([0, 1, 2, 3], [np.nan, 1.0, 1.0, 1.0], 0.9) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rounds_to_target([], [], 0.5) is None


def test_means_merge():
    values, mask = jnp.array([1.0, 2.0, 30.0]), jnp.array([True, True, False])
    a, b = metrics.Mean.of(values, mask), metrics.Mean.of(jnp.array([6.0]), jnp.array([True]))
    assert float(a.value) == 1.5
    assert float(a.merge(b).value) == 3.0
    chex.assert_trees_all_equal(metrics.Mean.zero().merge(a), a)


def test_ones_own_model_and_loss(key):
    """A regression that no built-in knows, on ids that are words."""
    from fedhyper_jax.data import from_client_ids
    from fedhyper_jax.tasks.losses import with_model

    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 2)).astype(np.float32)
    data = from_client_ids({"x": inputs, "y": inputs @ np.float32([2.0, -1.0])}, rng.choice(["ann", "bob", "eve"], 60))
    model = Model(init=lambda key, x: jnp.zeros(x.shape[1:]), apply=lambda w, x: x @ w)
    loss_fn = with_model(model, optax.losses.huber_loss)
    chosen = fedhyper(loss_fn, "G+CL", work=local_epochs(2, 8), local_rate=0.2)
    state, _ = simulate(chosen, key, chosen.init(model.init(key, inputs)), data, rounds=40, cohort_size=2)
    np.testing.assert_allclose(state.params, [2.0, -1.0], atol=0.1)


def large_constants(jaxpr, size):
    """Shapes of the constants of at least ``size`` numbers in the programs that a program calls, however deep."""
    found = []
    for equation in jaxpr.jaxpr.eqns:
        parameters = jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda p: isinstance(p, jax.extend.core.ClosedJaxpr)
        )
        for called in (p for p in parameters if isinstance(p, jax.extend.core.ClosedJaxpr)):
            found += [np.shape(constant) for constant in called.consts if np.size(constant) >= size]
            found += large_constants(called, size)
    return found


def test_pools_reach_compiled_programs_as_arguments(key):
    """A pool closed over stands in the compiled program as a constant: the search finds such a one, none of ours."""
    pool = {"x": np.full((5000, 5), 0.125, np.float32), "y": np.zeros(5000, np.int32)}
    data = pack(pool, [np.arange(5000)])
    test = EvaluationData(test=data.examples, clients=data)
    closed_over = jnp.asarray(pool["x"])

    def constants(loss_fn):
        chosen = fedavg(loss_fn, work=WORK, local_rate=0.1)
        state = chosen.init(logistic_params())
        settings = {"rounds": 1, "cohort_size": 1, "evaluate": EVALUATE, "evaluation_data": test}
        return large_constants(jax.make_jaxpr(lambda: simulate(chosen, key, state, data, **settings))(), 5000)

    def leaking(params, batch):
        return logistic_loss(params, batch) + 0.0 * jnp.sum(closed_over)

    assert (5000, 5) in constants(leaking)
    assert constants(logistic_loss) == []
