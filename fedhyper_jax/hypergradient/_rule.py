r"""The one pure rule behind every scheduler: product → update → clip.

The loss after a step ``w' = w − r u`` has the derivative ``dF(w')/dr = −⟨∇F(w'), u⟩`` in the rate ``r``, the
*hypergradient*. Descending it with the hyper rate κ gives

.. math:: r \leftarrow \mathrm{clip}(r + \kappa \, h, \text{lower}, \text{upper}),

where ``h`` is the inner product of the present gradient with what the last step moved along. The transforms of this
package and the rates of the simulated server and clients all call `adapt` and differ in the product they feed it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fedhyper_jax import _tree, _validate


class AdaptiveRate(NamedTuple):
    """A learning rate and what moves it; scalars of one dtype, float32 or float64."""

    rate: Float[Array, ""]  # r
    hyper_rate: Float[Array, ""]  # κ
    lower: Float[Array, ""]
    upper: Float[Array, ""]


class Adaptation(NamedTuple):
    """Observations of `adapt`."""

    clipped: Bool[Array, ""]  # the value before clipping lay outside the bounds
    non_finite: Bool[Array, ""]  # the product, or κ times it, was not finite, and the rate stayed as it was


def adaptive_rate(initial_rate, hyper_rate, bounds, dtype) -> AdaptiveRate:
    """The arguments as arrays of ``dtype``, unchecked."""
    lower, upper = bounds
    return AdaptiveRate(*(jnp.asarray(value, dtype) for value in (initial_rate, hyper_rate, lower, upper)))


def of_state(state) -> AdaptiveRate:
    """The rate in a transform's state, in the dtype that init chose: `optax.tree.set` may have set plain numbers."""
    bounds = (state.lower, state.upper)
    return adaptive_rate(state.rate, state.hyper_rate, bounds, _tree.accumulator_dtype(state.previous_gradient))


def check_adaptive_rate(initial_rate, hyper_rate, bounds, **names: str) -> None:
    """Raises ValueError unless rate > 0, κ ≥ 0 and 0 ≤ lower ≤ rate ≤ upper; ``names`` as in `_validate.bounds`."""
    _validate.positive(**{names.get("rate_name", "initial_rate"): initial_rate})
    _validate.non_negative(hyper_rate=hyper_rate)
    _validate.bounds(bounds, initial_rate=initial_rate, **names)


def adapt(state: AdaptiveRate, product: Float[Array, ""]) -> tuple[AdaptiveRate, Adaptation]:
    """One hypergradient step of the rate. A product that is not finite moves nothing and is reported.

    κ = 0 keeps the rate bit for bit, even one outside the bounds (a schedule's, broadcast to a client).
    """
    proposed = state.rate + state.hyper_rate * product.astype(state.rate.dtype)
    finite = jnp.isfinite(product) & (jnp.isfinite(proposed) | (state.hyper_rate == 0))
    moves = finite & (state.hyper_rate > 0)
    clipped = jnp.clip(proposed, min=state.lower, max=state.upper)
    new_state = AdaptiveRate(
        rate=jnp.where(moves, clipped, state.rate),
        hyper_rate=state.hyper_rate,
        lower=state.lower,
        upper=state.upper,
    )
    return new_state, Adaptation(clipped=moves & (clipped != proposed), non_finite=~finite)
