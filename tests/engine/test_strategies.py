"""Strategies on their seam: the same sums and rows as NumPy, few steps for nobody, no host inside a round."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import data, fedavg, make_method, simulate
from fedhyper_jax.engine.strategies import parse_strategy
from tests.engine import toys
from tests.helpers import logistic_loss, logistic_params

BATCH = 10


COMPILED = ["vectorized", "sequential", "chunked(2)", "chunked(3)", "sharded(vectorized)", "sharded(chunked(2))"]


@pytest.mark.parametrize("toy", toys.TOYS)
@pytest.mark.parametrize("strategy", [*COMPILED, "debug"])
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


@pytest.mark.parametrize("kind", ["dirichlet", "log-normal"])
@pytest.mark.parametrize(("strategy", "most"), [("sequential", 0.0), ("chunked(5)", 0.2), ("chunked(10)", 0.2)])
def test_few_steps_are_run_for_nobody(kind, strategy, most):
    """Counted where they happen: each run of the loss function of each client."""
    rows = skewed(kind)
    federation = data.pack({"x": np.zeros((max(map(np.max, rows)) + 1, 1), np.float32)}, rows)
    count = [0]

    def loss_fn(params, batch):
        jax.debug.callback(lambda x: count.__setitem__(0, count[0] + 1), batch["x"][0, 0])
        return (params - batch["x"][:, 0]) ** 2

    algorithm = fedavg(loss_fn, work=data.local_epochs(1, BATCH), local_rate=0.1, strategy=strategy)
    state = algorithm.init(jnp.zeros(()))
    _, history = simulate(algorithm, jax.random.key(0), state, federation, rounds=2, cohort_size=100)
    jax.effects_barrier()
    needed = int(history.info.local_steps.sum())
    masked = 1 - needed / count[0]
    assert masked <= most, f"{masked:.0%} of {count[0]} steps"
    if strategy == "sequential":
        assert count[0] == needed


@pytest.mark.parametrize("strategy", ["vectorized", "sequential", "chunked(2)"])
def test_no_host_inside_a_round(federation, strategy):
    """Once compiled, rounds run where nothing may be sent to or fetched from a device."""
    algorithm = make_method(
        "G+CL", logistic_loss, work=data.local_epochs(1, 8), population=20, local_rate=0.1, strategy=strategy
    )
    key, state = jax.random.key(0), jax.device_put(algorithm.init(logistic_params()))
    rounds = jax.jit(
        lambda key, state, federation: simulate(algorithm, key, state, federation, rounds=3, cohort_size=5)
    )
    assert "callback" not in str(jax.make_jaxpr(rounds)(key, state, federation))
    federation = jax.device_put(federation)
    before = jax.block_until_ready(rounds(key, state, federation))
    with jax.transfer_guard("disallow"):
        after = jax.block_until_ready(rounds(key, state, federation))
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
