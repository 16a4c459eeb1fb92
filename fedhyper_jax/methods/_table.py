"""The table of methods."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from fedhyper_jax.methods import _parts
from fedhyper_jax.methods._parts import Parts
from fedhyper_jax.parts import server_optimizers

KINDS = ("FedHyper", "global rate", "local rate", "server step", "client drift", "client step", "authors' code")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A line of the table.

    Attributes:
      title: the method's name in the literature.
      kind: one of KINDS.
      equation: in the notation of the guide; Δ is old minus new.
      state: what is kept between rounds besides w, rates and Δ^{t-1}; d is the number of parameters, N of clients.
      communication: per client and round, besides the update up and the parameters (and one rate) down.
      source: where it was published.
      note: what a user should know of our version; may be empty.
      own_global_rate: whether it sets the global rate itself, so that none can be given.
      parts: ``parts(**options) -> Parts``; its keyword arguments are the method's options, with their defaults.
    """

    title: str
    kind: str
    equation: str
    state: str = "–"
    communication: str = "–"
    source: str
    note: str = ""
    own_global_rate: bool = False
    parts: Callable[..., Parts]

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the options."""
        return {name: p.default for name, p in inspect.signature(self.parts).parameters.items() if name not in _GIVEN}


_GIVEN = ("local_rate", "population", "schedule_rounds", "weighting")
"""Arguments of parts that are not options: they are given anyway."""


_PAPER = "Wang, Wang, Li, ICLR 2024, arXiv 2310.03156"
_FEDOPT = "Reddi et al., ICLR 2021, arXiv 2003.00295"
_AUTHORS = "github ATP-1010/FedHyper (facts only)"

METHODS: dict[str, Method] = {
    "fedavg": Method(
        title="FedAvg",
        kind="server step",
        equation="w ← w − α Δ",
        source="McMahan et al., AISTATS 2017, arXiv 1602.05629",
        parts=_parts.fedavg,
    ),
    "G": Method(
        title="FedHyper-G",
        kind="FedHyper",
        equation="α^t = clip(α^{t-1} + κ ⟨Δ^t, Δ^{t-1}⟩)",
        source=f"{_PAPER}, eq. 15-16",
        note="inner_product='applied' takes ⟨Δ^t, u^{t-1}⟩ with the direction u that the server's optimizer took",
        parts=_parts.scheduler("G"),
    ),
    "SL": Method(
        title="FedHyper-SL",
        kind="FedHyper",
        equation="β^{t+1} = clip(β^t + κ ⟨Δ^t, Δ^{t-1}⟩)",
        source=f"{_PAPER}, eq. 17-18",
        parts=_parts.scheduler("SL"),
    ),
    "CL": Method(
        title="FedHyper-CL",
        kind="FedHyper",
        equation="β_m^k = clip(β_m^{k-1} + κ (⟨g_m^k, g_m^{k-1}⟩ + (1/K_m) ⟨g_m^k, Δ^{t-1}⟩))",
        state="N rates with client_rates='per_client'",
        communication="Δ^{t-1} down, unless global_weight is 0",
        source=f"{_PAPER}, eq. 19-20",
        note="client_rates: 'restart', 'warm' or 'per_client'",
        parts=_parts.scheduler("CL"),
    ),
    "decay_global": Method(
        title="Decay-G",
        kind="global rate",
        equation="α^t = α · factor^t",
        source=f"{_PAPER} (baseline)",
        parts=_parts.decay_global,
    ),
    "decay_local": Method(
        title="Decay-SL",
        kind="local rate",
        equation="β^t = β · factor^t",
        source=f"{_PAPER} (baseline)",
        note="without effect in the authors' public code; here it acts",
        parts=_parts.decay_local,
    ),
    "plateau_global": Method(
        title="Reduce on plateau (global rate)",
        kind="global rate",
        equation="α ← factor · α at the `patience`-th round in a row whose training loss is no new minimum",
        state="optax.contrib.reduce_on_plateau's",
        source="optax.contrib.reduce_on_plateau (PyTorch's waits one round more)",
        parts=_parts.plateau_global,
    ),
    "plateau_local": Method(
        title="Reduce on plateau (local rate)",
        kind="local rate",
        equation="β ← factor · β at the `patience`-th round in a row whose training loss is no new minimum",
        state="optax.contrib.reduce_on_plateau's",
        source="optax.contrib.reduce_on_plateau (PyTorch's waits one round more)",
        parts=_parts.plateau_local,
    ),
    "fedexp": Method(
        title="FedExP",
        kind="global rate",
        equation="α^t = max(1, Σ p_m ‖Δ_m‖² / (2 (‖Δ‖² + ε))), evaluated at (w^{t+1} + w^t)/2",
        state="w^{t-1}, d numbers",
        communication="‖Δ_m‖² up",
        source="Jhunjhunwala et al., ICLR 2023, arXiv 2301.09604",
        note="ε as in the formula; the published code multiplies it by the cohort's size and lets it decay",
        own_global_rate=True,
        parts=_parts.fedexp,
    ),
    "fathom": Method(
        title="FATHOM (its rule of the learning rate)",
        kind="local rate",
        equation="β ← β exp(κ cos(Δ^t, Δ̄^{t-1})), Δ̄^t = a Δ̄^{t-1} + (1−a) Δ^t, κ the cosine_rate",
        state="Δ̄, d numbers",
        source="Kan, 2022, arXiv 2211.02106",
        note="FATHOM's epochs and batch sizes are not adapted",
        parts=_parts.fathom,
    ),
    "fedavgm": Method(
        title="FedAvgM",
        kind="server step",
        equation="m ← μ m + Δ, w ← w − α m",
        state="m, d numbers",
        source="Hsu, Qi, Brown, 2019, arXiv 1909.06335; μ from Reddi et al.",
        parts=_parts.fedavgm,
    ),
    "fedadagrad": Method(
        title="FedAdagrad",
        kind="server step",
        equation="v ← v + Δ², w ← w − α Δ / (√v + τ), v before round 0 is 0",
        state="v, d numbers",
        source=_FEDOPT,
        parts=_parts.fedadagrad,
    ),
    "fedadam": Method(
        title="FedAdam",
        kind="server step",
        equation="m ← b1 m + (1−b1) Δ, v ← b2 v + (1−b2) Δ², w ← w − α m / (√v + τ)",
        state="m and v, 2 d numbers",
        source=_FEDOPT,
        note="no bias correction, as in the paper; v before round 0 is 0, as in Google's runs",
        parts=_parts.optimizer(server_optimizers.adam),
    ),
    "fedadam_corrected": Method(
        title="FedAdam with bias correction",
        kind="server step",
        equation="as FedAdam, the step multiplied by √(1−b2^{t+1}) / (1−b1^{t+1})",
        state="m and v, 2 d numbers",
        source=f"{_FEDOPT}; correction of Kingma & Ba, as Flower has it (whose exponent is one larger)",
        parts=_parts.optimizer(lambda b1, b2, tau: server_optimizers.adam(b1, b2, tau, bias_correction=True)),
    ),
    "fedyogi": Method(
        title="FedYogi",
        kind="server step",
        equation="as FedAdam with v ← v − (1−b2) Δ² sign(v − Δ²)",
        state="m and v, 2 d numbers",
        source=_FEDOPT,
        parts=_parts.optimizer(server_optimizers.yogi),
    ),
    "server_dog": Method(
        title="DoG on the server",
        kind="server step",
        equation="r̄ ← max(r̄, ‖w^t − w^0‖), G ← G + ‖Δ‖², w ← w − α (r̄ / √G) Δ",
        state="w^0, d numbers",
        source="Ivgi, Hinder, Carmon, ICML 2023, arXiv 2302.12022; optax.contrib.dog",
        note="the authors average iterates, which is left to the user",
        parts=_parts.server_dog,
    ),
    "server_mechanic": Method(
        title="Mechanic on the server",
        kind="server step",
        equation="w ← w^0 − s^t Σ Δ, the scale s^t learned by coin betting on ⟨Δ, Σ Δ⟩",
        state="w^0, d numbers",
        source="Cutkosky, Defazio, Mehta, NeurIPS 2023, arXiv 2306.00144; optax.contrib.mechanize",
        own_global_rate=True,
        parts=_parts.server_mechanic,
    ),
    "fedprox": Method(
        title="FedProx",
        kind="client drift",
        equation="g ← g + μ (w − w^t)",
        source="Li et al., MLSys 2020, arXiv 1812.06127",
        note="μ is tuned in the literature; there is no published default",
        parts=_parts.fedprox,
    ),
    "scaffold": Method(
        title="SCAFFOLD",
        kind="client drift",
        equation="g ← g − c_m + c, c_m⁺ = c_m − c + Δ_m / Σ_k β_m^k, c ← c + Σ_S q_m (c_m⁺ − c_m)",
        state="c and N rows c_m, (N+1) d numbers",
        communication="c_m⁺ − c_m up, c down",
        source="Karimireddy et al., ICML 2020, arXiv 1910.06378, option II",
        note="q_m is the client's weight in the objective: 1/N with weighting='uniform', as printed; n_m / Σ n with "
        "'examples', without which it would converge to the uniform optimum",
        parts=_parts.scaffold,
    ),
    "fednova": Method(
        title="FedNova",
        kind="client drift",
        equation="Δ = τ_eff Σ p_m Δ_m / a_m, a_m the total weight of the client's gradients, τ_eff = Σ p_m a_m",
        communication="a_m and Σ_k β_m^k up",
        source="Wang et al., NeurIPS 2020, arXiv 2007.07481",
        note="for any linear client optimizer; beside fedprox τ_eff is Σ p_m Σ_k β_m^k",
        parts=_parts.fednova,
    ),
    "feddyn": Method(
        title="FedDyn",
        kind="client drift",
        equation="g ← g + α_m (w − w^t + h_m), h_m ← h_m − Δ_m, Δ = mean_S Δ_m − mean_N h_m",
        state="mean h and N rows h_m, (N+1) d numbers",
        source="Acar et al., ICLR 2021, arXiv 2111.04263",
        note="α_m = α / (N n_m / Σ n) with weighting='examples', as in its code; evaluated at w, where the code "
        "evaluates averages of client models",
        parts=_parts.feddyn,
    ),
    "fedcm": Method(
        title="FedCM",
        kind="client drift",
        equation="g ← a g + (1−a) M, M = Σ p_m Δ_m / Σ_k β_m^k of the last round",
        state="M, d numbers",
        communication="Σ_k β_m^k up, M down",
        source="Xu et al., 2021, arXiv 2106.10874",
        parts=_parts.fedcm,
    ),
    "mime_lite": Method(
        title="MIME-lite",
        kind="client drift",
        equation="w ← w − β (g + μ s) with s frozen, then s ← Σ p_m ∇F_m(w^t) + μ s",
        state="s, d numbers",
        communication="∇F_m(w^t) up, s down",
        source="Karimireddy et al., 2020, arXiv 2008.03606",
        note="momentum as a decayed sum, as in FedJAX and TFF (an average is a tenth of it at μ = 0.9)",
        parts=_parts.mime_lite,
    ),
    "delta_sgd": Method(
        title="Δ-SGD",
        kind="client step",
        equation="β_k = min(γ ‖w_k − w_{k-1}‖ / (2 ‖g_k − g'_{k-1}‖), √(1 + δ θ_{k-1}) β_{k-1}), g' on the same batch",
        source="Kim et al., ICLR 2024, arXiv 2306.11201",
        note="local_rate is β_0, 0.2 in the paper; δ is 0.02 by default in its code; two backward passes a step",
        parts=_parts.delta_sgd,
    ),
    "fedsps": Method(
        title="FedSPS",
        kind="client step",
        equation="β_k = min((F − ℓ*) / (c ‖g‖²), β)",
        source="Mukherjee, Loizou, Stich, 2023, arXiv 2307.06306",
        note="local_rate is the cap, 1 in the paper",
        parts=_parts.fedsps,
    ),
    "fedsls": Method(
        title="FedSLS",
        kind="client step",
        equation="largest β_k = s b^j with F(w − β_k g) ≤ F(w) − c β_k ‖g‖²",
        source="'Towards Hyper-parameter-free Federated Learning', 2024, arXiv 2408.17145; constants of the code of "
        "Vaswani et al., NeurIPS 2019",
        note="local_rate is where the first search of a round starts, 1 as published",
        parts=_parts.fedsls,
    ),
    "reference_G": Method(
        title="G of the authors' code",
        kind="authors' code",
        equation="agg ← clip(agg + ⟨Δ^t, Δ^{t-1}⟩, −0.8, 4), α = 1 + agg",
        source=_AUTHORS,
        note="weights uniform",
        own_global_rate=True,
        parts=_parts.reference("G"),
    ),
    "reference_GM": Method(
        title="GM of the authors' code",
        kind="authors' code",
        equation="agg ← clip(agg + ⟨L, Δ⟩, −0.2, 4), w ← w − (1+agg) Δ − 0.9 agg L, L ← Δ + 0.9 L",
        state="L twice, 2 d numbers",
        source=_AUTHORS,
        note="weights uniform; its momentum vanishes at agg = 0",
        own_global_rate=True,
        parts=_parts.reference("GM"),
    ),
    "reference_CL": Method(
        title="CL of the authors' code",
        kind="authors' code",
        equation="b ← clip(b min(1.1, 1 + 0.1 ⟨u, v⟩/S + ⟨u, u_prev⟩), 0.1, 10), rate b β^0, u a change of w",
        communication="Δ^{t-1} down",
        source=_AUTHORS,
        note="weights uniform; the first batch of an epoch changes nothing",
        own_global_rate=True,
        parts=_parts.reference("CL"),
    ),
    "reference_FULL": Method(
        title="FULL of the authors' code",
        kind="authors' code",
        equation="reference_CL on the clients, reference_GM on the server",
        state="L twice, 2 d numbers",
        communication="Δ^{t-1} down",
        source=_AUTHORS,
        note="weights uniform",
        own_global_rate=True,
        parts=_parts.reference("FULL"),
    ),
    "reference_FedAdam": Method(
        title="FedAdam+FedHyper of the authors' code",
        kind="authors' code",
        equation="x = 0.1 (1+agg) Δ, m ← 0.9 m + 0.1 x, s ← 0.99 s + 0.01 m², w ← w − (m/0.1) / √(s/0.01 + 0.0316)",
        state="m and s, 2 d numbers",
        source=_AUTHORS,
        note="weights uniform; the second moment is of m, and τ inside the root",
        own_global_rate=True,
        parts=_parts.reference("FedAdam+FedHyper"),
    ),
    "reference_SL": Method(
        title="SL of the authors' code",
        kind="authors' code",
        equation="w ← w − Δ: FedAvg, since local rates are rebuilt at the top of each round",
        source=_AUTHORS,
        note="weights uniform; Decay-SL there is without effect for the same reason",
        own_global_rate=True,
        parts=_parts.reference("SL"),
    ),
}
"""Methods by name."""


def method_table() -> list[dict[str, str]]:
    """The table as text: a row a method.

    Example:
      >>> method_table()[0]["name"], method_table()[0]["options"]
      ('fedavg', 'global_rate=1.0')
    """
    return [
        {
            "name": name,
            "method": method.title,
            "kind": method.kind,
            "equation": method.equation,
            "state": method.state,
            "communication": method.communication,
            "options": ", ".join(f"{option}={default!r}" for option, default in method.options.items()) or "–",
            "source": method.source,
            "note": method.note,
        }
        for name, method in METHODS.items()
    ]
