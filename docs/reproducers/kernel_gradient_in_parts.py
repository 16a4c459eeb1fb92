"""The gradient of a convolution towards its kernel, at once and in parts of the batch, in a loop on CPU.

It is a convolution whose kernel is the gradient of the outputs: height × width × batch × outputs numbers. XLA:CPU's
fast kernel passes over them once for every few rows of its patches, and waits for memory if they do not fit a core's
cache. In parts of few examples they do, and the parts add up to the same. Prints milliseconds, medians of seven, and
how much memory the gradient of a part's outputs takes.

Command:   taskset -c 0 python docs/reproducers/kernel_gradient_in_parts.py
"""

import statistics
import time

import jax
import jax.numpy as jnp

STEPS = 20
SHAPES = [(32, 14, 5, 16, 32), (32, 14, 5, 32, 64), (32, 14, 3, 32, 64), (8, 32, 3, 64, 64), (8, 8, 3, 128, 128)]


def kernel_gradient(x, g, taps):
    """dW[a,b,c,o] = Σ_{n,i,j} x[n,i+a−p,j+b−p,c] g[n,i,j,o] with p = ⌊taps / 2⌋, in the form of the fast kernel."""
    pads = ((taps // 2, taps // 2),) * 2
    dimensions = ("NHWC", "HWIO", "NHWC")
    x, g = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    return jax.lax.conv_general_dilated(x, g, (1, 1), pads, dimension_numbers=dimensions).transpose(1, 2, 0, 3)


def milliseconds(batch, size, taps, channels, outputs, examples):
    """One gradient in parts of so many examples, in a loop whose every turn depends on the last."""
    x = jax.random.normal(jax.random.key(0), (batch, size, size, channels))
    g = jax.random.normal(jax.random.key(1), (batch, size, size, outputs))

    @jax.jit
    def loop(x, g):
        def turn(tiny, _):
            parts = [a.reshape(-1, examples, *a.shape[1:]) for a in (x + tiny, g)]
            gradient = jax.lax.map(lambda part: kernel_gradient(*part, taps), parts).sum(0)
            return gradient.sum() * 1e-9, None

        return jax.lax.scan(turn, jnp.float32(0), length=STEPS)[0]

    loop(x, g).block_until_ready()
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        loop(x, g).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds) / STEPS


def main():
    """Prints a row for each shape."""
    print("| batch | images | kernel | at once | 16 | 8 | 4 | 2 | 1 |\n" + "|---" * 9 + "|")
    for batch, size, taps, channels, outputs in SHAPES:
        cells = [f"{batch}", f"{size}×{size}", f"{taps}×{taps}, {channels} to {outputs}"]
        for examples in (batch, 16, 8, 4, 2, 1):
            if examples >= batch and len(cells) > 3:
                cells.append("–")
                continue
            kib = size * size * outputs * examples * 4 // 1024
            cells.append(f"{milliseconds(batch, size, taps, channels, outputs, examples):.2f} ({kib:,} KiB)")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
