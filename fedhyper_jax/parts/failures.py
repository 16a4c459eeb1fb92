"""Failure models: clients that do not start, do not finish, or whose update does not arrive."""

import jax
import jax.numpy as jnp

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Params
from fedhyper_jax.parts.contract import FailureModel


def none() -> FailureModel:
    """Every client delivers.

    Example:
      >>> none().before is None and none().after is None
      True
    """
    return FailureModel(name="none")


def dropout(before=0.0, after=0.0) -> FailureModel:
    """Each client of a cohort drops out by chance, independently of others and of other rounds.

    A client that drops out before it starts does no work and gets nothing; one that drops out after its work has been
    sent the model, but its update is lost, and so is the new row of its state. Both are counted, apart from clients
    that are left out because they are not finite: ``RoundInfo.not_started`` and ``RoundInfo.lost``.

    Args:
      before: probability in [0, 1) of not starting.
      after: probability in [0, 1) that the update of a client that did start is lost.

    Returns:
      The failure model. Probabilities may be traced: they are data in the state.

    Example:
      >>> model = dropout(before=0.1, after=0.05)
      >>> import jax.numpy as jnp
      >>> [round(float(share), 2) for share in model.init(jnp.zeros(3))]
      [0.1, 0.05]
    """
    _validate.probability(before=before, after=after)

    def init(params: Params):
        dtype = _tree.accumulator_dtype(params)
        return jnp.asarray(before, dtype), jnp.asarray(after, dtype)

    def starts(key, settings, num_steps):
        fails = jax.random.bernoulli(jax.random.fold_in(key, 0), settings[0])
        return jnp.where(fails, 0, num_steps)

    def arrives(key, settings, update):
        return update, ~jax.random.bernoulli(jax.random.fold_in(key, 1), settings[1])

    # A door that is never used costs nothing, where it is known that it is not.
    return FailureModel(
        name="dropout",
        init=init,
        before=starts if _validate.is_traced(before) or before else None,
        after=arrives if _validate.is_traced(after) or after else None,
    )
