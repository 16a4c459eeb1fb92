"""Neural networks behind `Model(init, apply)`, and layers that stay fast inside loops and under ``vmap``.

The only floor that imports flax.
"""

from fedhyper_jax import _validate

_validate.installed("fedhyper_jax.models", "flax")

from fedhyper_jax.models.adapters import from_linen, from_nnx
from fedhyper_jax.models.layers import convolution
from fedhyper_jax.models.modules import RNN, Conv, Embed, GroupNorm, LayerNorm
from fedhyper_jax.models.networks import MODELS, char_lstm, cnn, logistic, make_model, mlp, resnet18
from fedhyper_jax.models.pooling import avg_pool, max_pool
from fedhyper_jax.models.precision import compute_in

__all__ = [
    "MODELS",
    "RNN",
    "Conv",
    "Embed",
    "GroupNorm",
    "LayerNorm",
    "avg_pool",
    "char_lstm",
    "cnn",
    "compute_in",
    "convolution",
    "from_linen",
    "from_nnx",
    "logistic",
    "make_model",
    "max_pool",
    "mlp",
    "resnet18",
]
