"""FedAvg as a plain PyTorch loop: one model, its parameters overwritten for each client, no framework."""

import time

import numpy as np
import torch
from common import arguments, batches, clients, report
from torch import nn

job, rounds, threads = arguments()
torch.set_num_threads(threads)
torch.manual_seed(0)
x, y = (torch.from_numpy(array) for array in clients(job.name))
y = y.long()
if job.name == "cnn":
    x = x.permute(0, 1, 4, 2, 3).contiguous()
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(7 * 7 * 32, 10)),
    )
else:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
x, y, model = (thing.to(job.device) for thing in (x, y, model))
params = list(model.parameters())
server = [param.detach().clone() for param in params]
optimizer = torch.optim.SGD(params, lr=job.rate)  # it has no state, so one serves all clients
loss_fn = nn.CrossEntropyLoss()
rng = np.random.default_rng(1)


def load(values):
    """Overwrites the model's parameters."""
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)


def one_round():
    """Clients are equally large, so the mean is plain."""
    total = [torch.zeros_like(param) for param in server]
    for client in rng.choice(job.clients, job.cohort, replace=False):
        load(server)
        for rows in map(torch.from_numpy, batches(job, rng)):
            rows = rows.to(job.device, non_blocking=True)
            optimizer.zero_grad()
            loss_fn(model(x[client][rows]), y[client][rows]).backward()
            optimizer.step()
        torch._foreach_add_(total, [param.detach() for param in params])
    for param, summed in zip(server, total, strict=True):
        param.copy_(summed / job.cohort)
    if job.device != "cpu":
        torch.cuda.synchronize()


def loss():
    """Of the server's model, on the first clients."""
    load(server)
    with torch.no_grad():
        return loss_fn(model(x[:20].flatten(0, 1)), y[:20].flatten())


before, seconds = loss(), []
for _ in range(1 + rounds):
    start = time.perf_counter()
    one_round()
    seconds.append(time.perf_counter() - start)
report("torch", job, seconds[1:], (before, loss()), job.cohort * job.steps, {"torch": torch.__version__})
