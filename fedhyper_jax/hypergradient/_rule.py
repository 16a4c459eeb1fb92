r"""The one pure rule behind every scheduler: product → normalisation → update → clip.

The loss after a step ``w' = w − r u`` has the derivative ``dF(w')/dr = −⟨∇F(w'), u⟩`` in the rate ``r``, the
*hypergradient*. Descending it with the hyper rate κ gives

.. math:: r \leftarrow \mathrm{clip}(r + \kappa \, h, \text{lower}, \text{upper}),

where ``h`` is the inner product of the present gradient with what the last step moved along. The transforms of this
package and the rates of the simulated server and clients all call `adapt` and differ in the product they feed it.

The raw product scales with the square of the loss. `normalised` divides it by two lengths, so that ``h`` is a pure
number, and ``update="exponential"`` moves the logarithm of the rate by it,

.. math:: r \leftarrow \mathrm{clip}\bigl(r \exp(\mathrm{clip}(\kappa h, \pm c)), \text{lower}, \text{upper}\bigr),

so that neither the unit of the loss nor that of the rate matters. Either kind of update goes with any normalisation.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import PyTree, Range, Scalar

NORMALISATIONS = ("cosine", "squared_norm", "debiased")
UPDATES = ("additive", "exponential")
MAX_CHANGE = 0.2
"""The most that the logarithm of a rate moves at one exponential update, if nothing else is said."""


class AdaptiveRate(NamedTuple):
    """A learning rate and what moves it; scalars of one dtype, float32 or float64.

    Attributes:
      rate: r.
      hyper_rate: κ.
      lower: bound that r never falls below.
      upper: bound that r never exceeds.
      max_change: c ≥ |κ h|; None: no bound.
    """

    rate: Float[Array, ""]
    hyper_rate: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    max_change: Float[Array, ""] | None = None


class Adaptation(NamedTuple):
    """Observations of `adapt`.

    Attributes:
      clipped: the value before clipping lay outside the bounds.
      non_finite: the product, or κ times it, was not finite, and the rate stayed as it was.
    """

    clipped: Bool[Array, ""]
    non_finite: Bool[Array, ""]


def adaptive_rate(
    initial_rate: Scalar, hyper_rate: Scalar, bounds: Range, dtype: DTypeLike, *, max_change: Scalar | None = None
) -> AdaptiveRate:
    """The arguments as arrays of ``dtype``, unchecked."""
    values = (initial_rate, hyper_rate, *bounds, max_change)
    return AdaptiveRate(*(None if value is None else jnp.asarray(value, dtype) for value in values))


def of_state(state: Any) -> AdaptiveRate:
    """The rate in a transform's state, in the dtype that init chose: `optax.tree.set` may have set plain numbers."""
    bounds, dtype = (state.lower, state.upper), _tree.accumulator_dtype(state.previous_gradient)
    return adaptive_rate(state.rate, state.hyper_rate, bounds, dtype, max_change=state.max_change)


def check_adaptive_rate(initial_rate: Scalar, hyper_rate: Scalar, bounds: Range, **names: str) -> None:
    """Raises ValueError unless rate > 0, κ ≥ 0 and 0 ≤ lower ≤ rate ≤ upper; ``names`` as in `_validate.bounds`."""
    _validate.positive(**{names.get("rate_name", "initial_rate"): initial_rate})
    _validate.non_negative(hyper_rate=hyper_rate)
    _validate.bounds(bounds, initial_rate=initial_rate, **names)


class Pipeline(NamedTuple):
    """What is done to a product on its way to the rate; names, which are no data, and a number."""

    normalise: str | None  # one of NORMALISATIONS; None: the raw product
    update: str  # one of UPDATES
    max_change: Any  # c ≥ |κ h|; None: no bound


def pipeline(normalise: str | None, update: str, max_change: Scalar, *, not_debiased: str | None = None) -> Pipeline:
    """The pipeline of these arguments; without ``max_change`` an exponential update is bounded by `MAX_CHANGE`.

    Raises:
      ValueError: unknown names, a bound ≤ 0; "debiased" where ``not_debiased`` says why it has no meaning.
    """
    if normalise == "debiased" and not_debiased:
        raise ValueError(
            f"normalise='debiased' needs ‖Δ_m‖² of every client, {not_debiased}; use 'squared_norm' or 'cosine' there"
        )
    if normalise is not None:
        _validate.one_of(NORMALISATIONS, normalise=normalise)
    _validate.one_of(UPDATES, update=update)
    if max_change is not None:
        _validate.positive(max_change=max_change)
    elif update == "exponential":
        max_change = MAX_CHANGE
    return Pipeline(normalise, update, max_change)


def normalised(
    product: Float[Array, ""], normalise: str | None, *, present: PyTree, previous: PyTree, reference: PyTree
) -> Float[Array, ""]:
    """A product ⟨present, reference⟩ over two lengths, or as it is; 0 where one of the lengths is.

    The reference is what the last step moved along, most often the previous gradient itself. It counts with the length
    of the previous gradient, so that the scale of a preconditioner does not matter either:

      * "cosine": over ‖present‖ ‖reference‖;
      * "squared_norm": over ‖previous‖ ‖reference‖, which is ‖previous‖² where the reference is the previous gradient.
    """
    if normalise is None:
        return product
    length = present if normalise == "cosine" else previous
    return ratio(product, _tree.norm(length) * _tree.norm(reference))


def ratio(product: Float[Array, ""], scale: Float[Array, ""]) -> Float[Array, ""]:
    """``product / scale``; 0 where the scale vanishes, and with it the product. What is not finite stays so."""
    return jnp.where(scale == 0, 0 * product, product / jnp.where(scale == 0, 1, scale))


def adapt(
    state: AdaptiveRate, product: Float[Array, ""], *, update: str = "additive"
) -> tuple[AdaptiveRate, Adaptation]:
    """One hypergradient step of the rate. A product that is not finite moves nothing and is reported.

    κ = 0 keeps the rate bit for bit, even one outside the bounds (a schedule's, broadcast to a client).

    Args:
      state: the rate and what moves it.
      product: h, raw or `normalised`.
      update: "additive", r + κ h, or "exponential", r exp(κ h); either way κ h is kept inside ±``state.max_change``.
    """
    change = state.hyper_rate * product.astype(state.rate.dtype)
    if state.max_change is not None:
        change = jnp.clip(change, min=-state.max_change, max=state.max_change)
    proposed = state.rate + change if update == "additive" else state.rate * jnp.exp(change)
    finite = jnp.isfinite(product) & (jnp.isfinite(proposed) | (state.hyper_rate == 0))
    moves = finite & (state.hyper_rate > 0)
    clipped = jnp.clip(proposed, min=state.lower, max=state.upper)
    new_state = state._replace(rate=jnp.where(moves, clipped, state.rate))
    return new_state, Adaptation(clipped=moves & (clipped != proposed), non_finite=~finite)
