"""Where things could go wrong quietly: numbers at the edge of the dtype, wrong shapes, foreign states, odd callers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax import EvaluationData, fedavg, fedhyper, losses, make_evaluation, metrics, run, simulate, sweep
from fedhyper_jax.base import Model
from fedhyper_jax.data import Cohort, client_batches, local_epochs, local_steps, make_cohort, pack
from fedhyper_jax.hypergradient import adapt, adaptive_rate
from fedhyper_jax.parts.rates import Feedback, hypergradient
from tests.helpers import cases, logistic_loss, logistic_params, play, product

WORK = local_epochs(1, batch_size=8)


def linear(scale):
    """A loss of value 0 and gradient x·scale at every w."""
    return lambda w, batch: (w - jax.lax.stop_gradient(w)) * batch["x"] * scale


@pytest.fixture
def ones():
    """Two clients of twenty ones."""
    return pack({"x": np.ones(40, np.float32)}, [np.arange(20), np.arange(20, 40)])


# ------------------------------------------------------------------------------------------------ numbers at the edge


def test_a_mean_of_finite_updates_does_not_overflow(key, ones):
    """Δ_m = 3e37 for both clients of 20 examples: Σ n_m Δ_m is beyond float32, the mean is not."""
    algorithm = fedavg(linear(3e37), work=local_epochs(1, batch_size=20), local_rate=1.0)
    state, infos = play(algorithm, key, ones, [[0, 1]], jnp.zeros(()))
    assert float(state.params) == pytest.approx(-3e37, rel=1e-6)
    assert int(infos[0].participants) == 2


def test_a_server_step_that_overflows_changes_nothing_and_is_counted(key, ones):
    algorithm = fedavg(linear(3e38), work=local_epochs(1, batch_size=20), local_rate=1.0, global_rate=2.0)
    state, infos = play(algorithm, key, ones, [[0, 1]], jnp.zeros(()))
    assert float(state.params) == 0.0
    assert (int(infos[0].participants), int(infos[0].left_out), int(state.round)) == (0, 2, 1)


def test_a_product_that_overflows_moves_no_rate_and_is_counted(key, ones):
    """Δ = 1e20 is finite, ⟨Δ, Δ⟩ is not: training goes on, α and β stay."""
    algorithm = fedhyper(linear(1e20), "G+SL", work=local_epochs(1, batch_size=20), local_rate=1.0)
    state, infos = play(algorithm, key, ones, [[0, 1], [0, 1]], jnp.zeros(()))
    assert float(state.params) == pytest.approx(-2e20, rel=1e-6)
    assert [int(i.non_finite_products) for i in infos] == [0, 1]
    assert [int(i.global_rate_updates) for i in infos] == [1, 0]
    assert [float(i.global_rate) for i in infos] == [1.0, 1.0]
    assert float(infos[1].inner_product) == np.inf
    client = fedhyper(linear(1e20), "CL", work=local_steps(3, batch_size=20), local_rate=1.0)
    _, infos = play(client, key, ones, [[0, 1]], jnp.zeros(()))
    assert (int(infos[0].non_finite_products), int(infos[0].local_rate_updates)) == (4, 0)


def test_the_rule_never_makes_an_infinite_rate():
    state, observed = adapt(adaptive_rate(1.0, 10.0, (0.0, np.inf), jnp.float32), jnp.float32(2e38))
    assert float(state.rate) == 1.0
    assert bool(observed.non_finite)
    _, report = (rule := hypergradient(1.0)).update(
        rule.init(jnp.zeros(1)), Feedback(jnp.int32(1), jnp.float32(np.nan))
    )
    assert (int(report.updates), int(report.non_finite)) == (0, 1)


@pytest.mark.parametrize("value", [1e-50, 1e60])
def test_rates_that_float32_cannot_hold_are_refused(value):
    with pytest.raises(ValueError, match="local_rate must lie in the range of float32"):
        fedavg(logistic_loss, work=WORK, local_rate=value)


def test_a_client_whose_loss_is_not_finite_is_left_out_even_if_its_update_is(key, federation):
    bad = np.asarray(federation.order[federation.offsets[5] : federation.offsets[6]])
    flagged = {**federation.examples, "bad": jnp.zeros(len(federation.order)).at[bad].set(1.0)}
    data = pack(
        {name: np.asarray(a) for name, a in flagged.items()},
        np.split(np.asarray(federation.order), np.asarray(federation.offsets[1:-1])),
    )

    def loss_fn(params, batch):
        return logistic_loss(params, batch) + jnp.where(batch["bad"] > 0, jnp.inf, 0.0)

    algorithm = fedavg(loss_fn, work=WORK, local_rate=0.1)
    state, infos = play(algorithm, key, data, [[0, 5, 7]])
    expected, _ = play(algorithm, key, data, [[0, data.population, 7]])  # a padded slot
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-6)
    assert int(infos[0].left_out) == 1


def test_norms_and_products_are_those_of_numpy(key, federation):
    algorithm = fedhyper(logistic_loss, "G", work=WORK, local_rate=0.1)
    state, before = algorithm.init(logistic_params()), np.zeros(18)
    round_fn = jax.jit(algorithm.round)
    for ids in ([0, 3], [2, 9]):
        state, info = round_fn(key, state, make_cohort(federation, ids))
        delta = np.concatenate([np.asarray(leaf, float).ravel() for leaf in jax.tree.leaves(state.pseudo_gradient)])
        assert float(info.pseudo_gradient_norm) == pytest.approx(np.linalg.norm(delta), rel=1e-6)
        assert float(info.inner_product) == pytest.approx(delta @ before, rel=1e-5)
        before = delta


# ------------------------------------------------------------------------------------------------ schedules


FALLING = {"work": local_epochs(2, 8), "local_rate": lambda t: 0.1 * 0.3**t, "schedule_rounds": 4}


@pytest.mark.product  # test_round.py: without schedules it is FedAvg, and a round serves all schedules
def test_with_hyper_rate_zero_CL_follows_any_schedule_like_fedavg(key, federation):
    cohorts, settings = [[0, 2, 5]] * 4, FALLING
    expected, _ = play(fedavg(logistic_loss, **settings), key, federation, cohorts)
    algorithm = fedhyper(logistic_loss, "CL", hyper_rate=0.0, local_bounds=(0.001, 1.0), **settings)
    state, _ = play(algorithm, key, federation, cohorts)
    chex.assert_trees_all_equal(state.params, expected.params)


def test_a_schedule_that_leaves_the_bounds_of_CL_is_refused():
    with pytest.raises(ValueError, match="in round 2, outside CL's local_bounds="):
        fedhyper(logistic_loss, "CL", **FALLING)


def test_a_schedule_goes_on_through_a_round_without_survivors(key, federation):
    algorithm = fedavg(logistic_loss, work=WORK, local_rate=lambda t: 0.1 * 0.5**t, schedule_rounds=8)
    _, infos = play(algorithm, key, federation, [[0], [20], [0], [1]])
    np.testing.assert_allclose([i.local_rate for i in infos], [0.1, 0.05, 0.025, 0.0125], rtol=1e-6)


def test_schedules_in_plain_python_and_numpy():
    def stepped(count):
        return 0.1 if count < 3 else 0.01

    for schedule in (stepped, lambda count: 0.1 * (1 + np.cos(count / 10))):
        algorithm = fedavg(logistic_loss, work=WORK, local_rate=schedule, schedule_rounds=6)
        table = algorithm.init(logistic_params()).local_rate.table
        np.testing.assert_allclose(table, [schedule(t) for t in range(6)], rtol=1e-6)


def test_a_schedule_of_one_round_is_refused():
    with pytest.raises(ValueError, match="schedule_rounds must be ≥ 2, got 1"):
        fedavg(logistic_loss, work=WORK, local_rate=lambda t: 0.1, schedule_rounds=1)


# ------------------------------------------------------------------------------------------------ dtypes and types


def test_batches_do_not_depend_on_the_precision(key, federation):
    draw = jax.jit(client_batches, static_argnames="work")
    for work in (WORK, local_steps(4, 8, with_replacement=True)):
        expected = draw(key, 0, federation, 2, work=work)
        with jax.enable_x64(True):
            chex.assert_trees_all_equal(draw(key, 0, federation, 2, work=work), expected)


def test_parameters_of_weak_or_python_type_are_traced_once(key, ones):
    algorithm = fedhyper(linear(0.1), "G+CL", work=WORK, local_rate=0.1)
    round_fn = jax.jit(chex.assert_max_traces(algorithm.round, n=1))
    for start in (0.5, jnp.asarray(0.5), np.float32(0.5)):
        state = algorithm.init(start)
        for _ in range(2):
            state, _ = round_fn(key, state, make_cohort(ones, [0, 1]))


def test_legacy_keys_give_the_same_run():
    """Which clients come, and their batches, are drawn."""
    data = pack({"x": np.arange(1.0, 41.0, dtype=np.float32)}, np.split(np.arange(40), 8))
    algorithm = fedavg(linear(0.1), work=local_steps(1, batch_size=2), local_rate=0.1)
    start = algorithm.init(jnp.zeros(()))
    ends = [
        simulate(algorithm, key, start, data, rounds=2, cohort_size=3)
        for key in (jax.random.key(7), jax.random.PRNGKey(7))
    ]
    chex.assert_trees_all_equal(*ends)
    _, history = ends[0]
    assert not history.evaluated.any() and history.evaluation == {}  # as nothing was to be evaluated


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, bool])
def test_evaluation_counts_in_float32(dtype):
    """1,000 right answers of one client would stop at 256 in bfloat16."""
    count = 1000
    data = pack({"x": np.ones(count, np.float32)}, [np.arange(count)])
    evaluate = make_evaluation(lambda params, batch: {"accuracy": (batch["x"] == 1).astype(dtype)})
    values = jax.jit(lambda data: evaluate(None, data))(EvaluationData(test=data.examples, clients=data))
    assert float(values["test_accuracy"]) == float(values["client_accuracy_mean"]) == 1.0


# ------------------------------------------------------------------------------------------------ composition


def test_sweeps_vary_whatever_the_factory_does_with_a_setting(key, federation):
    """A server optimizer's own rate is no part of the state, and yet it is swept: steps from one Δ go by it."""

    def make(server_rate):
        return fedavg(logistic_loss, work=WORK, local_rate=0.1, server_optimizer=optax.sgd(server_rate))

    params = jax.tree.map(lambda p: p[None], logistic_params())
    rates = jnp.array([0.25, 1.0])
    finals, _ = sweep(make, {"server_rate": rates}, key[None], params, federation, rounds=1, cohort_size=3)
    short, long = (jax.tree.map(lambda p, f, i=i: f[i, 0] - p[0], params, finals) for i in range(2))
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: 4 * leaf, short), long, rtol=1e-4, atol=1e-6)
    assert np.abs(long["weights"]).max() > 1e-3


def test_sweeps_refuse_keys_and_parameters_that_do_not_match(key, federation):
    def make(local_rate):
        return fedavg(logistic_loss, work=WORK, local_rate=local_rate)

    settings, one = {"local_rate": jnp.array([0.1])}, jax.tree.map(lambda p: p[None], logistic_params())
    with pytest.raises(ValueError, match="keys must have one axis of seeds"):
        sweep(make, settings, key, one, federation, rounds=1, cohort_size=1)
    with pytest.raises(ValueError, match="leading axis of 2 seeds"):
        sweep(make, settings, jax.random.split(key), one, federation, rounds=1, cohort_size=1)


OPTIMIZERS = {
    "adamw": optax.adamw(0.01),
    "reduce_on_plateau": optax.contrib.reduce_on_plateau(),
    "MultiSteps": optax.MultiSteps(optax.sgd(1.0), 2),
    "inject_hyperparams": optax.inject_hyperparams(optax.sgd)(learning_rate=0.5),
    "add_noise": optax.add_noise(0.01, 0.5, 0),
}


@pytest.mark.parametrize("name", cases(OPTIMIZERS, later=set(OPTIMIZERS) - {"MultiSteps"}))
def test_other_optimizers_run_on_either_side(key, federation, name):
    """On both in one program."""
    both = {side: OPTIMIZERS[name] for side in ("server_optimizer", "client_optimizer")}
    algorithm = fedavg(logistic_loss, work=WORK, local_rate=0.1, **both)
    _, infos = play(algorithm, key, federation, [[0, 2], [3]])
    assert int(infos[1].left_out) == 0


@pytest.mark.product  # the eager loop hands an optimizer what the compiled one does
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_optimizers_run_without_jit(key, federation, name):
    settings = {"work": WORK, "local_rate": 0.1, "client_optimizer": OPTIMIZERS[name]}
    state, _ = play(fedavg(logistic_loss, **settings), key, federation, [[0, 2], [3]])
    slow, _ = play(fedavg(logistic_loss, strategy="debug", **settings), key, federation, [[0, 2], [3]], jit=False)
    chex.assert_trees_all_close(slow.params, state.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("runner", [run, product(simulate)])
def test_a_run_goes_on_where_it_stopped(key, federation, runner):
    algorithm = fedavg(logistic_loss, work=WORK, local_rate=lambda t: 0.1 * 0.5**t, schedule_rounds=6)
    model = Model(init=None, apply=lambda params, x: x @ params["weights"] + params["bias"])
    settings = {
        "cohort_size": 3,
        "evaluate": make_evaluation(metrics.classification(model)),
        "evaluation_data": EvaluationData(test=federation.examples),
        "eval_every": 2,
    }
    start = algorithm.init(logistic_params())
    whole, history = run(algorithm, key, start, federation, rounds=6, rounds_per_chunk=3, **settings)
    state, first = runner(algorithm, key, start, federation, rounds=3, **settings)
    state, second = runner(algorithm, key, state, federation, rounds=3, **settings)
    chex.assert_trees_all_close(state.params, whole.params, rtol=1e-5)
    assert first.evaluated.tolist() == [False, True, True]  # the last round of a run is evaluated
    assert second.evaluated.tolist() == history.evaluated.tolist()[3:] == [True, False, True]
    assert second.info.round.tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match="tabulated for 6 rounds, but the run has 7"):
        runner(algorithm, key, state, federation, rounds=1, **settings)
    with pytest.raises(ValueError, match="first_round is 0, but the state's next round is 6"):
        simulate(algorithm, key, state, federation, rounds=1, first_round=0, cohort_size=3)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("loss_fn", "shape"),
    [
        (lambda params, batch: logistic_loss(params, batch).mean(), r"\(\)"),
        (lambda params, batch: logistic_loss(params, batch)[:, None], r"\(8, 1\)"),
    ],
    ids=["mean", "column"],
)
def test_losses_that_are_not_per_example_are_refused(key, federation, loss_fn, shape):
    with pytest.raises(
        ValueError, match=rf"loss_fn must return one value per example, shape \(8,\), got shape {shape}"
    ):
        play(fedavg(loss_fn, work=WORK, local_rate=0.1), key, federation, [[0]])


def test_evaluations_of_something_else_are_refused(federation):
    evaluate = make_evaluation(lambda params, batch: {"accuracy": jnp.mean(batch["x"])})
    with pytest.raises(ValueError, match="the metric 'accuracy' must return one value per example"):
        evaluate(None, EvaluationData(test=federation.examples))
    for data, message in [
        (federation.examples, "must be EvaluationData"),
        (EvaluationData(), "must be EvaluationData"),
        (EvaluationData(test={"x": jnp.zeros((0, 5))}), "common length ≥ 1"),
        (EvaluationData(test={"x": jnp.zeros((3, 5)), "y": jnp.zeros(4)}), "common length ≥ 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(None, data)


@pytest.mark.parametrize("name", ["server_optimizer", "client_optimizer"])
@pytest.mark.parametrize("optimizer", [0.1, optax.adam])
def test_optimizers_that_are_none_are_refused(name, optimizer):
    with pytest.raises(ValueError, match=f"{name} must be an optax optimizer"):
        fedavg(logistic_loss, work=WORK, local_rate=0.1, **{name: optimizer})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.arange(3)}, r"params\['w'\] must be floating-point, got dtype int32"),
        ({"w": jnp.array([1.0, jnp.nan])}, r"params\['w'\] has NaN or infinite entries"),
        ({"w": np.array([1.0, 1e300])}, r"params\['w'\] has 1e\+300 in row 1, which float32 cannot hold"),
        (-1e300, r"params has -1e\+300, which float32 cannot hold"),
        ({}, "params has no arrays"),
    ],
)
def test_parameters_that_cannot_be_trained_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        fedavg(logistic_loss, work=WORK, local_rate=0.1).init(params)


def test_states_of_other_algorithms_are_refused(key, federation):
    algorithm = fedhyper(logistic_loss, "G", work=WORK, local_rate=0.1)
    others = [
        fedhyper(logistic_loss, "G+CL", work=WORK, local_rate=0.1),
        fedavg(logistic_loss, work=WORK, local_rate=0.1),
        fedhyper(logistic_loss, "G", work=WORK, local_rate=0.1, server_optimizer=optax.adam(0.1)),
    ]
    for other in others:
        with pytest.raises(ValueError, match="state does not belong to this algorithm"):
            algorithm.round(key, other.init(logistic_params()), make_cohort(federation, [0]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([2, 2, 3], "names a client twice"),
        ([-1, 2], r"must lie in \[0, 20\)"),
        ([0, 99], r"must lie in \[0, 20\)"),
        ([0, 2**32 + 1], r"must lie in \[0, 20\)"),
        ([0.5, 1.0], "1-D array of integers"),
        ([[0, 1]], "1-D array of integers"),
        ([], "1-D array of integers"),
        (3, "1-D array of integers"),
    ],
)
def test_impossible_cohorts_are_refused(key, federation, ids, message):
    with pytest.raises(ValueError, match=message):
        make_cohort(federation, ids)
    algorithm = fedavg(logistic_loss, work=WORK, local_rate=0.1)
    with pytest.raises(ValueError, match=message):
        algorithm.round(key, algorithm.init(logistic_params()), Cohort(data=federation, client_ids=np.array(ids)))


CLASSIFIER = Model(init=None, apply=lambda params, x: x @ params["weights"] + params["bias"])
DOORS = ("simulate", "run", "eagerly", "vmap", "sweep", "round")


@pytest.mark.parametrize("door", DOORS)
def test_labels_that_are_no_class_are_refused_before_training(key, federation, door):
    """By whatever door they come: those that a client owns, of three classes."""
    examples = {**federation.examples, "y": federation.examples["y"].at[3].set(3)}
    data, params = dataclasses.replace(federation, examples=examples), logistic_params()

    def make(local_rate):
        return fedavg(losses.cross_entropy(CLASSIFIER), work=WORK, local_rate=local_rate)

    algorithm, length = make(0.1), {"rounds": 1, "cohort_size": 2}
    state = algorithm.init(params)
    stacked = jax.tree.map(lambda p: p[None], params)
    calls = {
        "simulate": lambda: simulate(algorithm, key, state, data, **length),
        "run": lambda: run(algorithm, key, state, data, **length),
        "eagerly": lambda: run(algorithm, key, state, data, compiles=False, **length),
        "vmap": lambda: jax.vmap(lambda k: simulate(algorithm, k, algorithm.init(params), data, **length))(key[None]),
        "sweep": lambda: sweep(make, {"local_rate": jnp.array([0.1])}, key[None], stacked, data, **length),
        "round": lambda: algorithm.round(key, state, make_cohort(data, [0])),
    }
    with pytest.raises(ValueError, match=r"examples\['y'\] has label 3 in row 3, but the classes are 0 to 2"):
        calls[door]()


@pytest.mark.parametrize("compiles", [True, False])
def test_evaluated_labels_that_are_no_class_are_refused_before_training(key, federation, compiles):
    """Of test sets and of clients; what the clients train on is sound."""
    algorithm = fedavg(losses.cross_entropy(CLASSIFIER), work=WORK, local_rate=0.1)
    broken = {**federation.examples, "y": federation.examples["y"].at[5].set(-1)}
    evaluate, state = make_evaluation(metrics.classification(CLASSIFIER)), algorithm.init(logistic_params())
    for data, name in (
        (EvaluationData(test=broken), "test"),
        (EvaluationData(clients=dataclasses.replace(federation, examples=broken)), "examples"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\['y'\] has label -1 in row 5"):
            run(
                *(algorithm, key, state, federation),
                **{"rounds": 1, "cohort_size": 2, "evaluate": evaluate, "evaluation_data": data, "compiles": compiles},
            )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_every": 0}, "eval_every must be an integer ≥ 1"),
        ({"cohort_size": 99}, "cohort_size=99 and population=20"),
        ({"evaluate": lambda params, data: {}}, "give both evaluate and evaluation_data"),
    ],
)
def test_runs_without_jit_refuse_what_others_refuse(key, federation, settings, message):
    algorithm = fedavg(logistic_loss, work=WORK, local_rate=0.1, strategy="debug")
    start = algorithm.init(logistic_params())
    with pytest.raises(ValueError, match=message):
        run(algorithm, key, start, federation, **{"rounds": 1, "cohort_size": 1, "compiles": False, **settings})


@pytest.mark.parametrize("dtype", [jnp.float16, product(jnp.bfloat16)])
def test_a_sum_of_losses_that_a_narrow_type_cannot_hold(dtype):
    """512 losses of 128 are 65,536, beyond float16's 65,504; their mean gradient is 1."""
    clients = pack({"x": np.zeros(512, np.float32)}, [np.arange(512)])
    algorithm = fedavg(
        lambda w, batch: w + batch["x"].astype(dtype), work=local_steps(1, 512), local_rate=0.5, global_rate=1.0
    )
    state = algorithm.init(dtype(128.0))
    state, info = jax.jit(algorithm.round)(jax.random.key(0), state, make_cohort(clients, [0]))
    assert (float(info.client_loss), float(state.params), int(info.left_out)) == (128.0, 127.5, 0)
