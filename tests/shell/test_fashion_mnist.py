"""FedHyper on the real Fashion-MNIST, in the setting of SPEC.md section 4, cut to 12 rounds of 5 clients."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedhyper_jax as fh
from fedhyper_jax import data, losses, metrics, models

RATES = (0.001, 0.3)


@pytest.fixture(scope="module")
def fashion_mnist():
    try:
        return data.load_fashion_mnist(source="idx")
    except FileNotFoundError:
        if os.environ.get("FEDHYPER_REQUIRE_FASHION_MNIST"):
            raise
        pytest.skip("the Fashion-MNIST files are not here (apt-get install dataset-fashion-mnist)")


@pytest.mark.product  # an experiment; that the package learns is shown by the tasks of test_tasks.py
def test_adapted_rates_gain_from_a_rate_too_small_and_diverge_from_one_too_large(fashion_mnist):
    """Both halves of the picture; experiments/fashion_mnist_rates.py measures it in full."""
    partition = data.dirichlet(fashion_mnist.train["y"], 100, alpha=0.5, seed=0)
    federation = data.pack(fashion_mnist.train, partition.client_rows)
    model = models.mlp(10, hidden=(64,))
    params = model.init(jax.random.key(0), federation.examples["x"][:1])
    loss_fn, work = losses.cross_entropy(model), fh.local_steps(20, batch_size=32, with_replacement=True)

    def make(local_rate, server, client):
        """One program: with hyper-rates of zero it is FedAvg, bit for bit (test_round.py)."""
        hyper_rate = {"SL": server, "CL": client}
        settings = {"work": work, "local_rate": local_rate, "hyper_rate": hyper_rate, "strategy": "sequential"}
        return fh.fedhyper(loss_fn, "SL+CL", **settings)

    _, history = fh.sweep(
        make,
        {
            "local_rate": jnp.array(RATES * 3),
            "server": jnp.array([0.0, 0, 1, 1, 0, 0]),
            "client": jnp.array([0.0, 0, 0, 0, 1, 1]),
        },
        jax.random.key(0)[None],
        jax.tree.map(lambda p: p[None], params),
        federation,
        rounds=12,
        cohort_size=5,
        evaluate=fh.make_evaluation(metrics.classification(model), batch_size=1000),
        evaluation_data=fh.EvaluationData(test=jax.tree.map(jnp.asarray, fashion_mnist.test)),
        eval_every=12,
    )
    fedavg, server, client = history.evaluation["test_accuracy"][:, 0, -1].reshape(3, 2)
    assert np.all(np.stack([server, client])[:, 0] > fedavg[0] + 0.05)
    assert client[1] < fedavg[1] - 0.15
    assert fedavg[1] > 0.6
