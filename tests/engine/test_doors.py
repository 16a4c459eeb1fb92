"""The doors of a round (aggregator, failures, guard, participation), in whole rounds against NumPy and closed forms.

Clients own numbers and descend ½(w − x)² in full batches, so after k steps of rate β client m is at
x̄_m + (1 − β)^k (w − x̄_m).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import _random, run, simulate, sweep
from fedhyper_jax.data import Cohort, client_batches, local_epochs, pack, procedural_logistic
from fedhyper_jax.engine import federated_algorithm
from fedhyper_jax.parts import FailureModel, aggregators, failures, guards, participation, rates, terms
from tests.helpers import logistic_loss, logistic_params, product

SIZES = [1, 2, 4, 3, 5, 2, 1, 6]
POPULATION = len(SIZES)
BETA, STEPS = 0.3, 2
FULL = local_epochs(STEPS, batch_size=8)
KEY = jax.random.key(11)


@pytest.fixture(scope="module")
def numbers():
    """The clients' numbers, and the same as a federation."""
    rng = np.random.default_rng(4)
    owned = [rng.normal(loc=m, size=(size, 2)).astype(np.float32) for m, size in enumerate(SIZES)]
    rows = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    return owned, pack({"x": np.concatenate(owned)}, rows)


def quadratic(w, batch):
    return 0.5 * jnp.sum((w - batch["x"]) ** 2, axis=1)


def made(loss_fn=quadratic, work=FULL, local_rate=BETA, **settings):
    local_rate = local_rate if isinstance(local_rate, rates.RateRule) else rates.scheduled(local_rate)
    settings = {"global_rate": rates.scheduled(1.0), **settings}
    return federated_algorithm(loss_fn, work=work, local_rate=local_rate, **settings)


def played(algorithm, data, cohort, params=None, state=None):
    """A round of a cohort."""
    state = algorithm.init(jnp.array([1.0, -2.0]) if params is None else params) if state is None else state
    return jax.jit(algorithm.round)(KEY, state, Cohort(data=data, client_ids=jnp.asarray(cohort, jnp.int32)))


def close(actual, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


def updates_of(owned, clients, w, steps=STEPS):
    """Δ_m in closed form."""
    return np.array([(1 - (1 - BETA) ** steps) * (w - owned[m].mean(axis=0)) for m in clients])


# ---------------------------------------------------------------------------------------------------------- aggregators


EVEN, ODD = [5, 8, 0, 3, 8, 7], [2, 8, 6, 1, 4, 8]  # with padded slots


@pytest.mark.parametrize(
    "strategy",
    ["chunked(2)", *map(product, ("vectorized", "sequential", "debug"))],  # strategies on their seam, and by the probes
)
def test_a_round_by_the_median(numbers, strategy):
    owned, data = numbers
    algorithm = made(aggregator=aggregators.median(), strategy=strategy)
    round_fn = algorithm.round if strategy == "debug" else jax.jit(algorithm.round)
    w = np.array([1.0, -2.0], np.float32)
    for cohort in (EVEN, ODD):
        cohort_ids = Cohort(data=data, client_ids=jnp.asarray(cohort, jnp.int32))
        state, info = round_fn(KEY, algorithm.init(jnp.asarray(w)), cohort_ids)
        real = [m for m in cohort if m < POPULATION]
        median = np.median(updates_of(owned, real, w), axis=0)
        close((state.pseudo_gradient, state.params), (median, w - median))
        assert int(info.participants) == len(real)


def test_the_median_withstands_an_update_that_a_mean_does_not(numbers):
    """Client 3's data are far away; and one that is not finite is left out of the median as of the mean."""
    owned, data = numbers
    far = data.examples["x"].at[data.order[data.offsets[3] : data.offsets[4]]].set(1e6)
    broken = far.at[data.order[data.offsets[5] : data.offsets[6]]].set(jnp.nan)
    shifted = type(data)(examples={"x": broken}, order=data.order, offsets=data.offsets, max_examples=data.max_examples)
    w = np.array([1.0, -2.0], np.float32)
    state, info = played(made(aggregator=aggregators.median()), shifted, [0, 3, 5, 6, 7])
    others = updates_of(owned, [0, 6, 7], w)
    attacker = (1 - (1 - BETA) ** STEPS) * (w - 1e6)
    close(state.pseudo_gradient, np.median([*others, attacker], axis=0))
    assert int(info.left_out) == 1 and int(info.participants) == 4


def test_clipped_updates(numbers):
    owned, data = numbers
    w, clients = np.array([1.0, -2.0], np.float32), [1, 4, 7]
    algorithm = made(aggregator=aggregators.clipped(aggregators.mean(), 0.5), weighting="uniform")
    state, _ = played(algorithm, data, clients)
    updates = updates_of(owned, clients, w)
    lengths = np.linalg.norm(updates, axis=1, keepdims=True)
    assert lengths.max() > 0.5
    close(state.pseudo_gradient, (updates * np.minimum(1, 0.5 / lengths)).mean(axis=0))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"global_rate": rates.extrapolation()}, "FedExP extrapolates a mean of client updates, but"),
        ({"terms": [terms.normalized_averaging()]}, "FedNova's step is τ_eff times the mean"),
        ({"terms": [terms.dynamic_regularization(8)], "weighting": "uniform"}, "FedDyn adds the mean of all clients'"),
    ],
    ids=["fedexp", "fednova", "feddyn"],
)
def test_who_refuses_an_aggregator_that_is_no_mean(settings, reason):
    with pytest.raises(ValueError, match=f"{reason}.*the median of client updates is no mean of them; use one of the"):
        made(aggregator=aggregators.median(), **settings)
    with pytest.raises(ValueError, match="the mean of clipped updates is no mean of the updates"):
        made(aggregator=aggregators.clipped(aggregators.mean(), 1.0), **settings)


# ------------------------------------------------------------------------------------------------------------- failures


def fates(cohort, round_number=0, before=0.0, after=0.0):
    """Who starts and whose update arrives, by the keys of the clients."""
    keys = _random.round_keys(KEY, jnp.int32(round_number))
    own = [_random.failure_key(keys.clients, jnp.int32(m)) for m in cohort]
    starts = [not jax.random.bernoulli(jax.random.fold_in(key, 0), before) for key in own]
    arrives = [not jax.random.bernoulli(jax.random.fold_in(key, 1), after) for key in own]
    return np.array(starts), np.array(arrives)


COHORT = [7, 2, 5, 0, 4, 3]


@pytest.mark.parametrize("strategy", ["sequential", *(product(s) for s in ("vectorized", "chunked(2)"))])
def test_dropout_is_as_if_the_others_had_been_alone(numbers, strategy):
    """In parameters, rates and rows (SCAFFOLD's); those of clients that drop out stay, and they are counted apart."""
    _, data = numbers
    starts, arrives = fates(COHORT, before=0.4, after=0.4)
    assert not starts.all() and not arrives[starts].all() and (starts & arrives).any()
    left = [m for m, there in zip(COHORT, starts & arrives, strict=True) if there]
    settings = {"terms": [terms.control_variates(POPULATION)], "strategy": strategy}
    state, info = played(made(failure_model=failures.dropout(0.4, 0.4), **settings), data, COHORT)
    expected, expected_info = played(made(**settings), data, left)
    close((state.params, state.terms, state.clients), (expected.params, expected.terms, expected.clients))
    assert int(info.participants) == len(left) == int(expected_info.participants)
    assert int(info.not_started) == int((~starts).sum()) and int(info.lost) == int((starts & ~arrives).sum())
    assert int(info.left_out) == 0
    assert float(info.bytes_up) == float(expected_info.bytes_up)
    assert float(info.bytes_down) / starts.sum() == float(expected_info.bytes_down) / len(left)


def test_a_client_that_does_not_start_costs_no_work(numbers):
    """Counted where it happens: each run of the loss function of each client."""
    _, data = numbers
    count = [0]

    def loss_fn(w, batch):
        jax.debug.callback(lambda x: count.__setitem__(0, count[0] + 1), batch["x"][0, 0])
        return quadratic(w, batch)

    algorithm = made(loss_fn, failure_model=failures.dropout(before=0.4), strategy="sequential")
    _, info = played(algorithm, data, COHORT)
    jax.effects_barrier()
    starts, _ = fates(COHORT, before=0.4)
    assert count[0] == STEPS * int(starts.sum()) == int(info.local_steps) < STEPS * len(COHORT)


def test_the_same_client_fails_in_any_cohort(numbers):
    """Fates hang on round and client: not on order, nor on who else is there."""
    _, data = numbers
    algorithm = made(failure_model=failures.dropout(0.4, 0.2))
    nobody = [POPULATION] * len(COHORT)  # padded slots; one program serves all
    _, whole = played(algorithm, data, [*COHORT, POPULATION])
    _, turned = played(algorithm, data, [POPULATION, *COHORT[::-1]])
    alone = [played(algorithm, data, [m, *nobody])[1] for m in COHORT]
    for name in ("participants", "not_started", "lost"):
        assert int(getattr(whole, name)) == int(getattr(turned, name)) == sum(int(getattr(i, name)) for i in alone)


def test_a_round_in_which_everybody_fails_changes_nothing(numbers):
    _, data = numbers
    nobody = FailureModel(name="nobody", before=lambda key, settings, steps: jnp.zeros_like(steps))
    state, info = played(made(failure_model=nobody), data, COHORT)
    close(state.params, np.array([1.0, -2.0]), 0)
    assert int(info.not_started) == len(COHORT) and int(info.participants) == int(info.left_out) == 0
    assert int(state.round) == 1 and float(info.bytes_down) == 0


def test_stragglers_take_the_first_of_their_steps(ragged, float64):
    """A failure model of one's own: half of the steps, rounded up; the batches are those that they would have had."""
    examples, rows = ragged
    data = pack({"x": examples["x"]}, rows)
    work = local_epochs(2, batch_size=4)
    stragglers = FailureModel(name="stragglers", before=lambda key, settings, steps: -(-steps // 2))
    params, cohort = jnp.zeros(5), [2, 0, 5, 9]
    state, info = played(made(work=work, failure_model=stragglers, weighting="uniform"), data, cohort, params)
    ends = []
    draw = jax.jit(lambda m: client_batches(KEY, 0, data, m, work))
    for m in cohort:
        batches, w = draw(m), np.zeros(5)
        for k in range(-(-int(batches.num_steps) // 2)):
            batch = examples["x"][np.asarray(batches.rows[k])[np.asarray(batches.mask[k])]]
            w = w - BETA * (w - batch.mean(axis=0))
        ends.append(w)
    close(state.params, np.mean(ends, axis=0), 1e-12)
    assert int(info.local_steps) == sum(-(-2 * -(-len(rows[m]) // 4) // 2) for m in cohort)


def test_a_corrupted_update_is_left_out(numbers):
    """It arrives, but is not finite: that is not counted as lost."""
    owned, data = numbers

    def corrupted(key, settings, update):
        return jnp.where(update[0] > 0, update, jnp.nan), jnp.array(True)

    w = np.array([1.0, -2.0], np.float32)
    _, info = played(made(failure_model=FailureModel(name="corrupted", after=corrupted)), data, COHORT)
    sound = [m for m in COHORT if updates_of(owned, [m], w)[0][0] > 0]
    assert 0 < len(sound) < len(COHORT)
    assert (int(info.participants), int(info.lost)) == (len(sound), 0)
    assert int(info.left_out) == len(COHORT) - len(sound)


def test_probabilities_are_data(numbers):
    """One program serves all, and they may be traced, as in a sweep."""
    _, data = numbers

    def make(before):
        return made(failure_model=failures.dropout(before, 0.1))

    round_fn, cohort = jax.jit(make(0.1).round), Cohort(data=data, client_ids=jnp.arange(8))
    for probability in (0.1, 0.5):
        state, not_started = make(probability).init(jnp.zeros(2)), 0
        for _ in range(60):
            state, info = round_fn(KEY, state, cohort)
            not_started += int(info.not_started)
        assert not_started / (60 * 8) == pytest.approx(probability, abs=0.08)
    assert round_fn._cache_size() == 1
    traced = jax.eval_shape(lambda before: make(before).init(jnp.zeros(2)), 0.3)
    assert jax.tree.structure(traced) == jax.tree.structure(make(0.3).init(jnp.zeros(2)))


# --------------------------------------------------------------------------------------------------------------- guards


def transcribed(owned, cohorts, w, beta, factor, patience, kappa, bounds):
    """FedHyper-SL under `rollback`, in NumPy: (w, β, taken back) of every round."""
    last_loss, refusals, previous, path = np.inf, 0, np.zeros_like(w), []
    for clients in cohorts:
        updates, losses, sizes = [], 0.0, np.array([len(owned[m]) for m in clients])
        for m in clients:
            v = w.copy()
            for _ in range(STEPS):
                losses += 0.5 * np.sum((v - owned[m]) ** 2)
                v = v - beta * (v - owned[m].mean(axis=0))
            updates.append(w - v)
        loss = losses / (STEPS * sizes.sum())
        delta = np.average(updates, axis=0, weights=sizes)
        taken_back = not loss <= factor * last_loss and refusals < patience
        used = beta
        if taken_back:
            refusals, beta = refusals + 1, max(beta / 2, bounds[0])
        else:
            last_loss, refusals = loss, 0
            w, beta = w - delta, np.clip(beta + kappa * delta @ previous, *bounds)
            previous = delta
        path.append((w.copy(), used, taken_back))
    return path


def test_a_run_under_rollback_equals_its_transcription(numbers, float64):
    """From a local rate that is too large for one cohort after the other: refusals, halving and patience."""
    owned, data = numbers
    owned = [x.astype(float) for x in owned]
    data = type(data)(
        examples={"x": data.examples["x"].astype(float)},
        order=data.order,
        offsets=data.offsets,
        max_examples=data.max_examples,
    )
    bounds, kappa = (0.25, 25.0), 0.05
    algorithm = made(
        local_rate=rates.hypergradient(2.4, kappa, bounds), guard=guards.rollback(1.5, patience=2), weighting="examples"
    )
    cohorts = [[0, 1, 2], [1, 3, 4], [5, 6, 7], [2, 4, 6], [0, 3, 7], [1, 2, 5], [3, 4, 6], [0, 5, 7]]
    state, round_fn = algorithm.init(jnp.array([1.0, -2.0])), jax.jit(algorithm.round)
    path = transcribed(owned, cohorts, np.array([1.0, -2.0]), 2.4, 1.5, 2, kappa, bounds)
    for clients, (w, beta, taken_back) in zip(cohorts, path, strict=True):
        state, info = round_fn(KEY, state, Cohort(data=data, client_ids=jnp.asarray(clients, jnp.int32)))
        close(state.params, w, 1e-9)
        assert float(info.local_rate) == pytest.approx(beta, rel=1e-9)
        assert int(info.taken_back) == taken_back and int(info.participants) == 3
    refused = [taken_back for *_, taken_back in path]
    assert any(refused) and not all(refused[1:])


def test_a_round_that_is_taken_back_leaves_everything_but_its_number(numbers):
    """Rows of clients, terms, momentum and Δ^{t-1} included; without the guard all of them move."""
    import optax

    _, data = numbers
    settings = {"terms": [terms.control_variates(POPULATION)], "server_optimizer": optax.sgd(1.0, momentum=0.9)}
    guarded = made(guard=guards.rollback(1.01), **settings)
    state, first = played(guarded, data, [0, 1])
    after, info = played(guarded, data, [6, 7], state=state)  # their numbers are further away
    assert float(info.client_loss) > 1.01 * float(first.client_loss) and int(info.taken_back) == 1
    for name in ("params", "pseudo_gradient", "terms", "clients", "server_optimizer", "global_rate", "local_rate"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert int(after.round) == 2 and int(after.guard.refusals) == 1
    plain = made(**settings)
    state, _ = played(plain, data, [0, 1])
    after, info = played(plain, data, [6, 7], state=state)
    assert int(info.taken_back) == 0
    assert np.any(after.clients["control_variates"][7] != state.clients["control_variates"][7])


def test_a_round_without_participants_is_no_news_to_a_guard(numbers):
    _, data = numbers
    guarded = made(guard=guards.rollback(1.5))
    state, _ = played(guarded, data, [0, 1])
    after, info = played(guarded, data, [POPULATION, POPULATION], state=state)
    jax.tree.map(np.testing.assert_array_equal, after.guard, state.guard)
    assert int(info.taken_back) == 0


# -------------------------------------------------------------------------------------------------------- participation


def test_cohorts_are_drawn_by_availability(numbers):
    """In `simulate`, `run` and `sweep` alike; clients of availability 0 never come."""
    _, data = numbers
    seen = []

    def loss_fn(w, batch):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch["x"])
        return quadratic(w, batch)

    chosen = participation.weighted([1.0, 0, 0, 5.0, 0, 2.0, 0, 0])
    settings = {"rounds": 4, "cohort_size": 2, "participation": chosen}
    algorithm = made(loss_fn, strategy="sequential")
    state = algorithm.init(jnp.array([1.0, -2.0]))
    end, history = simulate(algorithm, KEY, state, data, **settings)
    jax.effects_barrier()
    owners = {int(np.argmin([np.abs(x[0] - own).sum(axis=1).min() for own in numbers[0]])) for x in seen}
    assert owners <= {0, 3, 5} and len(owners) > 1
    again, chunked = run(algorithm, KEY, state, data, rounds_per_chunk=2, **settings)
    jax.tree.map(np.testing.assert_array_equal, (end.params, history.info), (again.params, chunked.info))
    _, swept = sweep(
        lambda local_rate: made(local_rate=local_rate, strategy="sequential"),
        {"local_rate": jnp.array([BETA])},
        KEY[None],
        jnp.array([[1.0, -2.0]]),
        data,
        **settings,
    )
    close(swept.info.client_loss[0, 0], history.info.client_loss)
    with pytest.raises(ValueError, match="cohort_size must be at most 3"):
        simulate(algorithm, KEY, state, data, rounds=1, cohort_size=4, participation=chosen)


# ---------------------------------------------------------------------------------------------------- all doors at once


@pytest.mark.product  # as a probe does
@pytest.mark.parametrize("strategy", ["sequential", "chunked(3)"])
def test_strategies_agree_on_all_doors_at_once(federation, strategy):
    settings = {
        "loss_fn": logistic_loss,
        "work": local_epochs(2, batch_size=8),
        "local_rate": rates.hypergradient(0.5, 0.1, (0.05, 5.0)),
        "terms": [terms.control_variates(20)],
        "aggregator": aggregators.clipped(aggregators.median(), 0.4),
        "failure_model": failures.dropout(0.2, 0.2),
        "guard": guards.rollback(1.05),
    }
    ends = []
    for name in ("vectorized", strategy):
        algorithm = made(strategy=name, **settings)
        state = algorithm.init(logistic_params())
        ends.append(simulate(algorithm, KEY, state, federation, rounds=5, cohort_size=7))
    close(*ends)
    info = ends[0][1].info
    assert info.taken_back.sum() > 0 and info.not_started.sum() > 0 and info.lost.sum() > 0


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("strategy", ["vectorized", product("chunked(2)"), product("sequential")])
def test_weights_of_the_data_set(numbers, strategy):
    """The mean of the clients' updates, weighed by their tokens whatever the unit; with an empty slot."""
    owned, _ = numbers
    tokens = np.random.default_rng(7).integers(0, 90, sum(SIZES)) + np.arange(sum(SIZES)) % 2
    rows = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    sums, cohort, w = np.array([tokens[own].sum() for own in rows]), [5, 2, 7], np.array([1.0, -2.0])
    expected = w - np.average(updates_of(owned, cohort, w), axis=0, weights=sums[cohort])
    algorithm = made(weighting="weights", strategy=strategy)
    for unit in (1, 1e-4):
        data = pack({"x": np.concatenate(owned), "tokens": unit * tokens.astype(np.float32)}, rows, weigh_by="tokens")
        state, _ = played(algorithm, data, [*cohort, POPULATION])
        close(state.params, expected)


def test_weights_by_a_constant_are_those_by_examples(numbers):
    """In SCAFFOLD too, whose c is a mean as clients count."""
    owned, data = numbers
    rows = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    examples = {"x": np.concatenate(owned), "three": np.full(sum(SIZES), 3)}
    weighed = pack(examples, rows, weigh_by="three")

    def both(weighting, data):
        algorithm = made(terms=[terms.control_variates(POPULATION)], weighting=weighting)
        state, info = played(algorithm, data, [5, 2, 7])
        return state.params, state.terms, info

    close(both("weights", weighed), both("examples", data))


def test_runs_refuse_data_without_weights(numbers):
    algorithm = made(weighting="weights")
    with pytest.raises(ValueError, match=r"needs a data set with weights, got <.*data.pack\(…, weigh_by='tokens'\)"):
        simulate(algorithm, KEY, algorithm.init(jnp.zeros(2)), numbers[1], rounds=1, cohort_size=2)
    procedural = procedural_logistic(10)
    with pytest.raises(ValueError, match="needs a data set with weights, got <ProceduralData: 10 clients"):
        run(algorithm, KEY, algorithm.init(jnp.zeros(2)), procedural, rounds=1, cohort_size=2)
