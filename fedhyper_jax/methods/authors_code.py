r"""The methods of the authors' public code (github ATP-1010/FedHyper), for people who compare with it.

In that code's sense of direction (v = −Δ) and with ``agg`` for what it accumulates, α = 1 + agg:

  * G: agg += ⟨Δ^{t-1}, Δ^t⟩, α clipped to [0.2, 5]; w ← w − α Δ.
  * GM: agg += ⟨last, v⟩, α clipped to [0.8, 5]; w ← w + α v + 0.9 agg · last; last ← v + 0.9 last. (Its momentum is
    multiplied by agg, so it vanishes at agg = 0.)
  * CL: a multiplier b of the local rate, see `reference_local_rule`.
  * FULL: CL on the clients and GM on the server.
  * FedAdam+FedHyper: G's product with α clipped to [0.8, 5], in an Adam whose corrections are constant in t, whose
    second moment takes the square of the first, and whose τ stands inside the root.
  * SL and Decay-SL do nothing: local rates are rebuilt from the initial value at the top of each round.
"""

from fedhyper_jax.methods.authors_rules import adam_step, momentum_rate, momentum_step, reference_local_rule
from fedhyper_jax.methods.pieces import Pieces, Start
from fedhyper_jax.methods.values import method
from fedhyper_jax.parts import RateRule, rates

__all__ = [
    "reference_CL",
    "reference_FULL",
    "reference_FedAdam",
    "reference_G",
    "reference_GM",
    "reference_SL",
]

_FACTS = {
    "kind": "authors' code",
    "source": "github ATP-1010/FedHyper (facts only)",
    "own_global_rate": "the authors' code fixes it",
}


def _one(start: Start) -> RateRule:
    del start
    return rates.scheduled(1.0)


def _clipped_sum(bounds: tuple[float, float]):
    return lambda start: rates.hypergradient(1.0, 1.0, bounds)


@method(
    title="G of the authors' code",
    equation="agg ← clip(agg + ⟨Δ^t, Δ^{t-1}⟩, −0.8, 4), α = 1 + agg",
    note="weights uniform",
    **_FACTS,
)
def reference_G() -> Pieces:
    """FedHyper-G of the authors' code: α = 1 + agg in [0.2, 5]; weights are uniform.

    Settings as of `fedavg`, but for ``global_rate``. The code's client optimizer is ``optax.adam(1.0)``, or
    ``optax.sgd(1.0, momentum=0.5)``.
    """
    return Pieces(weighting="uniform", global_rate=_clipped_sum((0.2, 5.0)))


@method(
    title="GM of the authors' code",
    equation="agg ← clip(agg + ⟨L, Δ⟩, −0.2, 4), w ← w − (1+agg) Δ − 0.9 agg L, L ← Δ + 0.9 L",
    state="L twice, 2 d numbers",
    note="weights uniform; its momentum vanishes at agg = 0",
    **_FACTS,
)
def reference_GM() -> Pieces:
    """FedHyper-G with momentum, of the authors' code. Settings as of `reference_G`."""
    return Pieces(weighting="uniform", global_rate=lambda start: momentum_rate(), server_optimizer=momentum_step())


@method(
    title="CL of the authors' code",
    equation="b ← clip(b min(1.1, 1 + 0.1 ⟨u, v⟩/S + ⟨u, u_prev⟩), 0.1, 10), rate b β^0, u a change of w",
    communication="Δ^{t-1} down",
    note="weights uniform; the first batch of an epoch changes nothing",
    **_FACTS,
)
def reference_CL() -> Pieces:
    """FedHyper-CL of the authors' code, a multiplier of the local rate. Settings as of `reference_G`.

    Reference:
      See `reference_local_rule`.
    """
    return Pieces(weighting="uniform", global_rate=_one, client_rule=lambda start: reference_local_rule())


@method(
    title="FULL of the authors' code",
    equation="reference_CL on the clients, reference_GM on the server",
    state="L twice, 2 d numbers",
    communication="Δ^{t-1} down",
    note="weights uniform",
    **_FACTS,
)
def reference_FULL() -> Pieces:
    """FULL of the authors' code: `reference_CL` on the clients, `reference_GM` on the server.

    Example:
      >>> from fedhyper_jax.data import local_epochs
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = reference_FULL(loss_fn, work=local_epochs(2, 8), local_rate=0.01)
      >>> float(algorithm.init(0.5).global_rate.rate)
      1.0
    """
    return Pieces(
        weighting="uniform",
        global_rate=lambda start: momentum_rate(),
        server_optimizer=momentum_step(),
        client_rule=lambda start: reference_local_rule(),
    )


@method(
    title="FedAdam+FedHyper of the authors' code",
    equation="x = 0.1 (1+agg) Δ, m ← 0.9 m + 0.1 x, s ← 0.99 s + 0.01 m², w ← w − (m/0.1) / √(s/0.01 + 0.0316)",
    state="m and s, 2 d numbers",
    note="weights uniform; the second moment is of m, and τ inside the root",
    **_FACTS,
)
def reference_FedAdam() -> Pieces:
    """FedAdam under FedHyper-G, of the authors' code. Settings as of `reference_G`."""
    return Pieces(weighting="uniform", global_rate=_clipped_sum((0.8, 5.0)), server_optimizer=adam_step())


@method(
    title="SL of the authors' code",
    equation="w ← w − Δ: FedAvg, since local rates are rebuilt at the top of each round",
    note="weights uniform; Decay-SL there is without effect for the same reason",
    **_FACTS,
)
def reference_SL() -> Pieces:
    """FedHyper-SL of the authors' code, where it does nothing. Settings as of `reference_G`."""
    return Pieces(weighting="uniform", global_rate=_one)


VARIANTS = {
    "G": reference_G,
    "GM": reference_GM,
    "CL": reference_CL,
    "FULL": reference_FULL,
    "FedAdam+FedHyper": reference_FedAdam,
    "SL": reference_SL,
    "Decay-SL": reference_SL,
}
"""By the names that the code has for them."""
