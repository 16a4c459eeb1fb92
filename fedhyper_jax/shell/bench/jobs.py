"""The jobs that `fedhyper bench` times. Each is one round shape of a federation, made the same way every time.

``mlp`` and ``cnn`` are the jobs that `experiments/benchmark_peers.py` gives to other simulators too: the same data, in
the same order, over the same clients.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedhyper_jax import models
from fedhyper_jax.base import Batch, LossFunction, Model, Params
from fedhyper_jax.data import ClientData, LocalWork, load, local_epochs, local_steps, pack, procedural_logistic
from fedhyper_jax.tasks import losses


class Workload(NamedTuple):
    """A job that has been made: all that `simulate` needs but the method.

    Attributes:
      loss_fn: per-example losses.
      params: initial parameters.
      data: the federated data set.
      work: what a client does in a round.
      local_rate: β^0.
      example: shape and dtype of one example of each array, for counting the operations of a step.
    """

    loss_fn: LossFunction
    params: Params
    data: ClientData
    work: LocalWork
    local_rate: float
    example: dict[str, jax.ShapeDtypeStruct]


class Job(NamedTuple):
    """A job.

    Attributes:
      name: as on the command line.
      clients: what is drawn from, in words.
      training: what a client does in a round, and with which model, in words.
      build: makes it; reads or draws the data.
      cohort_size: clients a round.
      strategy: how its cohort is run on one device, unless told otherwise.
      rounds: timed together unless told otherwise, a second's work or so.
    """

    name: str
    clients: str
    training: str
    build: Callable[[], Workload]
    cohort_size: int
    strategy: str
    rounds: int

    @property
    def description(self) -> str:
        """One line."""
        return f"{self.clients}, {self.cohort_size:,} a round, {self.training}"


def _workload(model: Model, data: ClientData, example: Batch, *, work: LocalWork) -> Workload:
    """With weights of seed 0 and local rate 0.05."""
    inputs = jnp.zeros((1, *np.shape(example["x"])), example["x"].dtype)
    return Workload(
        loss_fn=losses.cross_entropy(model),
        params=jax.jit(model.init)(jax.random.key(0), inputs),
        data=data,
        work=work,
        local_rate=0.05,
        example={name: jax.ShapeDtypeStruct(np.shape(array), array.dtype) for name, array in example.items()},
    )


def _equal_clients(examples: Batch, clients: int):
    """Equal runs of rows, client after client, and the first example."""
    rows = np.arange(len(examples["y"])).reshape(clients, -1)
    return pack(examples, list(rows)), {name: array[0] for name, array in examples.items()}


def _mlp(clients: int = 10_000) -> Workload:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(64, 10)).astype(np.float32)
    x = rng.normal(size=(clients, 40, 64)).astype(np.float32)
    y = (x @ weights).argmax(-1).astype(np.int32)
    data, example = _equal_clients({"x": x.reshape(-1, 64), "y": y.reshape(-1)}, clients)
    work = local_steps(10, batch_size=20)
    return _workload(models.mlp(10, hidden=(64,)), data, example, work=work)


def _cnn() -> Workload:
    images = load("fashion_mnist", standardise=False).train
    order = np.random.default_rng(0).permutation(len(images["y"]))
    data, example = _equal_clients({name: array[order] for name, array in images.items()}, 100)
    work = local_steps(20, batch_size=32)
    return _workload(models.cnn(10), data, example, work=work)


def logistic_1m(population: int = 1_000_000) -> Workload:
    """Logistic regression on clients that are made when they are drawn."""
    data = procedural_logistic(population, num_features=64, num_classes=10, median_examples=20.0)
    first = jax.eval_shape(lambda: data.client(jnp.int32(0)).fetch(jnp.arange(1)))
    example = {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in first.items()}
    work = local_epochs(1, batch_size=20)
    return _workload(models.logistic(10), data, example, work=work)


def _resnet18(clients: int = 50, width: int = 64) -> Workload:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, size=clients * 64).astype(np.int32)
    means = rng.normal(size=(10, 32, 32, 3)).astype(np.float32)
    x = means[y] + rng.normal(size=(len(y), 32, 32, 3)).astype(np.float32)
    data, example = _equal_clients({"x": x, "y": y}, clients)
    return _workload(models.resnet18(10, width=width), data, example, work=local_steps(2, batch_size=8))


def _char_lstm(clients: int = 100, hidden: int = 256) -> Workload:
    """Text in which each of 80 characters is followed by one of four."""
    rng = np.random.default_rng(0)
    followers = rng.integers(0, 80, size=(80, 4))
    text = [rng.integers(0, 80, size=clients * 50)]
    for choice in rng.integers(0, 4, size=(80, clients * 50)):
        text.append(followers[text[-1], choice])
    text = np.stack(text, axis=1).astype(np.int32)
    data, example = _equal_clients({"x": text[:, :-1], "y": text[:, 1:]}, clients)
    return _workload(models.char_lstm(80, hidden=hidden), data, example, work=local_steps(5, batch_size=10))


_ALL = [
    Job(
        name="mlp",
        clients="10,000 clients × 40 examples of 64 features",
        training="10 steps of 20, MLP 64-64-10",
        build=_mlp,
        cohort_size=500,
        strategy="chunked(5)",
        rounds=10,
    ),
    Job(
        name="cnn",
        clients="Fashion-MNIST, 100 clients × 600 images",
        training="20 steps of 32, conv5x5(16)-conv5x5(32)",
        build=_cnn,
        cohort_size=10,
        strategy="sequential",
        rounds=2,
    ),
    Job(
        name="logistic-1M",
        clients="10⁶ clients made on demand, log-normal sizes of median 20",
        training="1 epoch in batches of 20, logistic regression 64-10",
        build=logistic_1m,
        cohort_size=500,
        strategy="chunked(10)",
        rounds=10,
    ),
    Job(
        name="resnet18",
        clients="50 clients × 64 images of 32×32×3",
        training="2 steps of 8, ResNet-18 with GroupNorm",
        build=_resnet18,
        cohort_size=2,
        strategy="sequential",
        rounds=1,
    ),
    Job(
        name="char_lstm",
        clients="100 clients × 50 texts of 80 of 80 characters",
        training="5 steps of 10, LSTM 2 × 256",
        build=_char_lstm,
        cohort_size=10,
        strategy="sequential",
        rounds=1,
    ),
]

JOBS: dict[str, Job] = {job.name: job for job in _ALL}
"""Jobs by name."""
