"""Participation: which clients are asked in a round."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from fedhyper_jax.data import sample_cohort
from fedhyper_jax.parts.contract import Participation


def uniform() -> Participation:
    """Each cohort is drawn uniformly without replacement, in time and memory of the cohort.

    Example:
      >>> uniform().name
      'uniform'
    """
    return _UNIFORM


def weighted(availability: ArrayLike) -> Participation:
    r"""Cohorts are drawn without replacement, one client after the other, with chances in proportion to availability.

    Client m is the first of a cohort with probability a_m / Σ a, and the next ones are drawn likewise from those that
    are left: the S smallest of independent exponential times of rates a_m. It takes time and memory of the population.

    The average over a cohort is not corrected for it: clients that are there more often count more, as in a deployment.

    Args:
      availability: (population,) numbers ≥ 0; 0 is never drawn.

    Returns:
      The participation, for ``simulate(…, participation=…)``.

    Raises:
      ValueError: not a 1-D array of finite numbers ≥ 0, or none > 0. A run refuses data of another population, and
        cohorts larger than the number of clients that can be drawn.

    Example:
      >>> import jax
      >>> participation = weighted([1.0, 0.0, 2.0])
      >>> sorted(participation.sample(jax.random.key(0), participation.init(3), 3, 2).tolist())
      [0, 2]

    Reference:
      Efraimidis, Spirakis, `Weighted Random Sampling with a Reservoir
      <https://doi.org/10.1016/j.ipl.2005.11.003>`_, 2006.
    """
    values = np.asarray(availability)
    if values.ndim != 1 or values.dtype.kind not in "fiu" or not len(values):
        raise ValueError(
            f"availability must be a 1-D array of numbers, one a client, got shape {values.shape} of {values.dtype}"
        )
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(wrong) or not (values > 0).any():
        at = int(wrong[0]) if len(wrong) else 0
        raise ValueError(
            f"availability must be finite and ≥ 0, and > 0 for some client, got {float(values[at])} for client {at}"
        )
    # Logarithms, scaled to at most 0: extremes of float64 stay apart in float32.
    with np.errstate(divide="ignore"):
        logarithms = np.log(values.astype(float)) - np.log(values.max())
    drawable = int((values > 0).sum())

    def check(population: int, cohort_size: int) -> None:
        if population != len(values):
            raise ValueError(
                f"availability has {len(values)} clients, but the data set has {population}; give one each"
            )
        if cohort_size > drawable:
            raise ValueError(
                f"cohort_size must be at most {drawable}, so many clients have availability > 0, got {cohort_size}"
            )

    def sample(key, settings, population: int, cohort_size: int):
        del population
        arrivals = settings + jax.random.gumbel(key, settings.shape, settings.dtype)
        return jax.lax.top_k(arrivals, cohort_size)[1].astype(jnp.int32)

    return Participation(
        name="weighted", init=lambda population: jnp.asarray(logarithms, jnp.float32), sample=sample, check=check
    )


def _sample_uniformly(key, settings, population: int, cohort_size: int):
    del settings
    return sample_cohort(key, population, cohort_size)


def _nothing_more(population: int, cohort_size: int) -> None:
    """Refuses nothing that `check_cohort_size` does not."""


_UNIFORM = Participation(name="uniform", init=lambda population: (), sample=_sample_uniformly, check=_nothing_more)
