"""Both rates without a number to choose: the local one by the retained gain, the global one by a normalised G."""

import jax.numpy as jnp

from fedhyper_jax import _validate
from fedhyper_jax.base import Range, Scalar
from fedhyper_jax.methods.pieces import Pieces, Start
from fedhyper_jax.methods.values import method
from fedhyper_jax.parts import RateRule, client_rules, rates

__all__ = ["retained_gain"]


@method(
    title="Retained gain",
    kind="FedHyper",
    equation="log β^{t+1} = log β^t + η (A − ρ* P)/P̄, A = Σ p_m (f_m(w) − f_m(w_m)), P = Σ p_m ⟨∇f_m(w), Δ_m⟩; "
    "α ← clip(α exp(κ cos(Δ^t, Δ^{t-1})))",
    state="the average of w, d numbers",
    communication="5 numbers up",
    source="new here (docs/retained_gain.md)",
    note="needs no rates: round 0 moves nothing and measures the curvature; a round that went wrong is taken back",
    local_rate=0.1,
)
def retained_gain(
    *,
    target_share: Scalar = 0.35,
    coherence_power: Scalar = 0.2,
    share_rate: Scalar = 2.0,
    global_hyper_rate: Scalar = 0.2,
    global_range: Range = (1 / 3, 3.0),
    start: str = "measured",
) -> Pieces:
    r"""FedAvg whose rates nobody has to choose. Settings as of `fedavg`.

    The local rate follows the share of the predicted gain that clients retain, see `rates.retained_gain`; the global
    one a normalised hypergradient, unless another method of the sum (G, FedExP) moves it:

    .. math:: \alpha^t = \mathrm{clip}\bigl(\alpha^{t-1} e^{\kappa \cos(\Delta^t, \Delta^{t-1})}\bigr)

    Both begin where the first round's measurement and the server's step have them begin: rates that are given are not
    used, unless ``start="given"``. What is evaluated is a running average of the iterates, unless ``evaluate_at`` says
    otherwise.

    Args:
      target_share: ρ_0 of `rates.retained_gain`, strictly between 0 and 1.
      coherence_power: e there.
      share_rate: η there, ≥ 0.
      global_hyper_rate: κ ≥ 0 of the global rate, of which κ cos counts as 1 at most; 0 leaves it where it is.
      global_range: (lower, upper) of the global rate, as multiples of the usual one (1, or a server optimizer's own).
      start: "measured", for clients that step along their gradient (SGD, momentum), or "given" to begin with
        ``local_rate`` and ``global_rate``, the latter no further than its range, and to measure nothing.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = retained_gain(loss_fn, work=local_steps(5, batch_size=8))  # no rate

    Reference:
      New here; docs/retained_gain.md.
    """

    def local_rate(facts: Start) -> RateRule:
        return rates.retained_gain(
            facts.local_rate,
            target_share=target_share,
            coherence_power=coherence_power,
            hyper_rate=share_rate,
            start=start,
            name="local_rate",
        )

    def global_rate(facts: Start) -> RateRule:
        _validate.positive(global_rate=facts.global_rate)
        bounds = tuple(factor * facts.usual_global_rate for factor in global_range)
        first = facts.usual_global_rate if start == "measured" else _inside(facts.global_rate, bounds)
        return rates.hypergradient(
            first,
            global_hyper_rate,
            bounds,
            normalise="cosine",
            update="exponential",
            max_change=1.0,
            name="global_rate",
        )

    return Pieces(
        local_rate=local_rate,
        fallback_global_rate=global_rate,
        client_rule=lambda facts: client_rules.counted_descent(),
        fallback_evaluate_at="running_average",
    )


def _inside(rate, bounds: tuple):
    """The rate, or the bound that it is beyond."""
    if _validate.is_traced(rate, *bounds):
        return jnp.clip(rate, *bounds)
    return min(max(rate, bounds[0]), bounds[1])
