"""What runs leave: rounds as columns, and what a prompt shows of data, algorithms, states and histories."""

import csv
import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedhyper_jax as fh
from fedhyper_jax import data
from fedhyper_jax.base import SHARES
from fedhyper_jax.engine import History, Progress
from fedhyper_jax.shell.records import history_records, plain

ROUNDS = 4


def a_history(*axes, **evaluation):
    """Numbers that are all different, of runs with some axes before that of rounds."""
    shape = (*axes, ROUNDS)
    size = int(np.prod(shape))

    def numbers(index, name):
        counts = name.endswith(("updates", "clipped")) or name in ("participants", "left_out")
        values = (index * size + np.arange(size)).reshape(shape)
        return values.astype(np.int32) if counts else (values / 7).astype(np.float32)

    info = fh.RoundInfo(*(numbers(index, name) for index, name in enumerate(fh.RoundInfo._fields)))
    info = info._replace(round=np.broadcast_to(np.arange(ROUNDS, dtype=np.int32), shape))
    evaluated = np.broadcast_to(np.array([False, True, False, True]), shape)
    values = {name: np.where(evaluated, value, np.nan).astype(np.float32) for name, value in evaluation.items()}
    return History(info=info, evaluation=values, evaluated=evaluated)


def test_columns_of_a_run_are_its_records():
    history = a_history(test_error=np.array([0.0, 0.1, 0.0, 0.3]))
    columns = history.columns()
    assert list(columns)[:2] == ["round", "test_error"] and set(SHARES) < set(columns)
    assert all(values.shape == (ROUNDS,) for values in columns.values())
    np.testing.assert_array_equal(columns["bytes_up"], history.info.bytes_up)
    share = history.info.local_rate_clipped / history.info.local_rate_updates
    np.testing.assert_array_equal(columns["local_clipped_share"], share)
    for index, record in enumerate(history_records(history)):
        for name, values in columns.items():
            assert record[name.removeprefix("test_")] == plain(values[index])


def test_columns_of_a_sweep_say_whose_each_row_is():
    history = a_history(2, 3)
    columns = history.columns()
    assert list(columns)[:3] == ["setting", "seed", "round"]
    index = tuple(columns[name] for name in ("setting", "seed", "round"))
    np.testing.assert_array_equal(columns["client_loss"], history.info.client_loss[index])
    assert len(set(zip(*index, strict=True))) == len(columns["round"]) == 2 * 3 * ROUNDS
    assert list(a_history(3).columns())[:2] == ["run", "round"]
    with pytest.raises(ValueError, match=r"at most two axes before rounds, got shape \(1, 2, 3, 4\)"):
        a_history(1, 2, 3).columns()
    with pytest.raises(ValueError, match="the metric 'participants' is called like a column of every history"):
        a_history(participants=np.zeros(ROUNDS)).columns()


def test_columns_are_what_csv_takes():
    columns = a_history(2, 3, test_error=np.float32(0.5)).columns()
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    names, *rows = csv.reader(io.StringIO(file.getvalue()))
    for name, values in zip(names, np.array(rows, float).T, strict=True):
        np.testing.assert_allclose(values, columns[name], rtol=1e-6)


CLIENTS = data.from_client_ids({"x": np.arange(1000.0)}, np.arange(1000) % 100 + 500)
ALGORITHM = fh.fedprox(lambda w, batch: (w["w"].sum() - batch["x"]) ** 2, work=fh.local_steps(3, 4), local_rate=0.05)
STATE = ALGORITHM.init({"w": jnp.zeros((10, 100))})


def things(state, history, clients):
    """All that must fit a line or a small table."""
    cohort = data.Cohort(data=clients, client_ids=jnp.arange(50))
    return [state, history, history.info, clients, cohort, fh.EvaluationData(clients=clients)]


@pytest.mark.parametrize("axes", [(), (3,), (2, 3)])
def test_nothing_is_shown_as_whole_arrays(axes):
    history = a_history(*axes, test_error=np.float32(0.5))
    states = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*axes, *leaf.shape)), STATE)
    one_round = jax.tree.map(lambda leaf: leaf[..., 0].ravel()[0], history.info)
    known = [*things(states, history, CLIENTS), one_round]
    shapes = jax.eval_shape(lambda *trees: trees, states, history, CLIENTS)
    others = things(*shapes)
    jax.eval_shape(lambda *trees: others.extend(map(repr, things(*trees))), states, history, CLIENTS)
    others += [jax.tree.map(lambda leaf: object(), tree) for tree in (states, history, CLIENTS)]
    for thing in known + others:
        text = thing if isinstance(thing, str) else repr(thing)
        lines = text.splitlines()
        assert len(lines) <= 10 and max(map(len, lines)) <= 320 and "array(" not in text and "Traced" not in text
    assert all("\n" not in (thing if isinstance(thing, str) else repr(thing)) for thing in others)


def test_what_is_shown():
    assert repr(CLIENTS) == (
        "<FederatedData: 100 clients (500, 501, 502, …) with 1,000 examples, 10 a client: x float32[]>"
    )
    assert repr(STATE) == (
        "<ServerState: next round 0, global rate 1, local rate 0.05, 1,000 parameters in 1 array, proximal>"
    )
    assert repr(ALGORITHM) == (
        "<FederatedAlgorithm: fedprox, local_steps(3, batch_size=4), global rate 1, local rate 0.05, proximal, "
        "weighting 'examples', strategy 'vectorized'>"
    )
    assert repr(Progress(10, 20, 60, STATE, a_history(), 1.25)) == (
        "<Progress: rounds 10 to 19 of 60 are done, in 1.2 s>"
    )
    sweep = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (2, 3, *leaf.shape)), STATE)
    assert repr(sweep).startswith("<ServerState: 2 × 3 runs: next round 0, global rate 1, ")
    history = a_history(test_error=np.array([0.0, 0.1, 0.0, 0.3]))
    title, header, error, *_ = repr(history).splitlines()
    assert title == "<History: 4 rounds" and header.split() == ["number", "first", "last", "all"]
    assert error.split() == ["test_error", "0.1", "0.3", "0.1", "to", "0.3"]  # (of the rounds that were evaluated)
    diverged = history._replace(info=history.info._replace(client_loss=np.array([1.0, 2.0, np.inf, np.nan])))
    assert "client_loss 1 nan 1 to 2 (2 not finite)" in " ".join(repr(diverged).split())
    given_away = jax.tree.map(jnp.copy, STATE)
    given_away.round.delete()
    assert "next round int32[], global rate 1" in repr(given_away)


def test_named_tuples_are_the_same_trees_as_before():
    """`repr` adds nothing to what jit, checkpoints and pickles see."""
    history = a_history()
    leaves, structure = jax.tree.flatten(history)
    assert structure.num_leaves == len(fh.RoundInfo._fields) + 1 and len(leaves) == structure.num_leaves
    again = pickle.loads(pickle.dumps(history))
    assert type(again) is History and jax.tree.structure(again) == structure


def test_an_error_inside_jit_names_the_data_in_a_line():
    with pytest.raises(ValueError, match=r"weighting='weights' needs a data set with weights, got <FederatedData: 100"):
        algorithm = fh.fedavg(
            lambda w, b: (w - b["x"]) ** 2, work=fh.local_steps(1, 1), local_rate=0.1, weighting="weights"
        )
        jax.jit(algorithm.round)(jax.random.key(0), algorithm.init(0.0), data.make_cohort(CLIENTS, [0]))
