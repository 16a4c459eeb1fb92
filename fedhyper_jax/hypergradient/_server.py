"""FedHyper-G and -SL as optax transforms: hypergradient descent of a rate from consecutive gradients."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fedhyper_jax import _tree
from fedhyper_jax.base import PyTree
from fedhyper_jax.hypergradient import _arguments, _rule


class HypergradientState(NamedTuple):
    """State of `scale_by_hypergradient`."""

    rate: Float[Array, ""]  # shape=(), float32, or float64 for float64 parameters
    hyper_rate: Float[Array, ""]  # shape=(), same dtype
    lower: Float[Array, ""]  # shape=(), same dtype
    upper: Float[Array, ""]  # shape=(), same dtype
    previous_gradient: PyTree  # like the parameters; zeros before the first update
    clipped_count: Int[Array, ""]  # shape=(), int32: updates of the rate whose value before clipping lay outside
    non_finite_count: Int[Array, ""]  # shape=(), int32: products that were not finite, and moved nothing


class TrackedHypergradientState(NamedTuple):
    """State of `track_hypergradient`; the fields of `HypergradientState`, told apart by type."""

    rate: Float[Array, ""]
    hyper_rate: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    previous_gradient: PyTree
    clipped_count: Int[Array, ""]
    non_finite_count: Int[Array, ""]


def scale_by_hypergradient(
    initial_rate, hyper_rate=1.0, bounds=(0.0, math.inf)
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by a rate that descends its own hypergradient (FedHyper-G).

    .. math::
      r_t = \mathrm{clip}(r_{t-1} + \kappa \langle g_t, g_{t-1} \rangle, \text{lower}, \text{upper}),
      \qquad u_t \leftarrow r_t \, u_t, \qquad g_{-1} = 0.

    The rate moves first and is then used. ``g`` is the updates that arrive, or the extra argument ``gradient`` where
    a preconditioner stands before this transform. The sign of the updates is untouched: a chain of gradient-like
    directions ends in ``optax.scale(-1.0)``.

    Args:
      initial_rate: r_0 > 0, the rate of the first update.
      hyper_rate: κ ≥ 0; 0 keeps the rate. The raw product scales with the square of the gradients, so κ = 1 (the
        paper's) suits pseudo-gradients of norm below 1; start near r_0 / ‖g‖² elsewhere.
      bounds: (lower, upper) of the rate, 0 ≤ lower ≤ initial_rate ≤ upper.

    All three may be traced scalars; they become arrays in the state, so other values cause no recompilation. From
    ``init`` on the state's values count and not the factory's: ``optax.inject_hyperparams``, which calls the factory
    anew at each update, has no effect here, neither by a schedule nor by ``state.hyperparams``. A hyper rate that
    changes is set in the state, however deep in chains: ``state = optax.tree.set(state, hyper_rate=schedule(step))``.

    Returns:
      A transform whose ``update`` accepts the keyword-only ``gradient`` (a tree like the updates that the outermost
      transform gets) and ignores other extra arguments. Inside ``optax.masked`` and ``optax.partition`` the product is
      taken over the leaves of the group; inside ``optax.MultiSteps`` leave ``gradient`` out, or hand over the mean that
      the step is made of. Its state is a `HypergradientState`.

    Raises:
      ValueError: a rate ≤ 0 or not finite, κ < 0 or not finite, bounds that do not enclose the rate; of ``update``: a
        gradient that is no tree like the updates.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from fedhyper_jax.hypergradient import global_rate
      >>> optimizer = optax.chain(scale_by_hypergradient(0.01, hyper_rate=1e-3), optax.scale(-1.0))
      >>> w = jnp.array([3.0, -2.0])
      >>> state = optimizer.init(w)
      >>> for _ in range(50):
      ...     updates, state = optimizer.update(2 * w, state)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(jnp.linalg.norm(w) < 0.1), bool(global_rate(state) > 0.01)
      (True, True)
      >>> state = optax.tree.set(state, hyper_rate=0.0)  # from here on the rate stays

    Reference:
      Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024, eq. 15-16; without a federation:
      Baydin et al., `Online Learning Rate Adaptation with Hypergradient Descent
      <https://arxiv.org/abs/1703.04782>`_, 2018.
    """
    return _hypergradient_transform(HypergradientState, True, initial_rate, hyper_rate, bounds)


def track_hypergradient(initial_rate, hyper_rate=1.0, bounds=(0.0, math.inf)) -> optax.GradientTransformationExtraArgs:
    r"""Adapts a rate as `scale_by_hypergradient` does and returns the updates unchanged (FedHyper-SL).

    .. math:: \beta^{t+1} = \mathrm{clip}(\beta^t + \kappa \langle g_t, g_{t-1} \rangle, \text{lower}, \text{upper})

    On a server, ``state.rate`` after the update is the local rate to broadcast for the next round.

    Args, Returns, Raises: as `scale_by_hypergradient`; the state is a `TrackedHypergradientState`.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedhyper_jax.hypergradient import local_rate
      >>> tracker = track_hypergradient(0.5, bounds=(0.05, 5.0))
      >>> state = tracker.init(jnp.zeros(2))
      >>> for g in (jnp.array([1.0, 0.0]), jnp.array([0.25, 1.0])):
      ...     updates, state = tracker.update(g, state)
      >>> updates.tolist(), float(local_rate(state))  # 0.5 + <(1, 0), (0.25, 1)>
      ([0.25, 1.0], 0.75)

    Reference:
      Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024, eq. 17-18.
    """
    return _hypergradient_transform(TrackedHypergradientState, False, initial_rate, hyper_rate, bounds)


def _hypergradient_transform(state_type, scales: bool, initial_rate, hyper_rate, bounds):
    _rule.check_adaptive_rate(initial_rate, hyper_rate, bounds)

    def init_fn(params):
        rate = _rule.adaptive_rate(initial_rate, hyper_rate, bounds, _tree.accumulator_dtype(params))
        return state_type(
            **rate._asdict(),
            previous_gradient=optax.tree.zeros_like(params),
            clipped_count=jnp.zeros((), jnp.int32),
            non_finite_count=jnp.zeros((), jnp.int32),
        )

    def update_fn(updates, state, params=None, *, gradient=None, **extra_args):
        del params, extra_args
        updates = jax.tree.map(jnp.asarray, updates)
        gradient = updates if gradient is None else _arguments.like_updates(gradient, updates, name="gradient")
        rate = _rule.of_state(state)
        rate, observed = _rule.adapt(rate, _tree.inner_product(gradient, state.previous_gradient))
        new_state = state_type(
            **rate._asdict(),
            previous_gradient=jax.tree.map(lambda g, old: g.astype(old.dtype), gradient, state.previous_gradient),
            clipped_count=state.clipped_count + observed.clipped,
            non_finite_count=state.non_finite_count + observed.non_finite,
        )
        return _tree.scale(updates, rate.rate) if scales else updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
