"""Federated algorithms: factories of (init, round) pairs."""

from fedhyper_jax.algorithms.fedavg import decay_global, decay_local, exponential_decay, fedavg
from fedhyper_jax.algorithms.fedhyper import fedhyper

__all__ = ["decay_global", "decay_local", "exponential_decay", "fedavg", "fedhyper"]
