"""Two jobs that every simulator runs the same way; NumPy only, since each peer has an environment of its own.

cnn: Fashion-MNIST, 100 clients x 600 images (IID), 10 a round, 20 local SGD steps of 32 images, rate 0.05,
     conv5x5(16)-ReLU-pool2, conv5x5(32)-ReLU-pool2, dense 10 (28,938 parameters).
mlp: made up, 10,000 clients x 40 examples of 64 features, 500 a round, 10 local SGD steps of 20, rate 0.05,
     MLP 64-64-10.

Each script is called `SCRIPT JOB ROUNDS THREADS` and prints one line of JSON. The PyTorch loop takes `--device cuda`.
"""

import argparse
import functools
import gzip
import json
import os
import types

import numpy as np

JOBS = {
    "cnn": {"clients": 100, "examples": 600, "cohort": 10, "batch": 32, "steps": 20, "rate": 0.05},
    "mlp": {"clients": 10_000, "examples": 40, "cohort": 500, "batch": 20, "steps": 10, "rate": 0.05},
}


def arguments():
    """Job (its numbers, name and device), timed rounds, threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("rounds", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("--device", default="cpu", help="of the PyTorch loop; the others run on the CPU")
    given = parser.parse_args()
    return types.SimpleNamespace(name=given.job, device=given.device, **JOBS[given.job]), given.rounds, given.threads


@functools.cache
def clients(name):
    """Inputs (clients, examples, ...) and labels (clients, examples); made once a process."""
    job, rng = JOBS[name], np.random.default_rng(0)
    if name == "cnn":
        folder = os.environ.get("FASHION_MNIST") or "/usr/share/datasets/fashion-mnist"
        with gzip.open(f"{folder}/train-images-idx3-ubyte.gz") as file:
            x = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28, 1).astype(np.float32) / 255
        with gzip.open(f"{folder}/train-labels-idx1-ubyte.gz") as file:
            y = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int32)
        order = rng.permutation(len(y))
        x, y = x[order], y[order]
    else:
        weights = rng.normal(size=(64, 10)).astype(np.float32)
        x = rng.normal(size=(job["clients"], job["examples"], 64)).astype(np.float32)
        y = (x @ weights).argmax(-1).astype(np.int32)
    shape = job["clients"], job["examples"]
    return x.reshape(*shape, *x.shape[-3:] if name == "cnn" else x.shape[-1:]), y.reshape(shape)


def batches(job, rng):
    """The rows of each local step: epoch after epoch, reshuffled, the last batch of an epoch as small as it comes."""
    rows = []
    while len(rows) < job.steps:
        order = rng.permutation(job.examples)
        rows += [order[start : start + job.batch] for start in range(0, job.examples, job.batch)]
    return rows[: job.steps]


def report(peer, job, seconds, losses, steps, versions):
    """Prints the result: seconds of each timed round, client-steps a round, loss before and after all rounds."""
    losses = [float(loss) for loss in losses]
    result = {"peer": peer, "job": job.name, "seconds": list(seconds), "client_steps_per_round": steps}
    result |= {"loss_before": losses[0], "loss_after": losses[1], "versions": versions}
    print(json.dumps(result), flush=True)
