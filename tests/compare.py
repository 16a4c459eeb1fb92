"""How trees of arrays are compared."""

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCE = 1e-5
"""Of the norm of what is compared: another order of summation in float32."""
ACTS = 10 * TOLERANCE
"""How much an option must change, lest it could be ignored within the tolerance."""


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Leaf by leaf, relative to the leaf's norm (or to 0.1, where cancellation leaves less)."""

    def check(path, a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        error = np.linalg.norm(np.subtract(a, b, out=np.zeros_like(a), where=~same))
        allowed = tolerance * max(np.linalg.norm(b[np.isfinite(b)]), 0.1)
        assert error <= allowed, f"{jax.tree_util.keystr(path)} is off by {error:.2g}, allowed are {allowed:.2g}"

    jax.tree_util.tree_map_with_path(check, actual, expected)


def assert_identical(actual, expected):
    """Bit for bit."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), actual, expected)


def types_of(tree):
    """Structure, shapes, dtypes and weak types."""
    return jax.eval_shape(lambda tree: tree, tree)


def differs(a, b) -> bool:
    """Whether two trees differ by more than what a tolerance might hide."""
    distance, size = (np.sqrt(sum(np.sum(np.square(x)) for x in t)) for t in (differences(a, b), jax.tree.leaves(b)))
    return bool(distance > ACTS * size)


def differences(a, b) -> list[np.ndarray]:
    """Leaf by leaf."""
    return [np.subtract(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]


def cast(tree, dtype):
    """All floating-point leaves in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def same_program(text: str, other: str) -> bool:
    """Whether two lowered modules are the same but for their names: no number was baked into either."""
    return text.split("\n")[1:] == other.split("\n")[1:]
