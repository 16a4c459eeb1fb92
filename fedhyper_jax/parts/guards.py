"""Guards: whether a finished round counts, or is taken back."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Scalar
from fedhyper_jax.parts.contract import Guard, Proposal, Verdict, no_state


def _is_finite(proposal: Proposal):
    return _tree.is_finite((proposal.pseudo_gradient, proposal.params, proposal.terms))


def finite() -> Guard:
    """A round counts unless its step leaves the numbers of the dtype: that would end the run.

    Of such a round nobody is said to have taken part.

    Example:
      >>> finite().name
      'finite'
    """

    def judge(state, proposal: Proposal, client_loss):
        del client_loss
        is_finite = _is_finite(proposal)
        return Verdict(accepted=is_finite, finite=is_finite), state

    return Guard(name="finite", init=no_state, judge=judge)


class RollbackState(NamedTuple):
    """State of `rollback`.

    Attributes:
      factor: of the last loss, which the next one may not exceed.
      last_loss: of the last round that counted; infinite before the first.
      refusals: rounds taken back since.
    """

    factor: Float[Array, ""]
    last_loss: Float[Array, ""]
    refusals: Int[Array, ""]


def rollback(factor: Scalar = 2.0, *, patience: int = 5) -> Guard:
    r"""Takes a round back whose cohort loss is not finite or exceeds ``factor`` times that of the last that counted.

    The cohort loss is the mean training loss over the examples that the participants saw, each at the iterate that saw
    it; so it rises within the very round in which clients diverge. Everything but the number of the round stays as it
    was, the clients' rows included; rules of rates are told (`RateRule.refused`), which makes those of FedHyper-G and
    -SL halve their rate. Rounds that are taken back are counted in ``RoundInfo.taken_back``.

    Args:
      factor: > 1.
      patience: so many rounds in a row are taken back at most; the next one counts if it is finite, since another
        cohort may just have a larger loss.

    Returns:
      The guard; ``factor`` may be traced.

    Example:
      >>> import jax.numpy as jnp
      >>> float(rollback(1.5).init(jnp.zeros(2)).factor)
      1.5
    """
    _validate.positive(rollback_factor=factor)
    if not _validate.is_traced(factor) and factor <= 1:
        raise ValueError(f"rollback_factor must be > 1, got {factor!r}; 2 takes back rounds whose loss doubles")
    _validate.positive_integer(patience=patience)

    def init(params) -> RollbackState:
        dtype = _tree.accumulator_dtype(params)
        return RollbackState(jnp.asarray(factor, dtype), jnp.asarray(jnp.inf, dtype), jnp.zeros((), jnp.int32))

    def judge(state: RollbackState, proposal: Proposal, client_loss):
        is_finite = _is_finite(proposal)
        loss = client_loss.astype(state.last_loss.dtype)
        rises = ~(loss <= state.factor * state.last_loss) & (state.refusals < patience)
        accepted = is_finite & jnp.isfinite(loss) & ~rises
        new_state = RollbackState(
            factor=state.factor,
            last_loss=jnp.where(accepted, loss, state.last_loss),
            refusals=jnp.where(accepted, 0, state.refusals + 1),
        )
        return Verdict(accepted=accepted, finite=is_finite), new_state

    return Guard(name="rollback", init=init, judge=judge)
