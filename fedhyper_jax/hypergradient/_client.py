"""FedHyper-CL as an optax transform: a client's rate, adapted at every local step."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import PyTree, Range, Scalar
from fedhyper_jax.hypergradient import _arguments, _rule


class LocalHypergradientState(NamedTuple):
    """State of `scale_by_local_hypergradient`.

    Attributes:
      rate: shape=(), float32, or float64 for float64 parameters.
      hyper_rate: shape=(), same dtype.
      lower: shape=(), same dtype.
      upper: shape=(), same dtype.
      global_weight: shape=(), same dtype: weight of the global term, 1/K in the paper.
      previous_gradient: like the parameters; zeros before the first update.
      step_count: shape=(), int32: updates so far; zeros do not silence the global term at step 0.
      clipped_count: shape=(), int32: rate updates whose value before clipping lay outside.
      non_finite_count: shape=(), int32: products that were not finite, and moved nothing.
      max_change: shape=(), dtype of the rate; None: no bound of κ h.
      previous_norm: shape=(), dtype of the rate: ‖g_{k-1}‖; None of the raw product.
    """

    rate: Float[Array, ""]
    hyper_rate: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    global_weight: Float[Array, ""]
    previous_gradient: PyTree
    step_count: Int[Array, ""]
    clipped_count: Int[Array, ""]
    non_finite_count: Int[Array, ""]
    max_change: Float[Array, ""] | None = None
    previous_norm: Float[Array, ""] | None = None


def scale_by_local_hypergradient(
    initial_rate: Scalar,
    hyper_rate: Scalar = 1.0,
    bounds: Range = (0.0, math.inf),
    *,
    global_weight: Scalar,
    normalise: str | None = None,
    update: str = "additive",
    max_change: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies a client's updates by a rate adapted at each local step (FedHyper-CL).

    .. math::
      \beta_0 = \beta, \qquad
      \beta_k = \mathrm{clip}\bigl(\beta_{k-1} + \kappa (\langle g_k, g_{k-1} \rangle
      + \tfrac{1}{K} \langle g_k, \Delta^{t-1} \rangle),
      \text{lower}, \text{upper}\bigr), \qquad u_k \leftarrow \beta_k u_k.

    Δ^{t-1} is the raw pseudo-gradient of the previous round, *old minus new*, zeros in round 0; it points where
    gradients point, so agreement with it raises the rate.

    Normalised, both products are pure numbers of their own: Δ^{t-1} counts as a gradient as long as the last one,

    .. math::
      h_k = \frac{1}{\ell_k} \Bigl\langle g_k, \frac{g_{k-1}}{\|g_{k-1}\|}
      + \frac{1}{K} \frac{\Delta^{t-1}}{\|\Delta^{t-1}\|} \Bigr\rangle, \qquad
      \ell_k = \|g_k\| \;\text{("cosine")} \;\text{or}\; \|g_{k-1}\| \;\text{("squared_norm")},

    so "cosine" adds two cosines and "squared_norm" has ⟨g_k, g_{k-1}⟩/‖g_{k-1}‖² as its first term. A term with a norm
    of 0 in it is 0.

    Args:
      initial_rate: β > 0, the rate of local step 0 as broadcast by the server.
      hyper_rate: κ ≥ 0. With a normalised product and an exponential update a good start is 0.2, divided by the number
        of local steps where the rate goes on from round to round: it moves that often a round.
      bounds: (lower, upper) of the rate, 0 ≤ lower ≤ initial_rate ≤ upper.
      global_weight: weight ≥ 0 of the global term; 1/K in the paper, K the client's number of local steps.
      normalise: None for the raw products, "cosine" or "squared_norm".
      update, max_change: as of `scale_by_hypergradient`.

    Numbers may be traced scalars; they become arrays in the state, whose values count from ``init`` on: instead of
    ``optax.inject_hyperparams`` use ``optax.tree.set``, as `scale_by_hypergradient` says.

    Returns:
      A transform whose ``update`` requires the keyword-only ``global_update`` (Δ^{t-1}, a tree like the updates),
      accepts the keyword-only ``gradient`` (what the products are taken of, where a client optimizer stands before
      this transform) and ignores other extra arguments. Masked and partitioned as `scale_by_hypergradient`. Its state
      is a `LocalHypergradientState`.

    Raises:
      ValueError: as `scale_by_hypergradient`; also a global weight < 0 or not finite, a global update that is no tree
        like the updates.
      TypeError: ``update`` without ``global_update``.

    Example:
      >>> import jax.numpy as jnp
      >>> client = scale_by_local_hypergradient(0.1, bounds=(0.01, 1.0), global_weight=1 / 2)
      >>> state = client.init(jnp.zeros(1))
      >>> for g in (jnp.array([0.5]), jnp.array([0.4])):
      ...     updates, state = client.update(g, state, global_update=jnp.array([1.0]))
      >>> round(float(state.rate), 6)  # 0.1 + 0.4 * 0.5 + 1/2 * 0.4 * 1.0
      0.5

    Reference:
      Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024, eq. 19-20.
    """
    _rule.check_adaptive_rate(initial_rate, hyper_rate, bounds)
    _validate.non_negative(global_weight=global_weight)
    pipeline = local_pipeline(normalise, update, max_change)
    return local_transform(initial_rate, hyper_rate, bounds, global_weight, pipeline)


def local_pipeline(normalise: str | None, update: str, max_change: Scalar) -> _rule.Pipeline:
    """As `pipeline`; a client has no mean to debias."""
    return _rule.pipeline(normalise, update, max_change, not_debiased="and CL sees the gradients of one client")


def local_transform(
    initial_rate: Scalar, hyper_rate: Scalar, bounds: Range, global_weight: Scalar, pipeline: _rule.Pipeline
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_local_hypergradient` without its checks: in the simulator a schedule may broadcast any rate."""

    def init_fn(params):
        dtype = _tree.accumulator_dtype(params)
        rate = _rule.adaptive_rate(initial_rate, hyper_rate, bounds, dtype, max_change=pipeline.max_change)
        return LocalHypergradientState(
            **rate._asdict(),
            global_weight=jnp.asarray(global_weight, dtype),
            previous_gradient=optax.tree.zeros_like(params),
            step_count=jnp.zeros((), jnp.int32),
            clipped_count=jnp.zeros((), jnp.int32),
            non_finite_count=jnp.zeros((), jnp.int32),
            previous_norm=None if pipeline.normalise is None else jnp.zeros((), dtype),
        )

    def update_fn(updates, state, params=None, *, global_update, gradient=None, **extra_args):
        del params, extra_args
        updates = jax.tree.map(jnp.asarray, updates)
        gradient = updates if gradient is None else _arguments.like_updates(gradient, updates, name="gradient")
        global_update = _arguments.like_updates(global_update, updates, name="global_update")
        broadcast = _rule.of_state(state)
        global_weight = jnp.asarray(state.global_weight, broadcast.rate.dtype)
        product, norm = _product(pipeline.normalise, state, gradient, global_update, global_weight)
        # Step 0 takes the broadcast rate as it is, even outside the bounds.
        adapts = state.step_count > 0
        adapted, observed = _rule.adapt(broadcast, product, update=pipeline.update)
        rate = _tree.select(adapts, adapted, broadcast)
        new_state = LocalHypergradientState(
            **rate._asdict(),
            global_weight=global_weight,
            previous_gradient=jax.tree.map(lambda g, old: g.astype(old.dtype), gradient, state.previous_gradient),
            step_count=optax.safe_increment(state.step_count),
            clipped_count=state.clipped_count + (observed.clipped & adapts),
            non_finite_count=state.non_finite_count + (observed.non_finite & adapts),
            previous_norm=norm,
        )
        return _tree.scale(updates, rate.rate), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _product(normalise, state: LocalHypergradientState, gradient, global_update, global_weight):
    """h, and ‖g‖ where it is wanted.

    ⟨g, g'⟩ + ⟨g, Δ⟩ / K is one product: one pass over memory instead of two. ‖g'‖ is known from the last step.
    """
    if normalise is None:
        both = jax.tree.map(
            lambda old, update: old.astype(global_weight.dtype) + global_weight * update.astype(global_weight.dtype),
            state.previous_gradient,
            global_update,
        )
        return _tree.inner_product(gradient, both), None
    dtype = global_weight.dtype
    norm, previous_norm = _tree.norm(gradient).astype(dtype), jnp.asarray(state.previous_norm, dtype)
    own = _rule.ratio(jnp.ones((), dtype), previous_norm)
    other = _rule.ratio(global_weight, _tree.norm(global_update).astype(dtype))
    both = jax.tree.map(
        lambda old, update: own * old.astype(dtype) + other * update.astype(dtype),
        state.previous_gradient,
        global_update,
    )
    length = norm if normalise == "cosine" else previous_norm
    return _rule.ratio(_tree.inner_product(gradient, both), length), norm
