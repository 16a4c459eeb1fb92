"""Failure models: clients that do not start, do not finish, or whose update does not arrive."""

from typing import Any

import jax
import jax.numpy as jnp

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Params, Scalar
from fedhyper_jax.parts.contract import FailureModel


def none() -> FailureModel:
    """Every client delivers.

    Example:
      >>> none().before is None and none().after is None
      True
    """
    return FailureModel(name="none")


def dropout(before: Scalar = 0.0, after: Scalar = 0.0) -> FailureModel:
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


def stragglers(share: Scalar) -> FailureModel:
    r"""A share of the clients is too slow, and takes only some of its steps before the round ends.

    .. math:: K_m' \sim \mathcal{U}\{1, \dots, K_m\} \text{ with probability } \rho, \text{ else } K_m

    Its update counts as any other; FedNova and FedProx were made for clients that differ so.

    Args:
      share: ρ in [0, 1), the probability of being slow in a round; may be traced.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = stragglers(0.9)
      >>> keys = jax.random.split(jax.random.key(0), 8)
      >>> steps_of = jax.jit(jax.vmap(lambda key: model.before(key, model.init(jnp.zeros(3)), jnp.int32(10))))
      >>> steps_of(keys).tolist()
      [9, 3, 3, 10, 10, 5, 2, 5]

    Reference:
      Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, `Federated Optimization in Heterogeneous Networks
      <https://arxiv.org/abs/1812.06127>`_, MLSys 2020, section 5.2.
    """
    _validate.probability(share=share)

    def before(key, share, num_steps):
        chance, number = jax.random.split(key)
        some = jax.random.randint(number, (), 1, jnp.maximum(num_steps, 1) + 1, dtype=jnp.int32)
        slow = jax.random.bernoulli(chance, share) & (num_steps > 0)
        return jnp.where(slow, some, num_steps)

    return FailureModel(
        name="stragglers", init=lambda params: jnp.asarray(share, _tree.accumulator_dtype(params)), before=before
    )


def joined(*models: FailureModel) -> FailureModel:
    """Several failure models, each with chances of its own; the first of them as if it were alone.

    A client takes the steps that the first leaves it, of these those that the second leaves, and so on; its update
    arrives if all let it.

    Example:
      >>> joined(dropout(before=0.1), stragglers(0.5)).name
      'dropout, stragglers'
    """
    if len(models) == 1:
        return models[0]

    def each(key, settings):
        # (from 2 on: `dropout` takes 0 and 1 of the key that the first model gets)
        keys = [key, *(jax.random.fold_in(key, 1 + index) for index in range(1, len(models)))]
        return zip(keys, models, settings, strict=True)

    def before(key, settings, num_steps):
        for own_key, model, own in each(key, settings):
            if model.before is not None:
                num_steps = model.before(own_key, own, num_steps)
        return num_steps

    def after(key, settings, update):
        arrives: Any = True
        for own_key, model, own in each(key, settings):
            if model.after is not None:
                update, arrived = model.after(own_key, own, update)
                arrives = arrives & arrived
        return update, arrives

    return FailureModel(
        name=", ".join(model.name for model in models) or "none",
        init=lambda params: tuple(model.init(params) for model in models),
        before=before if any(model.before for model in models) else None,
        after=after if any(model.after for model in models) else None,
    )
