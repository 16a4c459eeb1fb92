"""Reading rates out of optax states, where two transforms with a field ``rate`` would confuse ``optax.tree.get``."""

import jax
import optax
from jaxtyping import Array, Float

from fedhyper_jax.hypergradient._client import LocalHypergradientState
from fedhyper_jax.hypergradient._server import HypergradientState, TrackedHypergradientState


def global_rate(state: optax.OptState) -> Float[Array, ""]:
    """The rate of the one `scale_by_hypergradient` in an optax state, however deep in chains.

    Raises:
      ValueError: none, or more than one.
    """
    return _find(state, HypergradientState, transforms="scale_by_hypergradient").rate


def local_rate(state: optax.OptState) -> Float[Array, ""]:
    """The rate of the one `track_hypergradient` or `scale_by_local_hypergradient` in an optax state.

    Raises:
      ValueError: none, or more than one.
    """
    types = (TrackedHypergradientState, LocalHypergradientState)
    return _find(state, types, transforms="track_hypergradient or scale_by_local_hypergradient").rate


def _find(state, types, *, transforms: str):
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, types))
    found = [node for node in nodes if isinstance(node, types)]
    if len(found) != 1:
        raise ValueError(
            f"expected one state of {transforms} in the optax state, found {len(found)}; chain it exactly once"
        )
    return found[0]
