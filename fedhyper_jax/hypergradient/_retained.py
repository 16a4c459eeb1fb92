"""The retained gain as an optax transform: a rate for one sequence of steps that nobody has to choose."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Params, PyTree, Scalar
from fedhyper_jax.hypergradient import _arguments, share
from fedhyper_jax.hypergradient.share import ShareSettings

_FIRST_MOVE = 1e-3  # of (1 + ‖w‖), where the loss has no curvature to tell a rate by


class RetainedGainState(NamedTuple):
    """State of `scale_by_retained_gain`; the first seven as of the rule's `SharedRate`.

    Attributes:
      rate: shape=(), float32, or float64 for float64 parameters.
      ceiling: shape=(), same dtype: of the rate, since a window was taken back.
      share: shape=(), same dtype: ρ of the last window.
      counts: shape=(): whether the last window did.
      found: shape=(): whether a share was above its target once.
      predicted: shape=(), dtype of the rate: average of P over the rate.
      descent: shape=(), same dtype: likewise of E.
      measured: shape=(): whether there is a rate.
      step: shape=(), int32: of the window; 0: the next update begins one.
      taken_back_count: shape=(), int32: windows that were.
      descent_so_far: shape=(), same dtype: Σ ⟨g_k, w_k − w_{k+1}⟩ of the window so far.
      first_value: shape=(), same dtype: f(w_0; ξ_0).
      first_params: w_0, like the parameters.
      first_gradient: ∇f(w_0; ξ_0), like the parameters.
      settings: arrays.
    """

    rate: Float[Array, ""]
    ceiling: Float[Array, ""]
    share: Float[Array, ""]
    counts: Bool[Array, ""]
    found: Bool[Array, ""]
    predicted: Float[Array, ""]
    descent: Float[Array, ""]
    measured: Bool[Array, ""]
    step: Int[Array, ""]
    taken_back_count: Int[Array, ""]
    descent_so_far: Float[Array, ""]
    first_value: Float[Array, ""]
    first_params: PyTree
    first_gradient: PyTree
    settings: ShareSettings


def scale_by_retained_gain(
    initial_rate: Scalar | None = None,
    *,
    window: int = 5,
    target_share: Scalar = 0.45,
    coherence_power: Scalar = 0.2,
    coherence_limit: Scalar = 5.0,
    hyper_rate: Scalar = 0.5,
    memory: Scalar = 0.9,
    growth: Scalar = 1.3,
    first_step: Scalar = 0.25,
    smallest_gain: Scalar = 0.05,
    tolerance: Scalar = 1.0,
    ceiling_growth: Scalar = 1.03,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by a rate that follows the share of the predicted gain which a window of steps retains.

    FedHyper's product, integrated along ``window`` steps from w to w' and taken on the first minibatch ξ_0 of them, is
    what is left of the gain on it:

    .. math::
      A = f(w; \xi_0) - f(w'; \xi_0), \quad P = \langle \nabla f(w; \xi_0), w - w' \rangle, \quad
      \log r \leftarrow \log r + \eta \, (A - \rho^* P) / \bar P, \quad u_k \leftarrow r \, u_k

    with the averages P̄ and ρ* as in `rates.retained_gain`. The first rate is measured: a quarter of the step along the
    first update to the minimum of the parabola there, which is meant to be too small. A window that loses more than is
    predicted, or comes to no finite parameters, is *taken back*: its last update leads to where it began, and the rate
    falls by half; until a window has shown that the rate is not far too large, one that keeps next to nothing is too,
    and the rate falls to a tenth. A constant added to the loss changes nothing, and the loss times s divides the rate
    by s.

    The rate is that of steps whose noise an average of the iterates takes out; evaluate such an average, or let the
    rate fall at the end. The sign of the updates is untouched, and they are gradient-like: end the chain in
    ``optax.scale(-1.0)``, and let nothing else stand behind, since this transform reckons with the step that it asks
    for. A preconditioner or a momentum may stand before it; hand over ``gradient`` then. What they remember is not
    taken back.

    Args:
      initial_rate: the first rate > 0; None measures one.
      window: steps ≥ 1 between the two looks at a minibatch.
      target_share, coherence_power, coherence_limit, hyper_rate, memory, growth, first_step, smallest_gain, tolerance,
        ceiling_growth: as of `rates.retained_gain`, a window for a round. One minibatch tells less than a cohort of
        clients: hence the smaller η, the longer memory, and the tolerance of windows that lose.

    Numbers may be traced scalars, and become arrays in the state.

    Returns:
      A transform whose ``update`` requires the parameters and the keyword-only ``value_fn``: the loss of *the window's
      first minibatch* as a function of the parameters. That minibatch is whatever the updates of a window's first step
      are of; ``window_starts(state)`` says when to hold on to another (see the example). As in optax's line searches,
      extra arguments that value_fn names are handed on to it. It is called twice a window, once more with its gradient
      at the very first update, and has to be a pure function. ``value`` may save the first of the two calls:
      value_fn(params) at the step that begins a window. The state is a `RetainedGainState`.

    Raises:
      ValueError: numbers out of range; of ``update``: no parameters, masked ones (put this transform around
        ``optax.partition``, not inside), a gradient that is no tree like the updates.
      TypeError: ``update`` without ``value_fn``.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax
      >>> from fedhyper_jax.hypergradient import global_rate, scale_by_retained_gain, window_starts
      >>> data = np.random.default_rng(0).normal(size=(400, 8)) * np.arange(1, 9) + 3.0
      >>> def loss_fn(w, batch): return jnp.mean((w - batch) ** 2)
      >>> optimizer = optax.chain(scale_by_retained_gain(window=10), optax.scale(-1.0))
      >>> @jax.jit
      ... def step(w, state, held, batch):
      ...     held = jnp.where(window_starts(state), batch, held)
      ...     grads = jax.grad(loss_fn)(w, batch)
      ...     updates, state = optimizer.update(grads, state, w, value_fn=loss_fn, batch=held)
      ...     return optax.apply_updates(w, updates), state, held
      >>> w, held = jnp.zeros(8), data[:20]
      >>> state = optimizer.init(w)
      >>> for k in range(300):
      ...     w, state, held = step(w, state, held, data[20 * (k % 20) :][:20])
      >>> bool(np.abs(w - data.mean(axis=0)).max() < 1.0), bool(0.05 < global_rate(state) < 5.0)
      (True, True)

    Reference:
      New here; docs/retained_gain.md derives it from FedHyper's equations.
    """
    if initial_rate is not None:
        _validate.positive(initial_rate=initial_rate)
    _validate.positive_integer(window=window)
    given = share.checked_settings(
        target_share=target_share,
        coherence_power=coherence_power,
        coherence_limit=coherence_limit,
        hyper_rate=hyper_rate,
        memory=memory,
        growth=growth,
        first_step=first_step,
        smallest_gain=smallest_gain,
        tolerance=tolerance,
        ceiling_growth=ceiling_growth,
    )

    def init_fn(params: Params) -> RetainedGainState:
        dtype = _tree.accumulator_dtype(params)
        zero = jnp.zeros((), dtype)
        return RetainedGainState(
            **share.shared_rate(0.0 if initial_rate is None else initial_rate, dtype)._asdict(),
            measured=jnp.asarray(initial_rate is not None),
            step=jnp.zeros((), jnp.int32),
            taken_back_count=jnp.zeros((), jnp.int32),
            descent_so_far=zero,
            first_value=zero,
            first_params=jax.tree.map(jnp.asarray, params),
            first_gradient=optax.tree.zeros_like(params),
            settings=share.as_arrays(given, dtype),
        )

    def update_fn(updates, state, params=None, *, value_fn, value=None, gradient=None, **extra_args):
        _check_params(params)
        dtype = state.descent.dtype
        loss = _loss_of_params(value_fn, extra_args)
        updates, params = jax.tree.map(jnp.asarray, updates), jax.tree.map(jnp.asarray, params)
        gradient = updates if gradient is None else _arguments.like_updates(gradient, updates, name="gradient")

        begins = state.step == 0
        first_params = _tree.select(begins, params, state.first_params)
        first_gradient = _tree.select(begins, gradient, state.first_gradient)
        value_here = (lambda: loss(params).astype(dtype)) if value is None else lambda: jnp.asarray(value, dtype)
        first_value = jax.lax.cond(begins, value_here, lambda: state.first_value)
        rate = jax.lax.cond(
            state.measured,
            lambda: jnp.asarray(state.rate, dtype),
            lambda: _measured_rate(loss, params, gradient, updates, state.settings),
        )
        before = share.of_state(state)._replace(rate=rate)

        scaled = _tree.scale(updates, rate)
        moved = _tree.subtract(params, scaled)
        descent = jnp.where(begins, 0, state.descent_so_far) + _tree.inner_product(gradient, scaled).astype(dtype)
        step = state.step + 1
        finite = _tree.is_finite(moved)
        ends = (step == window) | ~finite

        def judged() -> share.SharedRate:
            predicted = _tree.inner_product(first_gradient, _tree.subtract(first_params, moved)).astype(dtype)
            gain = share.seen_gain(first_value, loss(moved).astype(dtype), predicted)
            gains = share.Gains(gain, predicted, descent / step)
            return share.adapt_to_gains(before, gains, state.settings, ~finite)

        after = jax.lax.cond(ends, judged, lambda: before)
        taken_back = ends & ~after.counts
        new_state = state._replace(
            **after._asdict(),
            measured=jnp.ones_like(state.measured),
            step=jnp.where(ends, 0, step),
            taken_back_count=state.taken_back_count + taken_back,
            descent_so_far=descent,
            first_value=first_value,
            first_params=first_params,
            first_gradient=first_gradient,
        )
        return _tree.select(taken_back, _tree.subtract(params, first_params), scaled), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_params(params) -> None:
    if params is None:
        raise ValueError("scale_by_retained_gain compares losses at parameters: update(updates, state, params, …)")
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            "scale_by_retained_gain needs all parameters, since value_fn does, and got masked ones; put it around "
            "optax.masked or optax.partition, not inside"
        )


def _loss_of_params(value_fn: Callable[..., Array], extra_args: dict) -> Callable[[Params], Array]:
    """``value_fn`` with the extra arguments that it names, as optax's line searches hand them on."""
    if not callable(value_fn):
        raise ValueError(
            f"value_fn must be a function of the parameters, got {type(value_fn).__name__}; "
            "give value_fn=lambda params: loss_fn(params, held), held the window's first minibatch"
        )
    named = inspect.signature(value_fn).parameters
    wanted = {name: argument for name, argument in extra_args.items() if name in named}
    return lambda params: jnp.asarray(value_fn(params, **wanted))


def _measured_rate(loss, params, gradient, direction, settings: ShareSettings) -> Array:
    """A rate along the direction of the first update."""
    curvature = share.curvature_along(jax.grad(loss), params, gradient, direction)
    slope = _tree.inner_product(gradient, direction)
    careful = _FIRST_MOVE * (1 + _tree.norm(params)) / _tree.norm(direction)
    careful = jnp.where(jnp.isfinite(careful), careful, _FIRST_MOVE)
    return share.first_rate(slope, curvature, settings, careful).astype(settings.first_step.dtype)
