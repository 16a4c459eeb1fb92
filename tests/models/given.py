"""Parameters without an initialisation, which takes longer to compile than what most tests ask about."""

import jax
import numpy as np


def some_params(init, inputs, seed=0):
    """Normal numbers of the shapes that ``init`` gives."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(init, jax.random.key(0), inputs)
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / 3).astype(leaf.dtype), shapes)
