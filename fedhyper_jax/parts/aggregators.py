"""Aggregators: how the updates of a cohort become one."""

import jax
import jax.numpy as jnp

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Scalar
from fedhyper_jax.parts.contract import Aggregator, Gathered


def mean() -> Aggregator:
    r"""The weighted mean Σ p_m Δ_m, as in FedAvg; only the sum ever exists, whatever the size of the cohort.

    Example:
      >>> mean().name
      'mean'
    """
    return Aggregator(name="mean")


def median() -> Aggregator:
    r"""The coordinate-wise median of the participants' updates; their weights do not count.

    .. math:: \Delta_i = \mathrm{median}_{m \in S} \, \Delta_{m,i}

    with the mean of the two in the middle for an even number of participants. It withstands up to half of them, at the
    price of a bias where clients differ: the median of unlike updates is not their mean. All S updates are in memory at
    once, (S, …) a leaf.

    Example:
      >>> median().stacks
      True

    Reference:
      Yin, Chen, Kannan, Bartlett, `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
      <https://arxiv.org/abs/1803.01498>`_, ICML 2018.
    """

    def combine(key, state, gathered: Gathered):
        del key
        return jax.tree.map(lambda updates: _median(updates, gathered.alive), gathered.updates), state

    return Aggregator(
        name="median",
        combine=combine,
        stacks=True,
        not_a_mean="the median of client updates is no mean of them",
    )


def _median(updates, alive):
    """Over the first axis, of the rows that are alive; 0 where none is."""
    number = jnp.sum(alive)
    ranked = jnp.sort(jnp.where(alive.reshape(-1, *[1] * (updates.ndim - 1)), updates, jnp.inf), axis=0)
    lower, upper = jnp.maximum(number - 1, 0) // 2, number // 2
    middle = (jnp.take(ranked, lower, axis=0) + jnp.take(ranked, upper, axis=0)) / 2
    return jnp.where(number > 0, middle, 0)


def clipped(inner: Aggregator, norm: Scalar) -> Aggregator:
    r"""Scales each client's update down to a norm of at most ``norm``, then aggregates as ``inner`` does.

    .. math:: \Delta_m \leftarrow \Delta_m \min\Bigl(1, \frac{C}{\|\Delta_m\|}\Bigr)

    Args:
      inner: an aggregator, e.g. ``mean()`` or ``median()``.
      norm: C > 0.

    Example:
      >>> clipped(median(), 1.0).name
      'clipped(median)'

    Reference:
      McMahan, Ramage, Talwar, Zhang, `Learning Differentially Private Recurrent Language Models
      <https://arxiv.org/abs/1710.06963>`_, ICLR 2018 (flat clipping).
    """
    _validate.positive(clip_norm=norm)

    def init(params):
        return {"norm": jnp.asarray(norm, _tree.accumulator_dtype(params)), "inner": inner.init(params)}

    def prepare(state, update):
        length = _tree.norm(update)
        factor = jnp.minimum(1, state["norm"] / jnp.where(length > 0, length, 1))
        return inner.prepare(state["inner"], _tree.scale(update, factor))

    def combine(key, state, gathered: Gathered):
        update, own = inner.combine(key, state["inner"], gathered)
        return update, {**state, "inner": own}

    reason = "the mean of clipped updates is no mean of the updates"
    return Aggregator(
        name=f"clipped({inner.name})",
        init=init,
        prepare=prepare,
        combine=combine,
        stacks=inner.stacks,
        not_a_mean=inner.not_a_mean or reason,
    )
