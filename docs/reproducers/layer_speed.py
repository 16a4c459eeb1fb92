"""Times the layers of fedhyper_jax.models against flax's own, in loops, on one core.

Each layer trains: a `lax.scan` of gradient steps on its parameters and its inputs, for one client and under `vmap` over
ten clients with parameters of their own. Both libraries' programs take turns; what counts is the least processor time
of `--repeats` runs, so that other programs on the machine disturb little.

    taskset -c 0 python docs/reproducers/layer_speed.py

takes a few minutes and prints a table in Markdown. Layers by name: `... layer_speed.py "max pool" LSTM`.
"""

import argparse
import functools
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen

from fedhyper_jax import models

STEPS = 2
CLIENTS = 10


def _lstm(library):
    return library.RNN(linen.OptimizedLSTMCell(256))


def _pool(name, window, strides):
    settings = {"window_shape": window, "strides": strides, "padding": "SAME"}
    return lambda library: functools.partial(getattr(library, name), **settings)


# How to make the layer of a library, and the shape of its inputs.
CASES = {
    "Conv 3×3, 32 to 32": (lambda library: library.Conv(32, (3, 3)), (8, 14, 14, 32)),
    "Conv 3×3, 3 to 32": (lambda library: library.Conv(32, (3, 3)), (8, 32, 32, 3)),
    "Conv 3×3, 32 to 64, stride 2": (lambda library: library.Conv(64, (3, 3), strides=2), (8, 14, 14, 32)),
    "Conv 3×3, 32 to 32, dilation 2": (lambda library: library.Conv(32, (3, 3), kernel_dilation=2), (8, 14, 14, 32)),
    "Conv 3×3, 32 to 32, 4 groups": (lambda library: library.Conv(32, (3, 3), feature_group_count=4), (8, 14, 14, 32)),
    "max pool 2×2, stride 2": (_pool("max_pool", (2, 2), (2, 2)), (8, 32, 32, 32)),
    "max pool 3×3, stride 2": (_pool("max_pool", (3, 3), (2, 2)), (8, 32, 32, 32)),
    "avg pool 2×2, stride 2": (_pool("avg_pool", (2, 2), (2, 2)), (8, 32, 32, 32)),
    "avg pool 3×3, stride 2": (_pool("avg_pool", (3, 3), (2, 2)), (8, 32, 32, 32)),
    "GroupNorm, 2 groups": (lambda library: library.GroupNorm(2), (16, 16, 16, 64)),
    "GroupNorm, 8 groups": (lambda library: library.GroupNorm(8), (32, 14, 14, 32)),
    "LSTM 8 to 256": (_lstm, (10, 80, 8)),
    "LSTM 256 to 256": (_lstm, (10, 80, 256)),
}


def training(layer, params, x):
    """STEPS gradient steps of one client on parameters and inputs."""

    def loss(params, x):
        y = layer.apply(params, x) if isinstance(layer, linen.Module) else layer(x)
        return 0.5 * jnp.sum(jnp.square(y))

    def step(carry, _):
        gradients = jax.grad(loss, argnums=(0, 1))(*carry)
        return jax.tree.map(lambda p, g: p - 1e-6 * g, carry, gradients), None

    return jax.lax.scan(step, (params, x), length=STEPS)[0]


def steps_per_second(name, clients, repeats):
    """Of flax's layer and of ours, in this order."""
    make, shape = CASES[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    layers = [make(library) for library in (linen, models)]
    params = layers[0].init(jax.random.key(0), x) if isinstance(layers[0], linen.Module) else {}
    arguments, transform = (params, x), lambda f: f
    if clients > 1:
        arguments = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), arguments)
        transform = jax.vmap
    programs = [jax.jit(transform(functools.partial(training, layer))).lower(*arguments).compile() for layer in layers]
    seconds = [[], []]
    for _ in range(repeats + 1):  # the first warms up
        for program, taken in zip(programs, seconds, strict=True):
            start = time.process_time()
            jax.block_until_ready(program(*arguments))
            taken.append(time.process_time() - start)
    return [STEPS * clients / min(taken[1:]) for taken in seconds]


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of layers' names; all if none")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"JAX {jax.__version__}, flax {flax.__version__}, {jax.devices()[0].platform}\n")
    print(f"| layer | inputs | flax | ours | ratio | flax, {CLIENTS} clients | ours, {CLIENTS} clients | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (_, shape) in CASES.items():
        if arguments.names and not name.startswith(tuple(arguments.names)):
            continue
        cells = []
        for clients in (1, CLIENTS):
            theirs, ours = steps_per_second(name, clients, arguments.repeats)
            cells += [f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.1f}"]
        print(f"| {name} | {'×'.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
