"""Strategies on their seam: the same sums and rows as NumPy, few steps for nobody, no host inside a round."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import data, fedavg, make_method, simulate
from fedhyper_jax.engine.strategies import Slots, parse_strategy
from tests.engine import toys
from tests.helpers import logistic_loss, logistic_params, product

BATCH = 10


# (test_sharded.py has toys on several devices)
@pytest.mark.parametrize("toy", toys.TOYS)
@pytest.mark.parametrize(
    "strategy",
    [
        *("vectorized", "sequential", "chunked(2)", "debug"),
        *map(product, ("chunked(3)", "sharded(vectorized)", "sharded(chunked(2))")),
    ],
)
def test_every_strategy_maps_and_reduces_as_numpy_does(strategy, toy):
    """Ragged steps, padded slots anywhere, static steps, sums of floats and integers, rows in the cohort's order."""
    toys.assert_agrees(toys.run(strategy, toys.TOYS[toy], toys.shared()), toys.TOYS[toy])


@pytest.mark.parametrize("strategy", ["vectorized", "sequential", "chunked(2)"])
def test_a_sweep_of_strategies_gives_each_run_its_own(strategy):
    """Under vmap over what is shared and over the cohorts, whose loops end at other steps."""
    cohorts = [toys.TOYS["ragged"], toys.Toy((8, 2, 1, 6, 5), (1, 2, 9, 4, 1)), toys.TOYS["some never start"]]
    factors = [0.5, 1.0, 0.25]
    given = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(toys.shared, factors))
    clients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(toys.slots(toy).clients for toy in cohorts))
    together = jax.jit(
        jax.vmap(
            lambda given, clients: parse_strategy(strategy).map_reduce(
                toys.client_fn, given, toys.slots(cohorts[0])._replace(clients=clients)
            )
        )
    )(given, clients)
    for index, (toy, factor) in enumerate(zip(cohorts, factors, strict=True)):
        toys.assert_agrees(jax.tree.map(lambda leaf, i=index: leaf[i], together), toy, factor)


def skewed(kind):
    """1,000 clients."""
    rng = np.random.default_rng(3)
    if kind == "dirichlet":
        labels = rng.integers(10, size=40_000)
        return data.dirichlet(labels, 1000, alpha=0.1, seed=0).client_rows
    sizes = np.ceil(20 * rng.lognormal(sigma=1.0, size=1000)).astype(int)
    return np.split(np.arange(sizes.sum()), np.cumsum(sizes)[:-1])


LIMITS = {"sequential": 0.0, "chunked(5)": 0.2, "chunked(10)": 0.2}
"""Share of steps that may be run for nobody."""


@pytest.mark.parametrize("kind", ["dirichlet", "log-normal"])
@pytest.mark.parametrize("strategy", LIMITS)
def test_few_steps_are_run_for_nobody(kind, strategy):
    """Counted where they happen: each step of each client."""
    count = [0]

    def client_fn(shared, client, num_steps, loop):
        def step(k, carry):
            jax.debug.callback(lambda x: count.__setitem__(0, count[0] + 1), client.client_id)
            return carry + shared

        return loop(num_steps, step, jnp.zeros(())), ()

    sizes = np.array([len(rows) for rows in skewed(kind)])

    def program(clients):
        return parse_strategy(strategy).map_reduce(client_fn, jnp.ones(()), Slots(clients, None, toys.POPULATION))[0]

    map_reduce = jax.jit(program)
    needed = 0
    for seed in range(2):
        ids = np.random.default_rng(seed).permutation(1000)[:100]
        clients = toys.Toy(tuple(ids), tuple(-(-sizes[ids] // BATCH)))
        map_reduce(toys.slots(clients).clients)
        needed += sum(clients.steps)
    jax.effects_barrier()
    assert needed <= count[0] and 1 - needed / count[0] <= LIMITS[strategy], (needed, count[0])


def test_a_round_runs_few_steps_for_nobody():
    """It tells its strategy of every client's own number of steps."""
    rows = skewed("log-normal")
    federation = data.pack({"x": np.zeros((max(map(np.max, rows)) + 1, 1), np.float32)}, rows)
    count = [0]

    def loss_fn(params, batch):
        jax.debug.callback(lambda x: count.__setitem__(0, count[0] + 1), batch["x"][0, 0])
        return (params - batch["x"][:, 0]) ** 2

    algorithm = fedavg(loss_fn, work=data.local_epochs(1, BATCH), local_rate=0.1, strategy="sequential")
    state = algorithm.init(jnp.zeros(()))
    _, history = simulate(algorithm, jax.random.key(0), state, federation, rounds=2, cohort_size=100)
    jax.effects_barrier()
    assert int(history.info.local_steps.sum()) == count[0]


def rounds_of(strategy, federation):
    """Three rounds as one function, and its arguments."""
    algorithm = make_method(
        "G+CL", logistic_loss, work=data.local_epochs(1, 8), population=20, local_rate=0.1, strategy=strategy
    )

    def rounds(key, state, federation):
        return simulate(algorithm, key, state, federation, rounds=3, cohort_size=5)

    return rounds, (jax.random.key(0), jax.device_put(algorithm.init(logistic_params())), federation)


@pytest.mark.parametrize("strategy", ["vectorized", "sequential", "chunked(2)"])
def test_no_host_inside_a_round(federation, strategy):
    rounds, arguments = rounds_of(strategy, federation)
    assert "callback" not in str(jax.make_jaxpr(rounds)(*arguments))


def test_compiled_rounds_run_without_the_host(federation):
    """Where nothing may be sent to or fetched from a device."""
    rounds, arguments = rounds_of("sequential", jax.device_put(federation))
    rounds = jax.jit(rounds)
    before = jax.block_until_ready(rounds(*arguments))
    with jax.transfer_guard("disallow"):
        after = jax.block_until_ready(rounds(*arguments))
    chex.assert_trees_all_equal(before, after)


def test_a_rate_a_client_costs_four_bytes():
    population = 1_000_000
    algorithm = make_method(
        "CL",
        logistic_loss,
        work=data.local_epochs(1, 8),
        population=population,
        local_rate=0.1,
        client_rates="per_client",
    )
    state = jax.eval_shape(algorithm.init, logistic_params())
    rows = jax.tree.leaves(state.clients)
    assert [(leaf.shape, leaf.dtype) for leaf in rows] == [((population,), jnp.float32)]
