"""FedAvg on pfl-research: its simulated backend, one process a core under torchrun (gloo), as its guide on speed says.

Its `local_num_steps` cuts an epoch short and never goes on into the next one, so a client's data set is laid out here
as the batches of all its steps. The steps that were taken are counted.
"""

import os
import time
from importlib.metadata import version

import numpy as np
import torch
from common import arguments, clients, report
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn

job, rounds, _ = arguments()
torch.set_num_threads(1)
torch.manual_seed(0)
np.random.seed(0)  # noqa: NPY002 - pfl draws its cohorts from it, and all processes must draw the same
x, y = (torch.from_numpy(array) for array in clients(job.name))
x, y, rng = (x.permute(0, 1, 4, 2, 3).contiguous() if job.name == "cnn" else x), y.long(), np.random.default_rng(1)


class Classifier(nn.Sequential):
    """The network, with the methods that pfl asks for."""

    steps = 0

    def loss(self, inputs, targets, eval=False):
        """Of a batch."""
        self.steps += 1
        return nn.functional.cross_entropy(self(inputs), targets)

    def metrics(self, inputs, targets, eval=False):
        """None."""
        return {}


class Clock(TrainingProcessCallback):
    """When each round ended."""

    def after_central_iteration(self, *_, **__):
        """Notes the time."""
        ticks.append(time.perf_counter())
        return False, Metrics()


def user(client):
    """A client's batches of one round; all whole, since pfl cuts slices of one length."""
    epochs = -(-job.steps * job.batch // job.examples)
    rows = np.concatenate([rng.permutation(job.examples) for _ in range(epochs)])[: job.steps * job.batch]
    rows = torch.from_numpy(rows)
    return Dataset(raw_data=[x[client][rows], y[client][rows]])


def loss():
    """Of the server's model, on the first clients."""
    with torch.no_grad():
        return nn.functional.cross_entropy(net(x[:20].flatten(0, 1)), y[:20].flatten())


layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
if job.name == "cnn":
    layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5, padding=2)]
    layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(7 * 7 * 32, 10)]
net = Classifier(*layers)
model = PyTorchModel(net, lambda params, lr: torch.optim.SGD(params, lr=lr), torch.optim.SGD(net.parameters(), lr=1.0))
data = FederatedDataset(user, get_user_sampler("random", list(range(job.clients))))
before, ticks = loss(), []
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=1 + rounds,
        evaluation_frequency=10**6,
        train_cohort_size=job.cohort,
        val_cohort_size=0,
    ),
    backend=SimulatedBackend(training_data=data, val_data=None),
    model=model,
    model_train_params=NNTrainHyperParams(
        local_num_epochs=1,
        local_learning_rate=job.rate,
        local_batch_size=job.batch,
        local_max_grad_norm=None,
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=1000),
    callbacks=[Clock()],
)
steps = torch.tensor(net.steps)
if torch.distributed.is_initialized():
    torch.distributed.all_reduce(steps)
    torch.distributed.destroy_process_group()  # else a process that ends first makes the others abort
if int(os.environ.get("RANK", 0)) == 0:
    counted = int(steps) / (1 + rounds)
    versions = {name: version(name) for name in ("pfl", "torch")}
    report("pfl", job, np.diff(ticks), (before, loss()), counted, versions)
