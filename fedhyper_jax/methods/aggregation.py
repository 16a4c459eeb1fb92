"""Other ways to make one update of the clients' updates than their mean."""

from fedhyper_jax import _validate
from fedhyper_jax.base import Scalar
from fedhyper_jax.methods.pieces import Pieces
from fedhyper_jax.methods.values import method
from fedhyper_jax.parts import aggregators

__all__ = ["clipped", "median"]


@method(
    title="Coordinate-wise median",
    kind="aggregation",
    equation="Δ_i = median_{m ∈ S} Δ_{m,i}",
    source="Yin et al., ICML 2018, arXiv 1803.01498",
    note="weights do not count; all updates of a cohort are in memory at once",
)
def median() -> Pieces:
    r"""FedAvg with the coordinate-wise median of the updates, Δ_i = median_m Δ_{m,i}. Settings as of `fedavg`.

    It withstands up to half of the participants, and is biased where clients differ.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = median(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `aggregators.median`.
    """
    return Pieces(aggregator=aggregators.median())


@method(
    title="Clipped updates",
    kind="aggregation",
    equation="Δ_m ← Δ_m min(1, C / ‖Δ_m‖), C the clip_norm",
    source="McMahan et al., ICLR 2018, arXiv 1710.06963 (flat clipping)",
    note="then aggregated as by what stands beside it: clipped+median is the median of clipped updates",
)
def clipped(*, clip_norm: Scalar = 1.0) -> Pieces:
    r"""FedAvg of updates clipped to a norm, Δ_m ← Δ_m min(1, C / ‖Δ_m‖). Settings as of `fedavg`.

    Beside another aggregation it clips what that one gets: ``clipped() + median()`` is the median of clipped updates.

    Args:
      clip_norm: C > 0.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = clipped(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, clip_norm=0.5)

    Reference:
      See `aggregators.clipped`.
    """
    _validate.positive(clip_norm=clip_norm)
    return Pieces(around_aggregator=lambda inner: aggregators.clipped(inner, clip_norm))
