"""Neural networks behind `Model(init, apply)`, and layers that stay fast inside loops and under ``vmap``.

The only floor that imports flax.
"""

from fedhyper_jax.models.adapters import from_linen, from_nnx
from fedhyper_jax.models.layers import convolution
from fedhyper_jax.models.networks import MODELS, cnn, logistic, make_model, mlp
from fedhyper_jax.models.pooling import avg_pool, max_pool
from fedhyper_jax.models.precision import compute_in

__all__ = [
    "MODELS",
    "avg_pool",
    "cnn",
    "compute_in",
    "convolution",
    "from_linen",
    "from_nnx",
    "logistic",
    "make_model",
    "max_pool",
    "mlp",
]
