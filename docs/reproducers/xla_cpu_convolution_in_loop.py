"""XLA:CPU runs the gradients of a convolution many times slower inside a loop than outside of one.

Needs nothing but JAX: python xla_cpu_convolution_in_loop.py
"""

import re
import time

import jax
import jax.numpy as jnp
from jax import lax

LENGTH = 4
x = jnp.ones((32, 14, 14, 32))
w = jnp.ones((5, 5, 32, 32))


def loss(x, w):
    """Of one plain NHWC convolution."""
    y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jnp.sum(jnp.square(y))


def update(carry):
    """One step down both gradients."""
    dx, dw = jax.grad(loss, argnums=(0, 1))(*carry)
    return carry[0] - 1e-9 * dx, carry[1] - 1e-9 * dw


def in_entry(carry):
    """The same steps, without a loop."""
    for _ in range(LENGTH):
        carry = update(carry)
    return carry


def in_scan(carry):
    """The same steps in the body of a loop."""
    return lax.scan(lambda carry, _: (update(carry), None), carry, length=LENGTH)[0]


def labels(compiled):
    """The forms in which convolutions are left after optimisation, and how often."""
    found = re.findall(r"convolution\(.*?dim_labels=(\S+?)[,\s]", compiled.as_text())
    return {label: found.count(label) for label in sorted(set(found))}


print(f"jax {jax.__version__}, jaxlib {jax.lib.__version__}, {jax.devices()[0].platform}")
for function in (in_entry, in_scan):
    compiled = jax.jit(function).lower((x, w)).compile()
    jax.block_until_ready(compiled((x, w)))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(compiled((x, w)))
        seconds.append(time.perf_counter() - start)
    print(f"{function.__name__:8s} {1e3 * min(seconds) / LENGTH:8.1f} ms a step, convolutions: {labels(compiled)}")
