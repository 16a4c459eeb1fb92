"""FedAvg on Flower: its strategy and its simulation engine (Ray), one actor a core, one thread an actor."""

import time
from importlib.metadata import version

import numpy as np
import torch
from common import arguments, batches, clients, report
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

job, rounds, threads = arguments()
client_app, server_app, result = ClientApp(), ServerApp(), {}


def network():
    """The network."""
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    if job.name == "cnn":
        layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5, padding=2)]
        layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(7 * 7 * 32, 10)]
    return nn.Sequential(*layers)


def tensors(some):
    """Inputs and labels of one client, or of several; NumPy's memory, which `common` keeps once a process."""
    x, y = (torch.from_numpy(array[some]) for array in clients(job.name))
    return (x.movedim(-1, -3).contiguous() if job.name == "cnn" else x), y.long()


@client_app.train()
def train(message, context):
    """One client's round."""
    torch.set_num_threads(1)
    (x, y), model = tensors(int(context.node_config["partition-id"])), network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=job.rate), nn.CrossEntropyLoss()
    for rows in map(torch.from_numpy, batches(job, np.random.default_rng())):
        optimizer.zero_grad()
        loss_fn(model(x[rows]), y[rows]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": job.examples})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """FedAvg, with the seconds from choosing a cohort to the new parameters, and how many replied."""

    def configure_train(self, *given):
        """Starts the clock."""
        self.start = time.perf_counter()
        return super().configure_train(*given)

    def aggregate_train(self, number, replies):
        """Stops the clock."""
        replies = list(replies)
        new = super().aggregate_train(number, replies)
        result.setdefault("seconds", []).append(time.perf_counter() - self.start)
        result["replies"] = sum(not reply.has_error() for reply in replies)
        return new


@server_app.main()
def serve(grid, context):
    """The run."""
    torch.manual_seed(0)
    start, (x, y) = network(), tensors(slice(20))

    def loss(arrays):
        model = network()
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x.flatten(0, 1)), y.flatten())

    strategy = Timed(fraction_train=job.cohort / job.clients, fraction_evaluate=0.0, min_available_nodes=job.clients)
    initial = ArrayRecord(start.state_dict())
    end = strategy.start(grid=grid, initial_arrays=initial, num_rounds=1 + rounds)
    result["losses"] = loss(initial), loss(end.arrays)


resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": threads}}
run_simulation(server_app, client_app, num_supernodes=job.clients, backend_config=resources)
versions = {name: version(name) for name in ("flwr", "ray", "torch")}
report("flower", job, result["seconds"][1:], result["losses"], result["replies"] * job.steps, versions)
