"""`run` and `sweep` between chunks: callbacks that stop or fail, warnings; and arguments that are something else."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedhyper_jax as fh
from fedhyper_jax import data

CLIENTS = data.pack({"x": np.array([[1.0], [2.0], [3.0]], np.float32)}, [[0], [1], [2]])
KEY = jax.random.key(0)


def loss_fn(w, batch):
    return 0.5 * (w - batch["x"][:, 0]) ** 2


ALGORITHM = fh.fedavg(loss_fn, work=fh.local_steps(1, 1), local_rate=0.5)
PLAY = {"cohort_size": 3, "rounds_per_chunk": 2}


def state():
    return ALGORITHM.init(0.0)


def test_a_callback_stops_a_run():
    seen = []

    def stop(progress):
        seen.append(progress.copied())
        if progress.rounds_done == 4:
            raise fh.StopRun

    last, history = fh.run(ALGORITHM, KEY, state(), CLIENTS, rounds=10, callbacks=[stop], **PLAY)
    assert int(last.round) == 4 and history.info.round.tolist() == [0, 1, 2, 3]
    # w ← w − ½ (w − 2), and copies outlive the chunks that took the state's memory.
    np.testing.assert_allclose([s.params for s in seen], [1.5, 1.875], rtol=1e-6)


@pytest.mark.parametrize("error", [ValueError("no space left"), KeyboardInterrupt()])
def test_a_callback_that_fails_loses_nothing(error):
    def fail(progress):
        if progress.rounds_done == 4:
            raise error

    with pytest.raises(type(error)) as caught:
        fh.run(ALGORITHM, KEY, state(), CLIENTS, rounds=10, callbacks=[fail], **PLAY)
    assert caught.value.history.info.round.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(caught.value.state.params, 1.875, rtol=1e-6)


def poisoned(w, batch):
    return jnp.where(batch["x"][:, 0] == 2, jnp.nan, loss_fn(w, batch))


def test_who_is_left_out_and_why():
    algorithm = fh.fedavg(poisoned, work=fh.local_steps(1, 1), local_rate=0.5)
    with pytest.warns(fh.LeftOutWarning, match=r"the first time 1 of 3, in round 0; of client 1 its loss was not"):
        _, history = fh.run(algorithm, KEY, algorithm.init(0.0), CLIENTS, rounds=4, **PLAY)
    assert history.info.left_out.tolist() == [1] * 4
    assert history.info.first_left_out.tolist() == [1] * 4 and history.info.left_out_because.tolist() == [1] * 4


def test_runs_of_a_sweep_whose_clients_are_left_out():
    """A rate of 3e38 makes the updates of all but the first client infinite; the losses of round 0 are not."""

    def make(local_rate):
        return fh.fedavg(loss_fn, work=fh.local_steps(1, 1), local_rate=local_rate)

    with pytest.warns(fh.LeftOutWarning, match=r"in 2 of 4 runs: the first time 2 of 3, in round 0; of client . its"):
        _, history = fh.sweep(
            make,
            {"local_rate": jnp.array([0.5, 3e38])},
            jax.random.split(KEY, 2),
            jnp.zeros(2),
            CLIENTS,
            rounds=3,
            cohort_size=3,
        )
    assert history.info.left_out_because[:, :, 0].tolist() == [[0, 0], [3, 3]]
    assert np.all(history.info.first_left_out[0] == -1) and np.all(history.info.left_out[1] >= 2)


def test_nothing_is_said_where_few_are_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error", fh.LeftOutWarning)
        fh.run(ALGORITHM, KEY, state(), CLIENTS, rounds=4, **PLAY)


def test_a_server_whose_step_is_not_finite_is_the_reason():
    algorithm = fh.fedavg(loss_fn, work=fh.local_steps(1, 1), local_rate=1e20, global_rate=1e20)
    start = algorithm.init(0.0)
    _, history = fh.simulate(algorithm, KEY, start, CLIENTS, rounds=1, cohort_size=3)
    assert (history.info.left_out[0], history.info.first_left_out[0], history.info.left_out_because[0]) == (3, -1, 4)


def test_runs_under_debug_nans():
    """Rounds without an evaluation hold NaN, which are ours and no error; in pieces, in a sweep and eagerly too."""
    test = {"evaluate": lambda w, _: {"w": w}, "evaluation_data": fh.EvaluationData(test={"x": np.zeros(1)})}
    with jax.debug_nans(True):
        _, whole = fh.simulate(ALGORITHM, KEY, state(), CLIENTS, rounds=4, cohort_size=3, eval_every=2, **test)
        _, pieces = fh.run(ALGORITHM, KEY, state(), CLIENTS, rounds=4, eval_every=2, **PLAY, **test)
        _, grid = fh.sweep(
            lambda local_rate: fh.fedavg(loss_fn, work=fh.local_steps(1, 1), local_rate=local_rate),
            {"local_rate": jnp.array([0.5])},
            KEY[None],
            jnp.zeros(1),
            CLIENTS,
            rounds=4,
            cohort_size=3,
            eval_every=2,
            **test,
        )
    for history in (whole, pieces, grid):
        np.testing.assert_allclose(np.ravel(history.evaluation["w"]), [np.nan, 1.5, np.nan, 1.875], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((fh.fedavg, KEY, None, CLIENTS), "algorithm must be a FederatedAlgorithm, got .*; a method makes one of a"),
        ((ALGORITHM, 0, None, CLIENTS), r"key must be a random key, got 0; e\.g\. jax\.random\.key\(0\)"),
        ((ALGORITHM, jax.random.split(KEY, 3), None, CLIENTS), r"key must be one key, got an array of shape \(3,\)"),
        ((ALGORITHM, KEY, {"w": 1.0}, CLIENTS), r"state must be a ServerState, got \{'w': 1.0\}; algorithm\.init\("),
        ((ALGORITHM, KEY, None, {"x": [1.0]}), r"data must be a federated data set, as data\.pack\(…\) makes one, got"),
    ],
)
@pytest.mark.parametrize("play", [fh.simulate, fh.run])
def test_arguments_that_are_something_else(play, arguments, message):
    algorithm, key, given, clients = arguments
    with pytest.raises(TypeError, match=message):
        play(algorithm, key, state() if given is None else given, clients, rounds=1, cohort_size=1)


def test_a_state_that_is_none_in_a_round_of_ones_own():
    with pytest.raises(TypeError, match=r"state must be a ServerState, got 0\.0"):
        ALGORITHM.round(KEY, 0.0, data.make_cohort(CLIENTS, [0]))
    with pytest.raises(TypeError, match="key must be a random key, got 0;"):
        ALGORITHM.round(0, state(), data.make_cohort(CLIENTS, [0]))


def test_a_rule_without_a_rate():
    rule = fh.rates.scheduled(0.1)._replace(init=lambda params: 0.1)
    with pytest.raises(TypeError, match=r"the state of the rule local_rate must have a field 'rate', got 0\.1;"):
        fh.fedavg(loss_fn, work=fh.local_steps(1, 1), local_rate=rule).init(0.0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda w, b: (loss_fn(w, b), 1.0), r"one value per example, shape \(1,\), got a tuple of 2; return the array"),
        (lambda w, b: loss_fn(w, b).mean(), r"one value per example, shape \(1,\), got shape \(\)"),
    ],
)
def test_losses_that_return_something_else(loss, message):
    algorithm = fh.fedavg(loss, work=fh.local_steps(1, 1), local_rate=0.1)
    with pytest.raises(ValueError, match=message):
        fh.simulate(algorithm, KEY, algorithm.init(0.0), CLIENTS, rounds=1, cohort_size=1)


def test_metrics_that_are_not_named():
    evaluate = fh.make_evaluation(lambda w, batch: batch["x"])
    with pytest.raises(ValueError, match=r"metrics_fn must return a dict of named values, .* got an array of shape"):
        evaluate(0.0, fh.EvaluationData(test={"x": np.zeros(2)}))
