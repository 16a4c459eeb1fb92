"""FedAvg on FedJAX: its own algorithm, its default `for_each_client` backend (jit; one dispatch a step)."""

import time
from importlib.metadata import version

import fedjax
import haiku as hk
import jax
import jax.numpy as jnp
from common import arguments, clients, report

job, rounds, _ = arguments()  # XLA takes all cores that it may use
x, y = clients(job.name)


def forward(batch):
    """The network."""
    layers = [hk.Linear(64), jax.nn.relu, hk.Linear(10)]
    if job.name == "cnn":
        layers = [hk.Conv2D(16, 5), jax.nn.relu, hk.MaxPool(2, 2, "VALID")]
        layers += [hk.Conv2D(32, 5), jax.nn.relu, hk.MaxPool(2, 2, "VALID"), hk.Flatten(), hk.Linear(10)]
    return hk.Sequential(layers)(batch["x"])


def loss_fn(batch, outputs):
    """Cross-entropy of each example."""
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), batch["y"][:, None], 1)[:, 0]


probe = {"x": x[:20].reshape(-1, *x.shape[2:]), "y": y[:20].reshape(-1)}
model = fedjax.create_model_from_haiku(hk.transform(forward), {k: v[:1] for k, v in probe.items()}, loss_fn, {})
algorithm = fedjax.algorithms.fed_avg.federated_averaging(
    fedjax.model_grad(model),
    fedjax.optimizers.sgd(job.rate),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=job.batch, num_steps=job.steps, num_epochs=None),
)
data = fedjax.InMemoryFederatedData({client: {"x": x[client], "y": y[client]} for client in range(job.clients)})
sampler = fedjax.client_samplers.UniformGetClientSampler(data, job.cohort, seed=0)
state = algorithm.init(model.init(jax.random.PRNGKey(0)))


def loss():
    """Of the server's model, on the first clients."""
    return jnp.mean(loss_fn(probe, model.apply_for_eval(state.params, probe)))


before, seconds = loss(), []
for _ in range(2 + rounds):  # the first two compile
    start = time.perf_counter()
    state, _ = algorithm.apply(state, sampler.sample())
    jax.block_until_ready(state.params)
    seconds.append(time.perf_counter() - start)
versions = {name: version(name) for name in ("fedjax", "jax")}
report("fedjax", job, seconds[2:], (before, loss()), job.cohort * job.steps, versions)
