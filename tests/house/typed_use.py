"""The public surface as users write it, for a type checker to read (test_types.py); nothing here is run.

A line that ends in an ignore comment is a mistake, and the checker must see it: an ignore comment that ignores nothing
is an error of its own there.
"""

from typing import NamedTuple, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import fedhyper_jax as fh
from fedhyper_jax import aggregators, client_rules, failures, guards, rates, server_optimizers, terms
from fedhyper_jax.parts import Feedback, RateReport, RateRule


def transforms(params: dict[str, jax.Array], gradient: dict[str, jax.Array]) -> None:
    """In an optax chain, with numbers of every kind; the rate is read back."""
    first: optax.GradientTransformationExtraArgs = fh.scale_by_hypergradient(0.001, hyper_rate=1e-4, bounds=(0, 1))
    fh.scale_by_hypergradient(jnp.float32(0.1), np.float32(1.0), normalise="cosine", update="exponential", max_change=1)
    fh.scale_by_local_hypergradient(0.1, global_weight=0.5)
    fh.scale_by_retained_gain(window=3, target_share=0.4)
    optimizer = optax.chain(fh.track_hypergradient(0.1), first, optax.scale(-1.0))
    state = optimizer.init(params)
    updates, state = optimizer.update(gradient, state, params, gradient=gradient)
    optax.apply_updates(params, updates)
    assert_type(fh.global_rate(state), jax.Array)
    assert_type(fh.local_rate(state), jax.Array)
    fh.scale_by_hypergradient("0.1")  # pyright: ignore[reportArgumentType]
    fh.scale_by_hypergradient(0.1, bounds=0.5)  # pyright: ignore[reportArgumentType]
    fh.scale_by_local_hypergradient(0.1)  # pyright: ignore[reportCallIssue]


def loss_fn(params: fh.base.Params, batch: fh.base.Batch) -> jax.Array:
    """A loss of one's own."""
    return optax.squared_error(batch["x"] @ params["w"], batch["y"])


def data_sets() -> fh.FederatedData:
    """Named ones, and arrays of one's own."""
    digits = fh.data.load("digits")
    assert_type(digits, fh.data.Dataset)
    partition = fh.data.dirichlet(digits.train["y"], 100, alpha=0.5, seed=0)
    fh.data.plot_partition(fh.data.partition_report(partition, digits.train["y"]), "partition.png")
    fh.data.pack({"x": np.zeros((3, 2)), "y": [1, 2, 3]}, {"ann": [0, 1], "bob": [2]})
    fh.data.load_mnist(folder="here", standardise=False)
    return fh.data.pack(digits.train, partition.client_rows)


def simulations(algorithm: fh.FederatedAlgorithm, params: fh.base.Params) -> None:
    """One scan, a host loop, a grid; of stored clients and of those that are made when they are drawn."""
    key, clients, work = jax.random.key(0), data_sets(), fh.local_steps(10, batch_size=16)
    evaluation = fh.EvaluationData(test={"x": jnp.zeros((3, 2)), "y": jnp.zeros(3)}, clients=clients)
    model = fh.models.mlp(num_classes=10)
    evaluate = fh.make_evaluation(fh.metrics.classification(model))
    state, history = fh.simulate(
        algorithm, key, algorithm.init(params), clients, rounds=5, cohort_size=2, evaluate=evaluate,
        evaluation_data=evaluation, participation=fh.participation.weighted(np.ones(100)),
    )  # fmt: skip
    assert_type(state, fh.ServerState)
    assert_type(history, fh.History)
    assert_type(history.info.local_rate, jax.Array)
    assert_type(history.evaluation["accuracy"], jax.Array)
    procedural = fh.data.load_procedural_logistic(num_clients=1000).clients
    assert procedural is not None
    fh.run(algorithm, key, state, procedural, rounds=5, cohort_size=2, callbacks=[lambda done: print(done.seconds)])

    def make(local_rate: jax.Array) -> fh.FederatedAlgorithm:
        return fh.fedavg(loss_fn, work=work, local_rate=local_rate)

    fh.sweep(make, {"local_rate": jnp.ones(3)}, jax.random.split(key, 2), params, clients, rounds=5, cohort_size=2)
    fh.simulate(algorithm, key, state, clients, rounds=5)  # pyright: ignore[reportCallIssue]
    fh.simulate(algorithm, key, state, clients, rounds="5", cohort_size=2)  # pyright: ignore[reportArgumentType]


def methods() -> None:
    """As values, as algorithms, by name, and made of parts."""
    model, work = fh.models.from_linen(linen.Dense(3)), fh.local_epochs(1, 16)
    cross_entropy = fh.losses.cross_entropy(model)
    both = fh.scaffold(population=100) + fh.fedexp(epsilon=0.01)
    assert_type(both(loss_fn, work=work, local_rate=0.1), fh.FederatedAlgorithm)
    assert_type(fh.fedhyper(cross_entropy, "G+CL", work=work, local_rate=0.01), fh.FederatedAlgorithm)
    fh.fedavg(loss_fn, work=work, local_rate=optax.cosine_decay_schedule(0.1, 100), strategy="chunked(5)")
    fh.make_method("scaffold+fedexp", loss_fn, work=work, population=100, local_rate=0.1)
    fh.method_by_name("fedprox", proximal_weight=0.1)
    fh.federated_algorithm(
        loss_fn, work=work, local_rate=rates.hypergradient(0.1), global_rate=rates.extrapolation(),
        client_rule=client_rules.polyak(), terms=[terms.proximal(0.1)], aggregator=aggregators.clipped(
            aggregators.median(), 1.0), failure_model=failures.dropout(0.1), guard=guards.rollback(2.0),
        server_optimizer=server_optimizers.adam(), client_optimizer=optax.sgd(1.0, momentum=0.9),
    )  # fmt: skip
    fh.fedexp(epsilom=0.01)  # pyright: ignore[reportCallIssue]
    fh.fedhyper(loss_fn, work=32, local_rate=0.1)  # pyright: ignore[reportArgumentType]


class GrowingState(NamedTuple):
    """State of a rule of one's own."""

    rate: jax.Array


def growing(initial_rate: float) -> RateRule:
    """A rule of one's own."""

    def init(params: fh.base.Params) -> GrowingState:
        return GrowingState(jnp.float32(initial_rate))

    def update(state: GrowingState, feedback: Feedback) -> tuple[GrowingState, RateReport]:
        return GrowingState(1.01 * state.rate), RateReport.none()

    return RateRule(init=init, update=update, initial_rate=initial_rate)


def shell() -> None:
    """What a command left."""
    run = fh.load_run("runs/demo")
    assert_type(run.model, fh.Model)
    fh.use_compilation_cache()
    fh.use_all_cores()
    print(fh.modles)  # pyright: ignore[reportAttributeAccessIssue]
