"""The algorithms by name; all are `fedavg` with other parts."""

from fedhyper_jax.methods.adaptive_local import delta_sgd, fathom, fedsls, fedsps
from fedhyper_jax.methods.drift import fedcm, feddyn, fednova, fedprox, mime_lite, scaffold
from fedhyper_jax.methods.fedavg import decay_global, decay_local, exponential_decay, fedavg
from fedhyper_jax.methods.fedhyper import fedhyper
from fedhyper_jax.methods.fedopt import (
    fedadagrad,
    fedadam,
    fedavgm,
    fedexp,
    fedyogi,
    plateau_global,
    plateau_local,
    server_dog,
    server_mechanic,
)
from fedhyper_jax.methods.reference import fedhyper_reference

__all__ = [
    "decay_global",
    "decay_local",
    "delta_sgd",
    "exponential_decay",
    "fathom",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedcm",
    "feddyn",
    "fedexp",
    "fedhyper",
    "fedhyper_reference",
    "fednova",
    "fedprox",
    "fedsls",
    "fedsps",
    "fedyogi",
    "mime_lite",
    "plateau_global",
    "plateau_local",
    "scaffold",
    "server_dog",
    "server_mechanic",
]
