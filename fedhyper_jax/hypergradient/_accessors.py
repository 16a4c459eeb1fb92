"""Reading rates out of optax states, where two transforms with a field ``rate`` would confuse ``optax.tree.get``."""

from collections.abc import Hashable

import jax
import optax
from jaxtyping import Array, Bool, Float

from fedhyper_jax.hypergradient._client import LocalHypergradientState
from fedhyper_jax.hypergradient._retained import RetainedGainState
from fedhyper_jax.hypergradient._server import HypergradientState, TrackedHypergradientState


def global_rate(state: optax.OptState, label: Hashable = None) -> Float[Array, ""]:
    """The rate of the one `scale_by_hypergradient` or `scale_by_retained_gain` in an optax state, however deep.

    Args:
      state: the state of any optax transform around it.
      label: of several, the one below this label of ``optax.partition`` or name of ``optax.named_chain``.

    Raises:
      ValueError: none, or more than one; the message lists the labels.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from fedhyper_jax.hypergradient import scale_by_hypergradient
      >>> groups = {"slow": scale_by_hypergradient(0.1), "fast": scale_by_hypergradient(0.5)}
      >>> optimizer = optax.chain(optax.partition(groups, {"w": "slow", "b": "fast"}), optax.scale(-1.0))
      >>> state = optimizer.init({"w": jnp.zeros(3), "b": jnp.zeros(1)})
      >>> {label: round(float(global_rate(state, label)), 6) for label in groups}
      {'slow': 0.1, 'fast': 0.5}
    """
    types = (HypergradientState, RetainedGainState)
    return _find(state, label, types, transforms="scale_by_hypergradient or scale_by_retained_gain").rate


def window_starts(state: optax.OptState) -> Bool[Array, ""]:
    """Whether the next update begins a window of the one `scale_by_retained_gain` in an optax state.

    Raises: as `global_rate`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedhyper_jax.hypergradient import scale_by_retained_gain
      >>> bool(window_starts(scale_by_retained_gain().init(jnp.zeros(2))))
      True
    """
    return _find(state, None, RetainedGainState, transforms="scale_by_retained_gain").step == 0


def local_rate(state: optax.OptState, label: Hashable = None) -> Float[Array, ""]:
    """The rate of the one `track_hypergradient` or `scale_by_local_hypergradient` in an optax state.

    Args, Raises: as `global_rate`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedhyper_jax.hypergradient import track_hypergradient
      >>> float(local_rate(track_hypergradient(0.5).init(jnp.zeros(2))))
      0.5
    """
    types = (TrackedHypergradientState, LocalHypergradientState)
    return _find(state, label, types, transforms="track_hypergradient or scale_by_local_hypergradient").rate


def _find(state, label, types, *, transforms: str):
    nodes = jax.tree.leaves_with_path(state, is_leaf=lambda node: isinstance(node, types))
    found = [(_labels(path), node) for path, node in nodes if isinstance(node, types)]
    if not found:
        raise ValueError(f"expected a state of {transforms} in the optax state, found 0; chain it once")
    chosen = [node for labels, node in found if label is None or label in labels]
    if len(chosen) == 1:
        return chosen[0]
    known = ", ".join(dict.fromkeys(repr(each) for labels, _ in found for each in labels))
    if not chosen:
        raise ValueError(f"unknown label {label!r} of {transforms}; known: {known or 'none'}")
    if label is None and known:
        raise ValueError(f"expected one state of {transforms}, found {len(chosen)}; name one by its label: {known}")
    place = "" if label is None else f" at the label {label!r}"
    raise ValueError(
        f"expected one state of {transforms}{place}, found {len(chosen)}; "
        "hand over the part of the state that holds one, such as state[0]"
    )


def _labels(path) -> list[Hashable]:
    """The keys of mappings on a path: labels of ``optax.partition``, names of ``optax.named_chain``."""
    return [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
