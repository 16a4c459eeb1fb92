"""FedHyper-G and -SL as optax transforms: hypergradient descent of a rate from consecutive gradients."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fedhyper_jax import _tree
from fedhyper_jax.base import PyTree, Range, Scalar
from fedhyper_jax.hypergradient import _arguments, _rule


class HypergradientState(NamedTuple):
    """State of `scale_by_hypergradient`.

    Attributes:
      rate: r, shape=(), float32, or float64 for float64 parameters.
      hyper_rate: κ, shape=(), same dtype.
      lower: bound that the rate never falls below, shape=(), same dtype.
      upper: bound that the rate never exceeds, shape=(), same dtype.
      previous_gradient: like the parameters; zeros before the first update.
      clipped_count: shape=(), int32: updates of the rate whose value before clipping lay outside.
      non_finite_count: shape=(), int32: products that were not finite, and moved nothing.
      max_change: shape=(), dtype of the rate; None: no bound of κ h.
    """

    rate: Float[Array, ""]
    hyper_rate: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    previous_gradient: PyTree
    clipped_count: Int[Array, ""]
    non_finite_count: Int[Array, ""]
    max_change: Float[Array, ""] | None = None


class TrackedHypergradientState(NamedTuple):
    """State of `track_hypergradient`; the fields of `HypergradientState`, told apart by type.

    Attributes:
      rate: r.
      hyper_rate: κ.
      lower: bound that the rate never falls below.
      upper: bound that the rate never exceeds.
      previous_gradient: like the parameters; zeros before the first update.
      clipped_count: updates of the rate whose value before clipping lay outside.
      non_finite_count: products that were not finite, and moved nothing.
      max_change: c ≥ |κ h|; None: no bound.
    """

    rate: Float[Array, ""]
    hyper_rate: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    previous_gradient: PyTree
    clipped_count: Int[Array, ""]
    non_finite_count: Int[Array, ""]
    max_change: Float[Array, ""] | None = None


def scale_by_hypergradient(
    initial_rate: Scalar,
    hyper_rate: Scalar = 1.0,
    bounds: Range = (0.0, math.inf),
    *,
    normalise: str | None = None,
    update: str = "additive",
    max_change: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by a rate that descends its own hypergradient (FedHyper-G).

    .. math::
      r_t = \mathrm{clip}(r_{t-1} + \kappa \langle g_t, g_{t-1} \rangle, \text{lower}, \text{upper}),
      \qquad u_t \leftarrow r_t \, u_t, \qquad g_{-1} = 0.

    The rate moves first and is then used. ``g`` is the updates that arrive, or the extra argument ``gradient`` where
    a preconditioner stands before this transform. The sign of the updates is untouched: a chain of gradient-like
    directions ends in ``optax.scale(-1.0)``.

    The raw product scales with the square of the loss. Normalised it is a pure number h_t, and an exponential update is
    relative to the rate, so that the rate's path is the same whatever the units of loss and rate:

    .. math::
      r_t = \mathrm{clip}\bigl(r_{t-1} \exp(\mathrm{clip}(\kappa h_t, \pm c)), \text{lower}, \text{upper}\bigr), \qquad
      h_t = \frac{\langle g_t, g_{t-1} \rangle}{\|g_{t-1}\|^2}
      \;\text{or}\; \frac{\langle g_t, g_{t-1} \rangle}{\|g_t\| \|g_{t-1}\|}, \quad h_t = 0 \text{ where a norm is}.

    Args:
      initial_rate: r_0 > 0, the rate of the first update.
      hyper_rate: κ ≥ 0; 0 keeps the rate. The raw product scales with the square of the gradients, so κ = 1 (the
        paper's) suits pseudo-gradients of norm below 1; start near r_0 / ‖g‖² elsewhere. Of a normalised product and an
        exponential update κ is what log r changes by where consecutive gradients agree, and 0.2 is a good start.
      bounds: (lower, upper) of the rate, 0 ≤ lower ≤ initial_rate ≤ upper.
      normalise: None for the raw product, "squared_norm" for that over ‖g_{t-1}‖², "cosine" for that over
        ‖g_t‖ ‖g_{t-1}‖. ("debiased" needs the gradients that g is the mean of: `rates.hypergradient` has it.)
      update: "additive", r + κ h, where κ has the unit of r over that of h, or "exponential", r exp(κ h), where it has
        none.
      max_change: c > 0, the most that |κ h| counts. None: 0.2 of exponential updates, no bound of additive ones.

    Numbers may be traced scalars; they become arrays in the state, so other values cause no recompilation. From
    ``init`` on the state's values count and not the factory's: ``optax.inject_hyperparams``, which calls the factory
    anew at each update, has no effect here, neither by a schedule nor by ``state.hyperparams``. A hyper rate that
    changes is set in the state, however deep in chains: ``state = optax.tree.set(state, hyper_rate=schedule(step))``.

    Returns:
      A transform whose ``update`` accepts the keyword-only ``gradient`` (a tree like the updates that the outermost
      transform gets) and ignores other extra arguments. Inside ``optax.masked`` and ``optax.partition`` the product is
      taken over the leaves of the group; inside ``optax.MultiSteps`` leave ``gradient`` out, or hand over the mean that
      the step is made of. Its state is a `HypergradientState`.

    Raises:
      ValueError: a rate ≤ 0 or not finite, κ < 0 or not finite, bounds that do not enclose the rate, unknown names,
        ``max_change`` ≤ 0; of ``update``: a gradient that is no tree like the updates.

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
      >>> scale_free = scale_by_hypergradient(1.0, hyper_rate=0.2, normalise="squared_norm", update="exponential")
      >>> state = scale_free.init(w)
      >>> for g in (jnp.array([300.0, 0.0]), jnp.array([150.0, 700.0])):
      ...     updates, state = scale_free.update(g, state)
      >>> round(float(global_rate(state)), 5)  # exp(0.2 · ½)
      1.10517

    Reference:
      Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024, eq. 15-16; without a federation:
      Baydin et al., `Online Learning Rate Adaptation with Hypergradient Descent
      <https://arxiv.org/abs/1703.04782>`_, 2018.
    """
    adaptive = (initial_rate, hyper_rate, bounds)
    return _hypergradient_transform(HypergradientState, True, adaptive, (normalise, update, max_change))


def track_hypergradient(
    initial_rate: Scalar,
    hyper_rate: Scalar = 1.0,
    bounds: Range = (0.0, math.inf),
    *,
    normalise: str | None = None,
    update: str = "additive",
    max_change: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
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
    adaptive = (initial_rate, hyper_rate, bounds)
    return _hypergradient_transform(TrackedHypergradientState, False, adaptive, (normalise, update, max_change))


def _hypergradient_transform(state_type, scales: bool, adaptive: tuple, ways: tuple):
    _rule.check_adaptive_rate(*adaptive)
    pipeline = _rule.pipeline(*ways, not_debiased="and a transform sees their mean only")

    def init_fn(params):
        dtype = _tree.accumulator_dtype(params)
        rate = _rule.adaptive_rate(*adaptive, dtype, max_change=pipeline.max_change)
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
        previous = state.previous_gradient
        product = _rule.normalised(
            _tree.inner_product(gradient, previous),
            pipeline.normalise,
            present=gradient,
            previous=previous,
            reference=previous,
        )
        rate, observed = _rule.adapt(_rule.of_state(state), product, update=pipeline.update)
        new_state = state_type(
            **rate._asdict(),
            previous_gradient=jax.tree.map(lambda g, old: g.astype(old.dtype), gradient, state.previous_gradient),
            clipped_count=state.clipped_count + observed.clipped,
            non_finite_count=state.non_finite_count + observed.non_finite,
        )
        return _tree.scale(updates, rate.rate) if scales else updates, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
