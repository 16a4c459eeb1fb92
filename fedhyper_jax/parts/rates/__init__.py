"""Rules that move a rate from round to round, as data.

One rule owns each rate of an algorithm, so two rules for one rate cannot be written down. A rule is a pair of pure
functions over arrays; whatever a user may want to vary (rates, hyper rates, bounds, whole schedules) is in its state.

  * `scheduled`: a constant, or an optax schedule of the round.
  * `hypergradient`: FedHyper-G (global rate) and -SL (local rate); with ``warm=True`` the local rate starts each round
    from the clients' final ones.
  * `extrapolation`: FedExP's global rate.
  * `smoothed_cosine`: FATHOM's rule.
  * `retained_gain`: a local rate that follows the share of the predicted gain that a round retains.
  * `reduce_on_plateau`: optax's, on the clients' training loss.
"""

from fedhyper_jax.parts.contract import Feedback, RateReport, RateRule
from fedhyper_jax.parts.rates import _adaptive, _retained, _scheduled
from fedhyper_jax.parts.rates._adaptive import *  # noqa: F403
from fedhyper_jax.parts.rates._retained import *  # noqa: F403
from fedhyper_jax.parts.rates._scheduled import *  # noqa: F403

__all__ = ["Feedback", "RateReport", "RateRule", *_adaptive.__all__, *_retained.__all__, *_scheduled.__all__]
