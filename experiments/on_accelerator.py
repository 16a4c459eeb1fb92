"""All that has to be measured on a GPU or TPU, in one script of ten minutes: numbers, speed, memory, forms, PyTorch.

Command:   python experiments/on_accelerator.py            (at most 9.5 minutes; --minutes 5 for less)
           python experiments/on_accelerator.py --small    (a rehearsal on any machine: 2 minutes at most on 2 cores)
           python experiments/on_accelerator.py --join     (measures nothing: puts the results into the speed page)
Expected:  experiments/results/accelerator-<device kind>.json and .md (--small: runs/), written anew after every item:
           what passed, how many client-steps/s each job makes under each strategy, and the line of
           fedhyper_jax/models/forms.py that follows for this platform. --join: a line in experiments/results/speed.md.
           The exit status is 1 where a number was wrong.
Time:      the most important items come first. When the time is over the script ends, in the middle of an item if need
           be, and the others stand in the results as not measured.

It needs this checkout, JAX for the accelerator, optax, flax, jaxtyping, rich, and PyTorch (in the same Python or that
of --torch-python) for its part; no network, no pytest and no data set: the images of `cnn` are made up, for speed does
not depend on them. Nothing else may run on the machine meanwhile.
"""

import argparse
import contextlib
import functools
import gzip
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

START = time.monotonic()
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # a checkout that is not installed will do

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

import fedhyper_jax as fh
from experiments.xla_flags import QUICK, as_flags
from fedhyper_jax import _random, _threefry, _tree, data, models
from fedhyper_jax.engine import divided, parse_strategy, place
from fedhyper_jax.models.forms import ASSUMED, FORMS, Forms
from fedhyper_jax.shell.bench import JOBS, Job, Workload, jobs, machine, measure, spread
from fedhyper_jax.shell.bench.measure import compile_rounds
from fedhyper_jax.shell.files import written_whole

RESULTS = HERE / "results"
PEERS = HERE / "peers"
Results = dict[str, Any]


class Layer(NamedTuple):
    """A layer to be timed: what it is, the shapes of its inputs and of its kernel, and its strides."""

    kind: str  # "conv", "image" (a convolution of data: no gradient towards its inputs), "norm" or "rnn"
    inputs: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    strides: tuple[int, int] = (1, 1)


class Preset(NamedTuple):
    """How much is measured."""

    minutes: float
    layers: dict[str, Layer]
    ways: tuple[tuple[str, str], ...]  # (clients, gradients) of convolutions
    clients: int  # side by side in a timed layer
    steps: int  # of a timed layer in a scan
    repeats: int
    products: int  # n of the n × n matrix products
    strategies: dict[str, tuple[str, ...]]  # of each job, the most important first
    schedulers: tuple[str, ...]  # jobs on which G, SL and CL are measured
    torch: dict[str, int]  # rounds of the PyTorch loop


# Those of models/networks.py on the jobs of `fedhyper bench`.
LAYERS = {
    "cnn, second convolution": Layer("conv", (32, 14, 14, 16), (5, 5, 16, 32)),
    "cnn, first convolution": Layer("image", (32, 28, 28, 1), (5, 5, 1, 16)),
    "resnet18, first stage": Layer("conv", (8, 32, 32, 64), (3, 3, 64, 64)),
    "resnet18, stem": Layer("image", (8, 32, 32, 3), (3, 3, 3, 64)),
    "char_lstm, second layer": Layer("rnn", (10, 80, 256)),
    "resnet18, GroupNorm": Layer("norm", (8, 32, 32, 64)),
    "resnet18, last stage": Layer("conv", (8, 8, 8, 256), (3, 3, 256, 512), (2, 2)),
}
FULL = Preset(
    minutes=9.5,
    layers=LAYERS,
    ways=tuple(itertools.product(("one_by_one", "at_once"), ("in_parts", "at_once", "derived"))),
    clients=8,
    steps=20,
    repeats=5,
    products=8192,
    strategies={
        "mlp": ("vectorized", "chunked(64)", "chunked(16)", "chunked(5)", "sequential"),
        "cnn": ("vectorized", "sequential", "chunked(5)"),
        "char_lstm": ("vectorized", "sequential", "chunked(5)"),
        "logistic-1M": ("vectorized", "chunked(64)", "chunked(10)", "sequential"),
        "resnet18": ("vectorized", "sequential"),
    },
    schedulers=("mlp", "cnn", "char_lstm", "logistic-1M", "resnet18"),
    torch={"mlp": 3, "cnn": 5},
)
SMALL = Preset(
    minutes=2,
    layers={
        "cnn, second convolution": Layer("conv", (4, 6, 6, 4), (3, 3, 4, 8)),
        "cnn, first convolution": Layer("image", (4, 8, 8, 1), (3, 3, 1, 4)),
        "char_lstm, second layer": Layer("rnn", (2, 5, 8)),
        "resnet18, GroupNorm": Layer("norm", (2, 4, 4, 4)),
    },
    ways=(("one_by_one", "in_parts"), ("at_once", "derived")),
    clients=2,
    steps=2,
    repeats=1,
    products=256,
    strategies={
        "mlp": ("vectorized", "sequential"),
        "cnn": ("vectorized",),
        "char_lstm": ("vectorized",),
        "logistic-1M": ("vectorized",),
        "resnet18": ("sequential",),
    },
    schedulers=("mlp",),
    torch={"mlp": 1},
)


class Item(NamedTuple):
    """Something to be measured: the part of the results that it is appended to, its name, and how."""

    part: str
    name: str
    do: Callable[[], Results]


def work_through(
    items: Sequence[Item], results: Results, write: Callable[[Results], None], seconds_left: Callable[[], float]
) -> None:
    """Measures one item after the other; what is known is written after each, and what is not is named there.

    An item for which less time is left than the longest of its part took is left out, so that shorter ones still run.
    """
    waiting = {f"{item.part}: {item.name}": "the time was over" for item in items}
    results["not_measured"] = waiting
    write(results)
    longest: dict[str, float] = {}
    for item in items:
        title, left = f"{item.part}: {item.name}", seconds_left()
        if left <= longest.get(item.part, 0.0):
            waiting[title] = f"{max(left, 0):.0f} s were left, another one took {longest[item.part]:.0f} s"
            continue
        start = time.perf_counter()
        try:
            found = item.do()
        except Exception as error:  # one item may need more memory, or an operation, than the device has
            waiting[title] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        else:
            seconds = time.perf_counter() - start
            results.setdefault(item.part, []).append({"name": item.name, **found, "seconds": round(seconds, 2)})
            longest[item.part] = max(longest.get(item.part, 0.0), seconds)
            del waiting[title]
        print(f"{title}: {waiting.get(title, 'done')}", file=sys.stderr, flush=True)
        write(results)


# ---------------------------------------------------------------------------------------------------- device


def device_kind() -> str:
    """As part of a file's name, e.g. nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")


def device_facts() -> Results:
    """What the numbers depend on."""
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    try:
        ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        driver = None
    return {
        "kind": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "memory_gib": round(memory["bytes_limit"] / 2**30, 1) if "bytes_limit" in memory else None,
        "driver": driver,  # name, memory and driver, as nvidia-smi has them
        "runtime": " ".join(device.client.platform_version.split()),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "fedhyper_jax": fh.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": str(jax.config.jax_default_matmul_precision),
        **machine(),
    }


def products(size: int) -> Results:
    """Speed of large matrix products in float32 as they come and at "highest", and how exact they are."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 256, 256)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    found = {}
    for precision in ("default", "highest"):
        product = jax.jit(functools.partial(jnp.dot, precision=precision))
        error = float(np.abs(np.asarray(product(a, b)) - exact).max() / np.abs(exact).max())
        large = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
        product(large, large).block_until_ready()
        seconds = min(timed(lambda: product(large, large)) for _ in range(4))  # noqa: B023
        found[precision] = {"gigaflops": 2 * size**3 / seconds / 1e9, "relative_error": error}
    return {"size": size, **found}


def timed(call: Callable[[], Any]) -> float:
    """Seconds until its arrays are there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------- numbers

CLIENTS, EXAMPLES, FEATURES, CLASSES, STEPS, ROUNDS = 5, 8, 6, 3, 3, 4
LOCAL_RATE, HYPER_RATE = 0.2, 0.5


@functools.cache
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Examples and labels of each client, weights and bias to start from; a client's batch is all that it has."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(CLIENTS, EXAMPLES, FEATURES)).astype(np.float32)
    y = rng.integers(0, CLASSES, (CLIENTS, EXAMPLES)).astype(np.int32)
    return x, y, (0.3 * rng.normal(size=(FEATURES, CLASSES))).astype(np.float32), np.zeros(CLASSES, np.float32)


def rounds_in_numpy(schedulers: Sequence[str]) -> tuple[np.ndarray, list[float], list[float]]:
    """Last parameters, flat, and both rates of every round: softmax regression, equations 15 to 20, in float64."""
    x, y, weights, bias = problem()
    x, w = x.astype(np.float64), np.concatenate([weights.ravel(), bias]).astype(np.float64)
    one_hot = np.eye(CLASSES)[y]

    def gradient(w, m):
        logits = x[m] @ w[:-CLASSES].reshape(FEATURES, CLASSES) + w[-CLASSES:]
        p = np.exp(logits - logits.max(1, keepdims=True))
        residual = (p / p.sum(1, keepdims=True) - one_hot[m]) / EXAMPLES
        return np.concatenate([(x[m].T @ residual).ravel(), residual.sum(0)])

    alpha, beta, before = 1.0, float(np.float32(LOCAL_RATE)), np.zeros_like(w)
    low, high = beta / 10, beta * 10
    alphas, betas = [], []
    for _ in range(ROUNDS):
        updates = []
        for m in range(CLIENTS):
            v, rate, last = w, beta, None
            for _ in range(STEPS):
                g = gradient(v, m)
                if "CL" in schedulers and last is not None:
                    rate = min(max(rate + HYPER_RATE * (g @ last + g @ before / STEPS), low), high)
                v, last = v - rate * g, g
            updates.append(w - v)
        delta = np.mean(updates, 0)
        if "G" in schedulers:
            alpha = min(max(alpha + HYPER_RATE * (delta @ before), 1 / 3), 3.0)
        alphas.append(alpha)
        betas.append(beta)
        w = w - alpha * delta
        if "SL" in schedulers:
            beta = min(max(beta + HYPER_RATE * (delta @ before), low), high)
        before = delta
    return w, alphas, betas


def rounds_check(method: str, strategy: str) -> Results:
    """A method's rounds under a strategy against `rounds_in_numpy`."""
    x, y, weights, bias = problem()
    rows = np.arange(CLIENTS * EXAMPLES).reshape(CLIENTS, EXAMPLES)
    clients = data.pack({"x": x.reshape(-1, FEATURES), "y": y.ravel()}, list(rows))

    def loss_fn(params, batch):
        logits = batch["x"] @ params["weights"] + params["bias"]
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    own = {} if method == "fedavg" else {"hyper_rate": HYPER_RATE}
    work = data.local_steps(STEPS, batch_size=EXAMPLES)
    algorithm = fh.make_method(method, loss_fn, work=work, local_rate=LOCAL_RATE, strategy=strategy, **own)
    clients, state = (place(strategy, tree) for tree in (clients, algorithm.init({"weights": weights, "bias": bias})))
    play = jax.jit(functools.partial(fh.simulate, algorithm, rounds=ROUNDS, cohort_size=CLIENTS))
    state, history = jax.device_get(play(jax.random.key(0), state, clients))
    w, alphas, betas = rounds_in_numpy(method.split("+"))
    ours = np.concatenate([state.params["weights"].ravel(), state.params["bias"]])
    pairs = (ours, w), (history.info.global_rate, alphas), (history.info.local_rate, betas)
    return verdict(max(relative_difference(a, b) for a, b in pairs), 1e-5)


def verdict(difference: float, tolerance: float) -> Results:
    """NaN does not pass."""
    return {"difference": float(difference), "tolerance": tolerance, "passed": bool(difference <= tolerance)}


def relative_difference(a, b) -> float:
    """Largest difference over the largest number of b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def convolution_in_numpy(x, kernel, g, strides):
    """y, and the gradients of Σ y·g towards x and the kernel; SAME padding, tap by tap in float64."""
    pads, sizes = [], []
    for n, k, s in zip(x.shape[1:3], kernel.shape[:2], strides, strict=True):
        sizes.append(-(-n // s))
        total = max((sizes[-1] - 1) * s + k - n, 0)
        pads.append((total // 2, total - total // 2))
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    y, dpadded, dkernel = 0.0, np.zeros_like(padded), np.zeros_like(kernel)
    for a, b in itertools.product(*map(range, kernel.shape[:2])):
        rows, columns = (slice(t, t + (m - 1) * s + 1, s) for t, m, s in zip((a, b), sizes, strides, strict=True))
        seen = padded[:, rows, columns]
        y = y + seen @ kernel[a, b]
        dpadded[:, rows, columns] += g @ kernel[a, b].T
        dkernel[a, b] = np.einsum("nijc,nijo->co", seen, g)
    (top, _), (left, _) = pads
    return y, dpadded[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def convolution_check(forms: Forms) -> Results:
    """Convolutions of 4 channels and of 1, three clients with kernels of their own, against `convolution_in_numpy`."""
    rng, strides, worst = np.random.default_rng(0), (2, 1), 0.0
    with the_table(forms):
        for channels in (4, 1):
            x = rng.normal(size=(3, 4, 7, 6, channels)).astype(np.float32)
            kernel = rng.normal(size=(3, 3, 3, channels, 8)).astype(np.float32)
            g = rng.normal(size=(3, 4, 4, 6, 8)).astype(np.float32)

            def client(x, kernel, g):
                y, pull_back = jax.vjp(lambda *operands: models.convolution(*operands, strides=strides), x, kernel)
                return y, *pull_back(g)

            ours = jax.device_get(jax.jit(jax.vmap(client))(x, kernel, g))
            for m in range(3):
                theirs = convolution_in_numpy(*(array[m].astype(np.float64) for array in (x, kernel, g)), strides)
                worst = max(worst, *(relative_difference(a[m], b) for a, b in zip(ours, theirs, strict=True)))
    return verdict(worst, 5e-5)  # fast algorithms (Winograd's) round more; TF32 would be off by 1e-3


def random_numbers_check() -> Results:
    """Known vectors of Threefry-2x32, and the unrolled keys of the package against JAX's own; equal bit for bit."""
    known = {0: [0x6B200159, 0x99BA4EFE], 0xFFFFFFFF: [0x1CB996FC, 0xBB002BE7]}  # Random123's kat_vectors, 20 rounds

    @jax.jit
    def draws(key):
        folded = jax.random.fold_in(key, 7)
        keys = [jax.random.key_data(k) for k in (folded, jax.random.split(key, 5))]
        numbers = jax.random.bits(key, (1001,)), jax.random.normal(folded, (64,)), jax.random.permutation(key, 100)
        return *keys, *numbers

    wrong = 0
    for word, expected in known.items():  # key and counter are this word throughout
        got = _threefry._threefry(jnp.array([word, word], jnp.uint32), jnp.uint32(word), jnp.uint32(word))
        wrong += [int(part) for part in got] != expected
    for seed in (0, 2**31 - 1):
        key = jax.random.key(seed)
        pairs = zip(*map(jax.device_get, (draws(key), draws(_random.unrolled(key)))), strict=True)
        wrong += sum(int(np.sum(a != b)) for a, b in pairs)
    return verdict(wrong, 0)


def sums_check(dtype: str) -> Results:
    """Inner products of narrow numbers are summed in float32, sums over clients rounded once."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(1, 0.3, size=(200, 500)), dtype) for _ in range(2))
    product, total = jax.jit(lambda a, b: (_tree.inner_product({"w": a}, {"w": b}), jnp.sum(a, axis=0)))(a, b)
    wide = [np.asarray(array, np.float64) for array in (a, b)]
    of_product = relative_difference(product, np.sum(wide[0] * wide[1]))
    of_total = relative_difference(np.asarray(total, np.float64), wide[0].sum(0))
    return verdict(max(of_product / 1e-5, of_total / float(jnp.finfo(dtype).eps)), 1.0)


def at_highest(check: Callable[..., Results], *arguments) -> Callable[[], Results]:
    def do():
        with jax.default_matmul_precision("highest"):
            return check(*arguments)

    return do


def number_items() -> list[Item]:
    forms = {
        "as on CPU": FORMS["cpu"],
        "all at once": ASSUMED,
        "derived by JAX": ASSUMED._replace(gradients="derived", im2col_channels=0),
    }
    several = [("G+CL", strategy) for strategy in ("sequential", "chunked(2)", "sharded(vectorized)")]
    rounds = [*((method, "vectorized") for method in ("fedavg", "G", "SL", "CL")), *several]
    return [
        *(Item("numbers", f"rounds of {m}, {s}", at_highest(rounds_check, m, s)) for m, s in rounds),
        Item("numbers", "random numbers", random_numbers_check),
        *(Item("numbers", f"convolution, {n}", at_highest(convolution_check, f)) for n, f in forms.items()),
        *(
            Item("numbers", f"sums in {dtype}", functools.partial(sums_check, dtype))
            for dtype in ("bfloat16", "float16")
        ),
    ]


# ----------------------------------------------------------------------------------------------------- bench


def make_images(folder: pathlib.Path, examples: int = 60_000) -> None:
    """Files like those of Fashion-MNIST, of noise around an image for each class, for `load` and for the peers."""
    rng = np.random.default_rng(0)
    means = rng.integers(40, 160, (10, 28, 28))
    for split, number in (("train", examples), ("t10k", 10)):
        labels = np.arange(number) % 10
        noise = rng.integers(-40, 40, (100, 28, 28))
        images = (means[labels] + noise[rng.integers(0, 100, number)]).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            with gzip.open(folder / f"{split}-{name}-ubyte.gz", "wb", compresslevel=0) as file:
                file.write(head + array.tobytes())


def all_jobs(small: bool) -> dict[str, Job]:
    """Those of `fedhyper bench`, each made once; small: fewer and smaller clients, one round."""
    builds = {name: job.build for name, job in JOBS.items()}
    if small:
        builds |= {
            "mlp": functools.partial(jobs._mlp, clients=100),
            "logistic-1M": functools.partial(jobs.logistic_1m, 1000),
            "resnet18": functools.partial(jobs._resnet18, clients=4, width=2),
            "char_lstm": functools.partial(jobs._char_lstm, clients=4, hidden=8),
        }
    made = {name: job._replace(build=functools.cache(builds[name])) for name, job in JOBS.items()}
    return {name: job._replace(cohort_size=2, rounds=1) for name, job in made.items()} if small else made


def measure_strategy(job: Job, strategy: str, repeats: int) -> Results:
    """FedAvg on a job under a strategy: client-steps/s, compile time, memory."""
    workload: Workload = job.build()
    strategy = divided(strategy, jax.device_count())
    program = compile_rounds(job, workload, place(strategy, workload.data), "fedavg", strategy, job.rounds)
    program.advance()
    speeds, losses = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        info = program.advance()
        speeds.append(int(np.sum(info.local_steps)) / (time.perf_counter() - start))
        losses.append(float(info.client_loss[-1]))
    return {
        "job": job.name,
        "strategy": parse_strategy(strategy).name,
        "cohort_size": job.cohort_size,
        "client_steps_per_second": spread(speeds),
        "compile_seconds": round(program.compile_seconds, 2),
        "program_mib": program.memory_mib,
        "device_peak_mib": device_peak_mib(),
        "client_loss": {"first": program.first_loss, "last": losses[-1]},
    }


def device_peak_mib() -> float | None:
    """Most memory of the device that this process has held so far; None where the device does not tell."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else peak / 2**20


def fastest_strategies(results: Results) -> dict[str, Results]:
    """By job, the fastest of what was measured."""
    best: dict[str, Results] = {}
    for row in results.get("strategies", []):
        speed = row["client_steps_per_second"]["median"]
        if row["job"] not in best or speed > best[row["job"]]["client_steps_per_second"]["median"]:
            best[row["job"]] = row
    return best


def measure_schedulers(job: Job, results: Results, repeats: int) -> Results:
    """`fedhyper bench` of a job under its fastest strategy."""
    best = fastest_strategies(results).get(job.name)
    strategy = best["strategy"] if best else divided("vectorized", jax.device_count())
    return measure(job, ["fedavg", "G", "SL", "CL"], strategy=strategy, repeats=repeats)


# --------------------------------------------------------------------------------------------------- PyTorch


def measure_torch(python: str, job: str, rounds: int, seconds_left: Callable[[], float]) -> Results:
    """The plain loop of experiments/peers in a process of its own, on the same device; one thread on the CPU."""
    device = {"gpu": "cuda", "cpu": "cpu"}.get(jax.default_backend())
    if device is None:
        return {"skipped": f"the loop knows no {jax.default_backend()}"}
    command = [python, PEERS / "torch_loop.py", job, rounds, 1, "--device", device]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=max(seconds_left() - 2, 1), check=False
    )
    if "No module named 'torch'" in done.stderr:
        return {"skipped": f"PyTorch is not installed for {python}"}
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    found = json.loads(done.stdout.splitlines()[-1])
    speeds = [found["client_steps_per_round"] / seconds for seconds in found["seconds"]]
    losses = {"first": found["loss_before"], "last": found["loss_after"]}
    return {
        "job": job,
        "device": device,
        "torch": found["versions"]["torch"],
        "client_steps_per_second": spread(speeds),
        "loss": losses,
    }


# ----------------------------------------------------------------------------------------------------- forms


@contextlib.contextmanager
def the_table(forms: Forms):
    """The layers take these forms on every platform; programs that were traced before are forgotten."""
    kept = dict(FORMS)
    FORMS.update(dict.fromkeys(FORMS, forms))
    jax.clear_caches()
    try:
        yield
    finally:
        FORMS.update(kept)
        jax.clear_caches()


def forms_of(kind: str, preset: Preset) -> dict[str, Forms]:
    """What is timed for a kind of layer, by name."""
    if kind in ("norm", "rnn"):
        return {who: ASSUMED._replace(**{kind: who}) for who in ("own", "flax")}
    direct = {
        f"{clients}, {gradients}": ASSUMED._replace(clients=clients, gradients=gradients, im2col_channels=0)
        for clients, gradients in preset.ways
    }
    if kind == "conv":
        return direct
    return direct | {f"{c}, im2col": ASSUMED._replace(clients=c) for c in dict.fromkeys(c for c, _ in preset.ways)}


def training(layer: Layer, steps: int) -> tuple[Callable, Any, Any]:
    """A client's gradient steps on parameters and inputs in a scan; parameters and inputs to begin with."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=layer.inputs), jnp.float32)
    if layer.kind in ("conv", "image"):
        params = jnp.asarray(0.1 * rng.normal(size=layer.kernel), jnp.float32)
        apply = functools.partial(models.convolution, strides=layer.strides)
        call = lambda params, x: apply(x, params)  # noqa: E731
    else:
        features = layer.inputs[-1]
        module = models.GroupNorm(2) if layer.kind == "norm" else models.RNN(linen.OptimizedLSTMCell(features))
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), shapes)
        call = module.apply

    def loss(params, x):
        return 0.5 * jnp.mean(jnp.square(call(params, x)))

    def step(carry, _):
        if layer.kind == "image":  # data: nobody wants their gradient
            moved = jax.grad(loss)(*carry), jnp.zeros_like(carry[1])
        else:
            moved = jax.grad(loss, argnums=(0, 1))(*carry)
        return jax.tree.map(lambda leaf, by: leaf - 0.1 * by, carry, moved), None

    return lambda params, x: jax.lax.scan(step, (params, x), length=steps)[0], params, x


def measure_layer(layer: Layer, preset: Preset) -> Results:
    """Milliseconds a step of all clients for each form, and how far they disagree about where a scan ends."""
    milliseconds, moves, failed = {}, {}, {}
    for name, forms in forms_of(layer.kind, preset).items():
        try:
            with the_table(forms):
                milliseconds[name], moves[name] = time_form(layer, preset)
        except Exception as error:  # a library of the device may lack a form
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if not moves:
        raise RuntimeError(f"no form runs: {failed}")
    reference = moves[next(iter(moves))]
    # Products at the device's own precision: TF32 has 10 bits.
    worst = max(float(np.linalg.norm(move - reference) / np.linalg.norm(reference)) for move in moves.values())
    return {"kind": layer.kind, "milliseconds": milliseconds, "failed": failed, **verdict(worst, 2e-2)}


def time_form(layer: Layer, preset: Preset) -> tuple[float, np.ndarray]:
    """Milliseconds a step with the forms of the table, and by how much a scan moves parameters and inputs."""
    train, *start = training(layer, preset.steps)
    start = jax.tree.map(lambda leaf: jnp.stack([leaf * (1 + m / 8) for m in range(preset.clients)]), start)
    program = jax.jit(jax.vmap(train)).lower(*start).compile()
    end = program(*start)
    seconds = statistics.median(timed(lambda: program(*start)) for _ in range(preset.repeats))
    moves = jax.tree.map(lambda a, b: np.ravel(np.asarray(b) - np.asarray(a)), start, list(end))
    return 1000 * seconds / preset.steps, np.concatenate(jax.tree.leaves(moves))


def best_forms(layers: Sequence[Results], now: Forms, measured: str) -> Forms:
    """The forms that follow: least geometric mean of times over the layers; what was not measured stays."""

    def mean(kind: str, name: str) -> float:
        times = [layer["milliseconds"][name] for layer in layers if layer["kind"] == kind]
        return math.exp(statistics.fmean(map(math.log, times)))

    def fastest(kind: str) -> str | None:
        ran = [set(layer["milliseconds"]) for layer in layers if layer["kind"] == kind]
        return min(sorted(set.intersection(*ran)), key=functools.partial(mean, kind), default=None) if ran else None

    if (way := fastest("conv")) is not None:
        clients, gradients = way.split(", ")
        now = now._replace(clients=clients, gradients=gradients)
    with contextlib.suppress(KeyError, statistics.StatisticsError):  # one of the two did not run, or no such layer did
        im2col, direct = (mean("image", f"{now.clients}, {form}") for form in ("im2col", now.gradients))
        now = now._replace(im2col_channels=3 if im2col < direct else 0)
    own = {kind: who for kind in ("norm", "rnn") if (who := fastest(kind)) is not None}
    return now._replace(**own, measured=measured)


# --------------------------------------------------------------------------------------------------- results


def list_items(preset: Preset, given, results: Results, seconds_left: Callable[[], float]) -> list[Item]:
    """Everything, in the order in which it is worth the time."""
    known = all_jobs(given.small)
    size = preset.products if jax.default_backend() != "cpu" else min(preset.products, 1024)

    def strategy(job, name):
        return Item(
            "strategies", f"{job}, {name}", functools.partial(measure_strategy, known[job], name, preset.repeats)
        )

    def scheduler(job):
        return Item("schedulers", job, lambda: measure_schedulers(known[job], results, preset.repeats))

    def torch(job, rounds):
        patience = 15 * preset.minutes  # seconds, a quarter of the whole
        time_for_it = lambda: min(seconds_left(), patience)  # noqa: E731
        return Item("torch", job, lambda: measure_torch(given.torch_python, job, rounds, time_for_it))

    every = [strategy(job, name) for job, names in preset.strategies.items() for name in names]
    first = [strategy(job, preset.strategies[job][0]) for job in ("mlp", "cnn")]
    names = {item.name for item in first}
    return [
        Item("products", f"{size} × {size}", lambda: products(size)),
        *number_items(),
        *first,
        *(torch(job, rounds) for job, rounds in preset.torch.items()),
        *(Item("forms", n, functools.partial(measure_layer, layer, preset)) for n, layer in preset.layers.items()),
        *(item for item in every if item.name not in names and not item.name.endswith("sequential")),
        *(item for item in every if item.name not in names and item.name.endswith("sequential")),
        *map(scheduler, preset.schedulers),
    ]


def forms_line(results: Results) -> str | None:
    """The line for fedhyper_jax/models/forms.py."""
    if not results.get("forms"):
        return None
    platform_name = {"cuda": "gpu", "rocm": "gpu"}.get(results["device"]["platform"], results["device"]["platform"])
    now = FORMS.get(platform_name, ASSUMED)
    forms = best_forms(results["forms"], now, f"experiments/results/{results['file']}.md")
    fields = ", ".join(f"{name}={json.dumps(value)}" for name, value in forms._asdict().items())
    return f'"{platform_name}": Forms({fields}),'


def markdown(results: Results) -> str:
    """The results as a page."""
    device, number = results["device"], lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    around = lambda s: f"{number(s['median'])} ({number(s['min'])}–{number(s['max'])})"  # noqa: E731
    mib = lambda value: "–" if value is None else number(value)  # noqa: E731
    lines = [f"# On {device['devices']} × {device['kind']}", "", f"`{results['command']}`", ""]
    if results["preset"] == "small":
        lines += ["A rehearsal on small jobs: the speeds mean nothing.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in device.items())]
    for row in results.get("products", []):
        for precision in ("default", "highest"):
            speed, error = row[precision]["gigaflops"], row[precision]["relative_error"]
            lines.append(f"| products of {row['size']} at {precision} | {number(speed)} GFLOP/s, error {error:.1e} |")
    wrong = failures(results)
    lines += ["", "## Numbers", "", 'At matmul precision "highest", against NumPy in float64.', ""]
    lines += ["| check | difference | tolerance | |", "|---|---|---|---|"]
    for row in results.get("numbers", []):
        outcome = "pass" if row["passed"] else "**fail**"
        lines.append(f"| {row['name']} | {row['difference']:.1e} | {row['tolerance']:g} | {outcome} |")
    lines += ["", "## Every job and strategy", "", "FedAvg; medians, smallest and largest in brackets.", ""]
    lines += ["| job | strategy | client-steps/s | compile, s | program, MiB | device's peak so far, MiB |"]
    lines += ["|---|---|---|---|---|---|"]
    best = fastest_strategies(results)
    for row in results.get("strategies", []):
        name = f"**{row['strategy']}**" if row is best[row["job"]] else row["strategy"]
        speed, memory = around(row["client_steps_per_second"]), mib(row["program_mib"])
        lines.append(
            f"| {row['job']} | {name} | {speed} | {row['compile_seconds']:.1f} | {memory} "
            f"| {mib(row['device_peak_mib'])} |"
        )
    lines += ["", "## The PyTorch loop on the same device", ""]
    for row in results.get("torch", []):
        if "skipped" in row:
            lines.append(f"- {row['name']}: {row['skipped']}")
            continue
        line = f"- {row['job']}: PyTorch {row['torch']} on {row['device']}, {around(row['client_steps_per_second'])}"
        if row["job"] in best and results["preset"] != "small":
            ours = best[row["job"]]["client_steps_per_second"]["median"]
            line += f" client-steps/s; ours is {ours / row['client_steps_per_second']['median']:.3g} times as fast"
        lines.append(line)
    lines += ["", "Both at their own default precision of products.", "", "## Forms of the layers", ""]
    for row in results.get("forms", []):
        times = sorted(row["milliseconds"].items(), key=lambda pair: pair[1])
        agree = "agree" if row["passed"] else f"**disagree by {row['difference']:.1e}**"
        said = [*(f"{name} {time:.3g} ms" for name, time in times), *(f"{name} failed" for name in row["failed"])]
        lines.append(f"- {row['name']} ({agree}): {'; '.join(said)}")
    if line := results.get("forms_line"):
        use = "For" if results["preset"] == "full" else "A rehearsal, so not for"
        lines += ["", f"{use} `fedhyper_jax/models/forms.py`:", "", "```python", line, "```"]
    lines += ["", "## What a scheduler costs over FedAvg", ""]
    for row in results.get("schedulers", []):
        costs = (
            f"{method['method']} {100 * method['cost_over_fedavg']['wall']['median']:+.1f} %"
            for method in row["methods"][1:]
        )
        lines.append(f"- {row['job']} ({row['strategy']['used']}): {', '.join(costs)}")
    lines += ["", "## Not measured", ""]
    lines += [f"- {title}: {reason}" for title, reason in results["not_measured"].items()] or ["Nothing was left out."]
    lines += [
        "",
        f"{results['seconds']:.0f} s. " + (f"Wrong: {', '.join(wrong)}." if wrong else "No number was wrong."),
    ]
    return "\n".join(lines) + "\n"


def failures(results: Results) -> list[str]:
    """Names of the checks that did not pass."""
    return [row["name"] for part in ("numbers", "forms") for row in results.get(part, []) if not row["passed"]]


def measure_all(given) -> int:
    if given.small:  # its speeds mean nothing, so what is compiled quickly will do
        os.environ.setdefault("XLA_FLAGS", as_flags(*QUICK))
    preset = SMALL if given.small else FULL
    limit = 60 * (preset.minutes if given.minutes is None else given.minutes)
    given.out.mkdir(parents=True, exist_ok=True)

    def seconds_left() -> float:
        return limit - (time.monotonic() - START)

    def end():
        print(f"on_accelerator: {limit / 60:g} minutes are over; what is known is in {given.out}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1 if failures(results) else 0)

    results: Results = {"preset": "small" if given.small else "full", "file": f"accelerator-{device_kind()}"}
    folder = tempfile.mkdtemp()
    watch = threading.Timer(max(seconds_left(), 0), end)
    watch.daemon = True
    watch.start()
    results |= {"command": " ".join(["python experiments/on_accelerator.py", *sys.argv[1:]]), "device": device_facts()}

    def write(results: Results) -> None:
        results |= {"seconds": round(time.monotonic() - START, 1), "forms_line": forms_line(results)}
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        for kind, content in (("json", text), ("md", markdown(results))):
            with written_whole(given.out / f"{results['file']}.{kind}") as file:
                file.write(content)

    try:
        make_images(pathlib.Path(folder))
        os.environ["FASHION_MNIST"] = folder
        work_through(list_items(preset, given, results, seconds_left), results, write, seconds_left)
    finally:
        shutil.rmtree(folder)
    watch.cancel()
    print(markdown(results))
    return 1 if failures(results) else 0


def join(page: pathlib.Path) -> None:
    """Writes the section of the speed page anew from the results that are there."""
    import speed

    text = page.read_text(encoding="utf-8")
    section = "\n".join(speed.accelerators_section())
    found = re.search(rf"^{speed.ACCELERATORS}\n.*?(?=^## )", text, flags=re.S | re.M)
    if found is None:
        sys.exit(f"on_accelerator: {page} has no section {speed.ACCELERATORS!r}; run: python experiments/speed.py page")
    with written_whole(page) as file:
        file.write(text[: found.start()] + section + "\n" + text[found.end() :])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small jobs, for a rehearsal")
    parser.add_argument("--minutes", type=float, help=f"to end after; {FULL.minutes:g}, or {SMALL.minutes:g} if small")
    parser.add_argument("--out", type=pathlib.Path, help="folder of the results; experiments/results, or runs if small")
    parser.add_argument("--torch-python", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--join", action="store_true", help="only write the section of the speed page")
    given = parser.parse_args()
    if given.minutes is not None and not given.minutes > 0:
        parser.error(f"--minutes must be greater than 0, got {given.minutes:g}")
    if given.join:
        join(RESULTS / "speed.md")
        return 0
    given.out = given.out or (pathlib.Path("runs") if given.small else RESULTS)
    return measure_all(given)


if __name__ == "__main__":
    sys.exit(main())
