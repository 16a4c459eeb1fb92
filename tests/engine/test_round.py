"""Facts of the simulated round that hold whatever the scheduler."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax import decay_global, decay_local, fedavg, fedhyper
from fedhyper_jax.base import RoundInfo
from fedhyper_jax.data import Cohort, local_epochs, local_steps, make_cohort, pack
from fedhyper_jax.engine.strategies import ClientError
from tests.compare import same_program
from tests.helpers import logistic_loss, logistic_params, play, product

COMBINATIONS = ["G", "SL", "CL", "G+SL+CL"]
PAIRS = ["G+SL", "G+CL", "SL+CL"]
COHORTS = [[0, 2, 5, 7, 11], [1, 2, 3, 19, 4], [2, 8, 0, 13, 17]]
EPOCHS = local_epochs(2, batch_size=8)


def make(combination="G+SL+CL", work=EPOCHS, **settings):
    return fedhyper(logistic_loss, combination, work=work, **{"local_rate": 0.05, "hyper_rate": 0.3, **settings})


def assert_close(a, b, tolerance=2e-6):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ closed forms


def test_G_on_a_quadratic_with_one_full_step_is_hypergradient_descent(key, float64):
    """K = 1, all clients, full batches: Δ^t = β∇F(w^t), so α^t = α^{t−1} + κβ²⟨∇F(w^t), ∇F(w^{t−1})⟩."""
    rng = np.random.default_rng(0)
    rows, targets = rng.normal(size=(12, 3)), rng.normal(size=12)
    data = pack({"x": rows, "y": targets}, np.split(rng.permutation(12), [2, 7]))

    def loss_fn(w, batch):
        return 0.5 * (batch["x"] @ w - batch["y"]) ** 2

    beta, kappa, alpha = 0.1, 100.0, 1.0
    algorithm = fedhyper(loss_fn, "G", work=local_epochs(1, batch_size=12), local_rate=beta, hyper_rate=kappa)
    _, infos = play(algorithm, key, data, [[0, 1, 2]] * 25, jnp.zeros(3))
    w, previous = np.zeros(3), np.zeros(3)
    for info in infos:
        gradient = rows.T @ (rows @ w - targets) / 12
        alpha = np.clip(alpha + kappa * beta**2 * gradient @ previous, 1 / 3, 3)
        assert float(info.global_rate) == pytest.approx(alpha, rel=1e-10)
        w, previous = w - alpha * beta * gradient, gradient
    assert alpha > 1.1


def test_one_client_with_all_data_and_one_step_is_centralised_sgd(key, ragged):
    examples, _ = ragged
    count = len(examples["y"])
    data = pack({"x": np.float32(examples["x"]), "y": np.int32(examples["y"])}, [np.arange(count)])
    algorithm = fedavg(logistic_loss, work=local_steps(1, batch_size=count), local_rate=0.3)
    state, _ = play(algorithm, key, data, [[0]] * 10)
    optimizer, params = optax.sgd(0.3), logistic_params()
    gradient_of = jax.jit(jax.grad(lambda p: jnp.mean(logistic_loss(p, data.examples))))
    for _ in range(10):
        gradient = gradient_of(params)
        updates, _ = optimizer.update(gradient, optimizer.init(params))
        params = optax.apply_updates(params, updates)
    assert_close(state.params, params)


@pytest.fixture(scope="module")
def fedavg_of():
    """For each work the parameters that FedAvg ends with; compiled once."""
    ends = {}

    def end(work, key, federation):
        if work not in ends:
            ends[work], _ = play(fedavg(logistic_loss, work=work, local_rate=0.05), key, federation, COHORTS)
        return ends[work]

    return end


@pytest.mark.parametrize(
    ("combination", "work"),
    [
        ("G+SL+CL", EPOCHS),
        product("CL", local_steps(5, batch_size=8)),
        *(product(combination, EPOCHS) for combination in ("G", "SL", "CL", *PAIRS)),
    ],
    ids=str,
)
def test_with_hyper_rate_zero_every_scheduler_is_fedavg_bit_for_bit(key, federation, combination, work, fedavg_of):
    expected = fedavg_of(work, key, federation)
    state, infos = play(make(combination, work, hyper_rate=0.0), key, federation, COHORTS)
    chex.assert_trees_all_equal(state.params, expected.params)
    assert {float(i.global_rate) for i in infos} == {1.0}
    assert {float(v) for i in infos for v in (i.local_rate, i.client_rate_min, i.client_rate_max)} == {np.float32(0.05)}


def test_the_sign_of_the_global_term(key):
    """One dimension, F = ½(w − 10)² from w = 0: gradients and Δ are all negative, so their products raise β."""
    data = pack({"x": np.full((4, 1), 10.0, np.float32)}, [np.arange(4)])

    def loss_fn(w, batch):
        return 0.5 * jnp.sum((w - batch["x"]) ** 2, axis=1)

    algorithm = fedhyper(loss_fn, "CL", work=local_steps(2, batch_size=4), local_rate=0.1, hyper_rate=1e-4)
    _state, infos = play(algorithm, key, data, [[0]] * 2, jnp.zeros(1))
    w, delta = 0.0, 0.0
    for info in infos:
        g0 = w - 10
        g1 = (w - 0.1 * g0) - 10
        rate = 0.1 + 1e-4 * (g1 * g0 + 0.5 * g1 * delta)
        delta = w - (w - 0.1 * g0 - rate * g1)
        w = w - delta
        assert float(info.client_rate_max) == pytest.approx(rate, rel=1e-6)
    assert delta < 0 < 0.5 * g1 * delta


@pytest.mark.product  # test_known_mistakes.py computes both by hand
def test_decay_of_either_rate(key, federation):
    settings = {"work": EPOCHS, "decay_factor": 0.9}
    _, infos = play(decay_global(logistic_loss, local_rate=0.05, **settings), key, federation, COHORTS)
    np.testing.assert_allclose([i.global_rate for i in infos], [1, 0.9, 0.81], rtol=1e-6)
    state, infos = play(decay_local(logistic_loss, local_rate=0.05, **settings), key, federation, COHORTS)
    np.testing.assert_allclose([i.local_rate for i in infos], [0.05, 0.045, 0.0405], rtol=1e-6)
    still, _ = play(fedavg(logistic_loss, work=EPOCHS, local_rate=0.05), key, federation, COHORTS)
    # In the authors' code Decay-SL does nothing (SPEC.md section 3, defect 1). Here it acts, on purpose.
    assert not np.allclose(state.params["weights"], still.params["weights"], rtol=1e-3)


# ------------------------------------------------------------------------------------------------ invariances


@pytest.mark.product  # strategies on their seam, and probes of both kinds of work
@pytest.mark.parametrize("work", [EPOCHS, local_steps(5, batch_size=8)], ids=["epochs", "steps"])
@pytest.mark.parametrize("strategy", ["vectorized", "sequential", "chunked(2)", "chunked(64)"])
def test_every_strategy_equals_debug(key, federation, strategy, work):
    expected, expected_infos = play(make(strategy="debug", work=work), key, federation, COHORTS[:2], jit=False)
    state, infos = play(make(strategy=strategy, work=work), key, federation, COHORTS[:2])
    assert_close(state, expected)
    assert_close(infos, expected_infos, 1e-5)


@pytest.mark.product  # a contract of every method
def test_permuting_the_cohort_changes_nothing(key, federation):
    expected, expected_infos = play(make(), key, federation, COHORTS)
    state, infos = play(make(), key, federation, [cohort[::-1] for cohort in COHORTS])
    assert_close(state, expected)
    assert_close(infos, expected_infos, 1e-5)


@pytest.mark.product  # a contract of every method, and of every strategy on its seam
@pytest.mark.parametrize(
    ("strategy", "work"),
    [("vectorized", EPOCHS), ("sequential", local_steps(5, batch_size=8)), ("chunked(3)", EPOCHS)],
    ids=str,
)
def test_padded_slots_change_nothing(key, federation, strategy, work):
    padded = [[*cohort, 20, 20] for cohort in COHORTS]
    expected, expected_infos = play(make(work=work), key, federation, COHORTS)
    state, infos = play(make(strategy=strategy, work=work), key, federation, padded)
    assert_close(state, expected)
    assert_close(infos, expected_infos, 1e-5)
    assert int(infos[0].left_out) == 0


@pytest.mark.product  # test_batches.py: the batches are the same; below: masked steps leave everything untouched
@pytest.mark.parametrize("work", [EPOCHS, local_steps(5, batch_size=8)], ids=["epochs", "steps"])
def test_a_larger_bound_on_client_sizes_changes_nothing(key, ragged, work):
    """Client 20 is three times as large as the others, never drawn, and lengthens everybody's padding."""
    examples, rows = ragged
    examples = {"x": np.float32(examples["x"]), "y": np.int32(examples["y"])}
    larger = {name: np.concatenate([array, array[:120]]) for name, array in examples.items()}
    count = len(examples["y"])
    expected, infos = play(make(work=work), key, pack(examples, rows), COHORTS)
    data = pack(larger, [*rows, np.arange(count, count + 120)])
    state, larger_infos = play(make(work=work), key, data, COHORTS)
    assert_close(state, expected)
    assert_close(larger_infos, infos, 1e-5)


def test_masked_steps_leave_parameters_optimizer_and_rate_untouched(key, federation):
    """A client of one example beside one of forty ends as it does alone, where nothing is masked."""
    algorithm = make("CL", local_epochs(3, 8), client_optimizer=optax.sgd(1.0, momentum=0.9), strategy="vectorized")
    round_fn, state = jax.jit(algorithm.round), algorithm.init(logistic_params())
    cohorts = [0, federation.population], [0, 2], [2, federation.population]  # padded, so that one program serves all
    (alone, info), (beside, _), (other, _) = (
        round_fn(key, state, Cohort(data=federation, client_ids=jnp.array(cohort))) for cohort in cohorts
    )
    weights = np.array([1.0, 40.0]) / 41
    expected = jax.tree.map(lambda a, b: weights[0] * a + weights[1] * b, alone.pseudo_gradient, other.pseudo_gradient)
    assert_close(beside.pseudo_gradient, expected)
    assert int(info.local_steps) == 3


@pytest.mark.parametrize(
    "strategy",
    # (of those that compile: a contract of every method, and of the probes under every strategy)
    [*(product(s) for s in ("vectorized", "sequential", "chunked(2)")), "debug"],
)
def test_a_client_that_is_not_finite_is_left_out_and_counted(key, federation, strategy):
    """Client 7's inputs overflow float32 in the forward pass."""
    rows = np.asarray(federation.order[federation.offsets[7] : federation.offsets[8]])
    inputs = federation.examples["x"].at[rows].set(3e38)
    poisoned = pack(
        {"x": np.asarray(inputs), "y": np.asarray(federation.examples["y"])},
        np.split(np.asarray(federation.order), np.asarray(federation.offsets[1:-1])),
    )
    settings = {"combination": "CL", "work": local_steps(2, batch_size=8)}
    expected, expected_infos = play(make(**settings, strategy="sequential"), key, federation, [[0]])
    algorithm = make(**settings, strategy=strategy)
    if strategy == "debug":
        with pytest.warns(RuntimeWarning, match="client 7, local step 0: .* no longer finite"):
            state, infos = play(algorithm, key, poisoned, [[0, 7]], jit=False)
    else:
        state, infos = play(algorithm, key, poisoned, [[0, 7]])
    assert_close(state, expected)
    assert int(infos[0].left_out) == 1
    told = {"left_out": 0, "first_left_out": -1, "left_out_because": 0, "bytes_down": 0}
    assert_close(infos[0]._replace(**told), expected_infos[0]._replace(**told), 1e-5)


@pytest.mark.product  # a contract of every method, `fedadam` among them
def test_a_round_without_survivors_changes_nothing_but_its_number(key, federation):
    algorithm = make(server_optimizer=optax.adam(0.01))
    state, _ = play(algorithm, key, federation, COHORTS)
    nothing = Cohort(data=federation, client_ids=jnp.full(3, federation.population))
    after, info = jax.jit(algorithm.round)(key, state, nothing)
    chex.assert_trees_all_equal({**vars(after), "round": 0}, {**vars(state), "round": 0})
    assert int(after.round) == 4
    assert int(info.participants) == 0
    assert np.isnan(info.client_loss)
    assert np.isnan(info.inner_product)
    assert float(info.global_rate) == float(state.global_rate.rate)


# ------------------------------------------------------------------------------------------------ data, not code


def test_one_round_serves_all_rates_hyper_rates_and_bounds(key, federation):
    """Their round is the same text when lowered, so they are in the state."""
    settings = {"hyper_rate": 0.1, "global_rate": 2.0, "global_bounds": (0.5, 4), "local_bounds": (0.001, 7.0)}
    algorithms, cohort = [make(), make(local_rate=jnp.float32(0.01), **settings)], make_cohort(federation, [0, 2, 5])
    states = [algorithm.init(logistic_params()) for algorithm in algorithms]
    texts = [jax.jit(algorithm.round).lower(key, states[0], cohort).as_text() for algorithm in algorithms]
    assert same_program(*texts)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    kept = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves((states[1].global_rate, states[1].local_rate))])
    assert {2.0, 0.5, 4.0, 0.1, 0.01, 0.001, 7.0} <= {round(float(number), 6) for number in kept}


def test_one_compiled_round_serves_all_schedules(key, federation):
    schedules = [optax.cosine_decay_schedule(0.1, 50), optax.linear_schedule(0.05, 0.01, 3), lambda t: 0.02 + 0.0 * t]
    settings = {"work": EPOCHS, "schedule_rounds": 50}
    round_fn = jax.jit(chex.assert_max_traces(fedavg(logistic_loss, local_rate=schedules[0], **settings).round, n=1))
    for schedule in schedules:
        algorithm = fedavg(logistic_loss, local_rate=schedule, global_rate=schedules[0], **settings)
        state = algorithm.init(logistic_params())
        for t, cohort in enumerate(COHORTS):
            state, info = round_fn(key, state, Cohort(data=federation, client_ids=jnp.asarray(cohort, jnp.int32)))
            assert float(info.local_rate) == pytest.approx(float(schedule(t)), rel=1e-6)
            assert float(info.global_rate) == pytest.approx(float(schedules[0](t)), rel=1e-6)


@pytest.mark.product  # test_simulation.py sweeps, and so does a contract of every method
@pytest.mark.parametrize("combination", ["G+SL+CL", "G", "SL", "CL"])
def test_vmap_over_rates_and_hyper_rates_equals_a_loop(key, federation, combination):
    rates, hyper_rates = jnp.array([0.01, 0.05, 0.1]), jnp.array([0.0, 0.3, 1.0])
    cohort = Cohort(data=federation, client_ids=jnp.asarray(COHORTS[0], jnp.int32))

    def one(rate, hyper_rate):
        algorithm = make(combination, local_rate=rate, hyper_rate=hyper_rate, global_rate=10 * rate + 0.5)
        state, _ = algorithm.round(key, algorithm.init(logistic_params()), cohort)
        return algorithm.round(key, state, cohort)

    together = jax.jit(jax.vmap(one))(rates, hyper_rates)
    alone = [jax.jit(one)(rate, hyper_rate) for rate, hyper_rate in zip(rates, hyper_rates, strict=True)]
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone), 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, product(jnp.float32)])
def test_parameters_keep_their_dtype_and_states_their_types_in_a_scan(key, federation, dtype):
    algorithm = make(server_optimizer=optax.sgd(1.0, momentum=0.9), client_optimizer=optax.sgd(1.0, momentum=0.9))
    start = algorithm.init(logistic_params(dtype))
    cohort = Cohort(data=federation, client_ids=jnp.asarray(COHORTS[0], jnp.int32))

    def rounds(start):
        return jax.lax.scan(lambda state, _: algorithm.round(key, state, cohort), start, None, length=2)

    end, infos = jax.eval_shape(rounds, start)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, end)
    assert isinstance(infos, RoundInfo)
    assert end.params["weights"].dtype == dtype
    assert end.local_rate.rate.dtype == jnp.float32


def test_the_transforms_give_the_rates_of_the_simulator(key, federation):
    """ServerState holds Δ^{t−1} once; the optax transforms, which keep their own, walk the same path of rates."""
    from fedhyper_jax import global_rate, local_rate, scale_by_hypergradient, track_hypergradient

    algorithm = make("G+SL")
    state, params = algorithm.init(logistic_params()), logistic_params()
    tracker = optax.chain(
        track_hypergradient(0.05, 0.3, bounds=(0.005, 0.5)),
        scale_by_hypergradient(1.0, 0.3, bounds=(1 / 3, 3.0)),
        optax.scale(-1.0),
    )
    tracker_state = tracker.init(params)
    for cohort in COHORTS * 2:
        state, info = jax.jit(algorithm.round)(key, state, Cohort(data=federation, client_ids=jnp.asarray(cohort)))
        updates, tracker_state = tracker.update(state.pseudo_gradient, tracker_state, params)
        params = optax.apply_updates(params, updates)
        assert float(global_rate(tracker_state)) == pytest.approx(float(info.global_rate), rel=1e-6)
        assert float(local_rate(tracker_state)) == pytest.approx(float(state.local_rate.rate), rel=1e-6)
    assert_close(params, state.params)


# ------------------------------------------------------------------------------------------------ records and errors


def test_what_a_round_records(key, federation):
    """Clients 0, 1, 2 have 1, 2 and 40 examples; batches of 8, 2 epochs."""
    _, infos = play(make("CL"), key, federation, [[0, 1, 2]])
    info = infos[0]
    assert float(info.examples) == 2 * 43
    assert int(info.local_steps) == 2 * (1 + 1 + 5)
    assert int(info.local_rate_updates) == 2 * (1 + 1 + 5) - 3
    assert int(info.global_rate_updates) == 0
    assert float(info.bytes_up) == 3 * 18 * 4
    assert float(info.bytes_down) == 3 * (2 * 18 * 4 + 4)
    _, infos = play(make("SL"), key, federation, [[0, 1, 2]])
    assert float(infos[0].bytes_down) == 3 * (18 * 4 + 4)


def test_client_loss_is_the_mean_over_the_examples_seen(key, federation):
    algorithm = fedavg(logistic_loss, work=local_epochs(1, batch_size=64), local_rate=0.1)
    _, infos = play(algorithm, key, federation, [[0, 2]])
    order, offsets = np.asarray(federation.order), np.asarray(federation.offsets)
    rows = np.concatenate([order[offsets[m] : offsets[m + 1]] for m in (0, 2)])
    examples = jax.tree.map(lambda a: np.asarray(a)[rows], federation.examples)
    losses = jax.jit(logistic_loss)(logistic_params(), examples)
    assert float(infos[0].client_loss) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_debug_names_client_and_step(key, federation):
    def loss_fn(params, batch):
        raise KeyError("no such feature")

    algorithm = fedavg(loss_fn, work=EPOCHS, local_rate=0.1, strategy="debug")
    with pytest.raises(ClientError, match="client 5, local step 0: 'no such feature'"):
        play(algorithm, key, federation, [[5, 6]], jit=False)


def test_debug_refuses_jit(key, federation):
    with pytest.raises(ValueError, match="runs without jit"):
        play(fedavg(logistic_loss, work=EPOCHS, local_rate=0.1, strategy="debug"), key, federation, COHORTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"combination": "G+XL"}, "unknown scheduler 'XL'; known: G, SL, CL"),
        ({"combination": "G+G"}, "names one twice"),
        ({"combination": ""}, "unknown scheduler ''"),
        ({"local_rate": -0.1}, "local_rate must be finite and > 0, got -0.1"),
        ({"local_rate": float("nan")}, "local_rate must be finite and > 0, got nan"),
        ({"global_rate": 0.0}, "global_rate must be finite and > 0, got 0.0"),
        ({"hyper_rate": -1.0}, "hyper_rate must be finite and ≥ 0, got -1.0"),
        ({"global_rate": 4.0}, "global_rate=4.0 lies outside the absolute bounds .* use global_bounds='relative'"),
        ({"local_bounds": "absolute"}, "local_rate=0.05 lies outside the absolute bounds .* local_bounds='relative'"),
        ({"local_bounds": (0.1, 1.0)}, "local_rate must lie inside local_bounds"),
        ({"global_bounds": "loose"}, "unknown global_bounds 'loose'; known: relative, absolute"),
        ({"local_gamma": 0.5}, "must be ≥ 1, got 0.5"),
        ({"global_rate": lambda t: 1.0}, "global_rate is a schedule, but G moves it already: two rules for one rate"),
        ({"local_rate": lambda t: 0.1}, "local_rate is a schedule, but SL moves it already"),
        ({"weighting": "fair"}, "unknown weighting 'fair'; known: examples, uniform, weights"),
        ({"strategy": "parallel"}, "unknown strategy 'parallel'; known: vectorized, sequential, debug"),
        ({"strategy": "chunked(0)"}, "size must be an integer ≥ 1"),
    ],
)
def test_bad_arguments_are_refused_by_the_factory(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda t: 0.1 - 0.01 * t, "in round 11; rates must be finite and ≥ 0"),
        (lambda t: 0.1 / (1.0 - t / 8), "gives inf in round 8"),
        (lambda t: 0.0 * t, "gives 0 in all of its 10000 rounds"),
        (lambda t: 0.1 * (t - 0.5), r"gives -0.05\d* in round 0; rates must be finite and ≥ 0$"),
    ],
)
def test_schedules_that_turn_negative_or_infinite_or_are_zero_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        fedavg(logistic_loss, work=EPOCHS, local_rate=schedule)


def test_work_that_is_not_work_is_refused():
    with pytest.raises(TypeError, match="work must come from local_epochs"):
        fedavg(logistic_loss, work=5, local_rate=0.1)
    with pytest.raises(ValueError, match="batch_size must be an integer ≥ 1, got 0"):
        local_epochs(1, batch_size=0)
    with pytest.raises(ValueError, match=r"steps must be an integer ≥ 1, got 2\.5"):
        local_steps(2.5, batch_size=1)
