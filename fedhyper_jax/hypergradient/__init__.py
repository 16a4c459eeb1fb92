"""Hypergradient learning rates: two pure rules and four optax transforms on them. Needs jax and optax only."""

from fedhyper_jax.hypergradient import share
from fedhyper_jax.hypergradient._accessors import global_rate, local_rate, window_starts
from fedhyper_jax.hypergradient._client import (
    LocalHypergradientState,
    local_pipeline,
    local_transform,
    scale_by_local_hypergradient,
)
from fedhyper_jax.hypergradient._retained import RetainedGainState, scale_by_retained_gain
from fedhyper_jax.hypergradient._rule import (
    Adaptation,
    AdaptiveRate,
    adapt,
    adaptive_rate,
    check_adaptive_rate,
    normalised,
    pipeline,
    ratio,
)
from fedhyper_jax.hypergradient._server import (
    HypergradientState,
    TrackedHypergradientState,
    scale_by_hypergradient,
    track_hypergradient,
)

__all__ = [
    "Adaptation",
    "AdaptiveRate",
    "HypergradientState",
    "LocalHypergradientState",
    "RetainedGainState",
    "TrackedHypergradientState",
    "adapt",
    "adaptive_rate",
    "check_adaptive_rate",
    "global_rate",
    "local_pipeline",
    "local_rate",
    "local_transform",
    "normalised",
    "pipeline",
    "ratio",
    "scale_by_hypergradient",
    "scale_by_local_hypergradient",
    "scale_by_retained_gain",
    "share",
    "track_hypergradient",
    "window_starts",
]
