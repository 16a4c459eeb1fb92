"""Sharded rounds: on 1, 2 and 4 devices the result is that of one, cohorts that they do not divide included."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import cohort, data, fedavg, make_method, parts, simulate, sweep
from fedhyper_jax.engine.strategies import Assignment, Slots, parse_strategy, sharded
from fedhyper_jax.shell.compare import compare
from fedhyper_jax.shell.presets import preset_config
from tests.bench import Bench
from tests.compare import assert_close
from tests.engine import toys
from tests.engine.test_probes import Probe
from tests.helpers import logistic_loss, logistic_params, product

WORK = [data.local_epochs(2, 8), data.local_steps(5, 8)]


def mesh(devices):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("clients",), axis_types=auto, devices=jax.devices()[:devices])


def run(federation, strategy, method="scaffold", work=WORK[0], **settings):
    algorithm = make_method(
        method, logistic_loss, work=work, population=20, local_rate=0.1, strategy=strategy, **settings
    )
    state = algorithm.init(logistic_params())
    return simulate(algorithm, jax.random.key(1), state, federation, rounds=3, cohort_size=7)


INNER = [("vectorized", 1), ("sequential", 2), ("chunked(2)", 4)]


@pytest.mark.parametrize("toy", toys.TOYS)
@pytest.mark.parametrize(("inner", "devices"), [INNER[2], *(product(*case) for case in INNER[:2])])
def test_toys_on_several_devices(inner, devices, toy):
    """Cohorts that the devices do not divide, and fewer clients than devices, included."""
    toys.assert_agrees(toys.run(sharded(inner, mesh(devices)), toys.TOYS[toy], toys.shared()), toys.TOYS[toy])


def test_updates_side_by_side_cross_the_devices():
    """A median, failures, rounds taken back."""
    probe = Probe(
        {
            "work": data.local_steps(3, batch_size=4),
            "global_rate": parts.rates.scheduled(1.0),
            "local_rate": parts.rates.scheduled(0.05),
            "aggregator": parts.aggregators.clipped(parts.aggregators.median(), 0.3),
            "failure_model": parts.failures.dropout(0.1, 0.2),
            "guard": parts.guards.rollback(1.02),
        }
    )
    with jax.enable_x64(True):
        whole, divided = (Bench(probe, strategy=s) for s in ("sequential", sharded("sequential", mesh(4))))
    for happened in ("not_started", "lost", "taken_back"):
        assert sum(int(getattr(info, happened)) for info in whole.infos) > 0
        assert_close((divided.states, divided.infos), (whole.states, whole.infos), 1e-9)


@pytest.mark.product  # toys have rows, the probe has the rest, and test_launch.py compares a run with that of one
@pytest.mark.parametrize("work", [pytest.param(WORK[0], id="epochs"), product(WORK[1], id="steps")])
@pytest.mark.parametrize(("inner", "devices"), [INNER[2], *(product(*case) for case in INNER[:2])])
def test_devices_change_nothing(federation, inner, devices, work):
    """SCAFFOLD keeps a row a client, so rows cross the devices too."""
    expected = run(federation, "vectorized", work=work)
    given = run(federation, sharded(inner, mesh(devices)), work=work)
    chex.assert_trees_all_close(given, expected, rtol=1e-5, atol=1e-6)
    counted = [(info.participants, info.local_steps, info.examples) for _, (info, *_) in (given, expected)]
    chex.assert_trees_all_equal(*counted)
    assert given[0].params["weights"].sharding.is_fully_replicated


@pytest.mark.product  # as the toys do
def test_more_devices_than_clients(federation):
    algorithm = fedavg(logistic_loss, work=WORK[0], local_rate=0.1, strategy=sharded(mesh=mesh(4)))
    plain = fedavg(logistic_loss, work=WORK[0], local_rate=0.1)
    ends = [
        simulate(a, jax.random.key(1), a.init(logistic_params()), federation, rounds=2, cohort_size=2)
        for a in (algorithm, plain)
    ]
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


@pytest.mark.product  # a comparison over several processes sweeps one, in test_launch.py and in the notebook
def test_sweeps_of_sharded_runs(federation):
    def make(strategy):
        return lambda local_rate: make_method(
            "G+CL", logistic_loss, work=WORK[0], population=20, local_rate=local_rate, strategy=strategy
        )

    keys, rates = jax.random.split(jax.random.key(0), 2), jnp.array([0.01, 0.1, 0.05])
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), logistic_params())
    settings = {"rounds": 2, "cohort_size": 7}
    ends = [
        sweep(make(strategy), {"local_rate": rates}, keys, params, federation, **settings)
        for strategy in ("chunked(2)", sharded("chunked(2)", mesh(2)))
    ]
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-6)


def test_one_message_a_round(federation):
    algorithm = make_method("scaffold", logistic_loss, work=WORK[0], population=20, local_rate=0.1)
    algorithm = algorithm._replace(
        round=make_method(
            "scaffold", logistic_loss, work=WORK[0], population=20, local_rate=0.1, strategy=sharded(mesh=mesh(2))
        ).round
    )
    ids = data.make_cohort(federation, [0, 3, 5])
    text = str(jax.make_jaxpr(algorithm.round)(jax.random.key(0), algorithm.init(logistic_params()), ids))
    assert text.count("psum") == 1
    assert "callback" not in text


def test_integers_cross_exactly():
    """Sums of integers beyond 2^24, which float32 rounds, and negative ones."""

    def client_fn(shared, client, num_steps, loop):
        client_id = client.client_id
        return {"total": shared[client_id]}, (shared[client_id], shared[client_id] > 0)

    numbers = np.array([2**30 - 1, -(2**24) - 1, 123_456_789, -7, 2**24 + 1], np.int32)
    slots = Slots(Assignment(jnp.arange(5), jnp.ones(5, jnp.int32)), 1, padding_id=5)
    with_zero = jnp.asarray(np.append(numbers, 0))  # what a padded slot finds
    map_reduce = sharded(mesh=mesh(4)).map_reduce
    total, (stacked, positive) = jax.jit(lambda shared: map_reduce(client_fn, shared, slots))(with_zero)
    assert stacked.tolist() == numbers.tolist() and positive.tolist() == (numbers > 0).tolist()
    assert int(total["total"]) == numbers.sum()


def test_devices_get_like_work():
    """Clients of 1 to 40 steps, dealt to four devices: nobody has much more to do than another."""
    seen = {}

    def map_reduce(client_fn, shared, slots):
        return jnp.sum(slots.steps)[None] * 0, slots.steps

    inner = cohort.Strategy("counting", map_reduce)
    steps = jnp.asarray(np.random.default_rng(0).permutation(40) + 1)
    strategy = sharded(inner, mesh(4))
    slots = Slots(Assignment(jnp.arange(40), steps), None, padding_id=40)
    _, stacked = jax.jit(lambda: strategy.map_reduce(None, (), slots))()
    assert stacked.tolist() == steps.tolist()
    # dealt 40 39 38 37 | 33 34 35 36 | …: each device's sum is that of the others
    longest_first = np.argsort(-np.asarray(steps))
    deal = np.arange(40).reshape(-1, 4)
    deal[1::2] = deal[1::2, ::-1]
    seen = np.asarray(steps)[longest_first][deal].sum(axis=0)
    assert np.ptp(seen) == 0


def test_names_and_refusals():
    assert parse_strategy("sharded(chunked(5))").name == "sharded(chunked(5))"
    for wrong in ("sharded(debug)", "sharded(sharded(vectorized))"):
        with pytest.raises(ValueError, match="sharded runs"):
            parse_strategy(wrong)
    with pytest.raises(ValueError, match="must have an axis 'clients'"):
        sharded(mesh=jax.make_mesh((1,), ("rows",), devices=jax.devices()[:1]))


@pytest.mark.product  # the notebook runs one
def test_a_comparison_in_one_process_uses_its_devices(tmp_path, monkeypatch):
    """As in a notebook after `use_all_cores`; several processes divide the methods instead."""
    demo = preset_config("demo", "compare")
    grid = dataclasses.replace(demo.compare, methods=("SL",), local_rates=(0.01,), seeds=1)

    def end(folder):
        run = dataclasses.replace(demo.run, rounds=2, strategy="sequential", out=str(tmp_path / folder))
        summary = compare(dataclasses.replace(demo, run=run, compare=grid))
        return summary["strategy"]["used"], [cell["final_accuracy"]["values"] for cell in summary["cells"]]

    divided, given = end("four")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    whole, expected = end("one")
    assert (divided, whole) == ("sharded(sequential)", "sequential")
    np.testing.assert_allclose(given, expected, atol=2e-3)  # an example of 355 may fall on the other side
