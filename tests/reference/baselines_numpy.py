"""Federated-learning baselines in plain NumPy and float64: the oracle against which the JAX package is tested.

Written from shared/SPEC.md (sections 1 to 3 and 5) and shared/BASELINES.md section 2, not from the package. One loop
over rounds (`run`), one over clients (`play_round`), one over local steps (`train_client`). The authors' reference
variants of SPEC.md section 3 follow at the end (`reference_run`), in their own ascent sense.

Conventions. Parameters are one flat float64 vector. Δ_m = w^t − w_m (old minus new), Δ = Σ p_m Δ_m, and the server
steps w ← w − α u(Δ). α is the global rate, β the local one.

* `gradient(w, rows)` and `loss(w, rows)` are means over the pool's examples `rows`.
* `batches[t]` maps a client id to that client's list of row-index arrays, one per local step (ragged lists allowed).
* `num_examples` maps *every* client of the population to n_m (or is an array over it): its length is N.
* `client_rows` maps a client id to all its rows; only MIME-lite needs it.

The parts are separate arguments and combine freely: how the client corrects its gradient (`corrections`), how it
chooses its step sizes (`client_rate`), how updates become Δ (`aggregation`), what follows the averaging (`server`),
what moves α (`global_rate`) and what moves β between rounds (`server_local_rate`, `rate_start`). `METHODS` names the
usual bundles.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Vector = np.ndarray
Gradient = Callable[[Vector, np.ndarray], Vector]
Loss = Callable[[Vector, np.ndarray], float]
ClientBatches = Sequence[np.ndarray]

SERVERS = ("sgd", "fedavgm", "fedadagrad", "fedadam", "fedadam_corrected", "fedyogi")
CLIENT_OPTIMIZERS = ("sgd", "momentum")
GLOBAL_RATES = ("constant", "G", "fedexp")
SERVER_LOCAL_RATES = ("constant", "SL", "fathom")
RATE_STARTS = ("broadcast", "warm", "per_client")
CLIENT_RATES = ("constant", "CL", "delta_sgd", "sps", "ngn", "sls")
CORRECTIONS = ("prox", "scaffold", "feddyn", "fedcm", "mimelite")
AGGREGATIONS = ("mean", "fednova", "feddyn")
RHO = 0.9  # momentum of the client optimizer "momentum"


@dataclass(frozen=True)
class Settings:
    """Everything a run is made of, but the data.

    Attributes:
        alpha, beta: α^0 and β^0. β^0 fixes the relative bounds of CL and SL.
        weighting: p_m proportional to n_m ("examples") or equal ("uniform"), over the cohort.
        client_optimizer: "sgd", or "momentum" (trace ← g + 0.9 trace, step β·trace, fresh each round).
        server: what becomes of Δ, see `server_direction`. `server_momentum`, `b1`, `b2`, `tau`, `v0` belong to it.
            "fedadam_corrected" has the exponent t + `correction_offset` (1; Flower counts rounds from 1 and adds 1: 2).
        global_rate: "constant"; "G": α ← clip(α + κ⟨Δ^t, Δ^{t-1}⟩) with `kappa`, `global_bounds`; "fedexp" with
            `fedexp_eps` (one number, not multiplied by S), multiplied by `fedexp_eps_decay` after each round.
        server_local_rate: "constant"; "SL" with `kappa_local`, `local_bounds`; "fathom" with `fathom_smoothing`,
            `fathom_step`, `fathom_upper`.
        rate_start: what a client's β is at the first step: the server's ("broadcast"), the server's which is the last
            cohort's weighted mean of final rates ("warm"), or the client's own last one ("per_client").
        client_rate: "constant", "CL" (`kappa_client`, `local_bounds`, `global_weight`: None for 1/K_m), "delta_sgd"
            (`delta_gamma`, `delta_delta`), "sps" (`sps_c`, `sps_lstar`), "ngn" (`ngn_lstar`), "sls" (`sls_c`,
            `sls_shrink`, `sls_trials`, `sls_fallback`). For the last three β is the upper bound γ_b, σ,
            or the first trial of every step.
        local_bounds: None for (β^0/10, 10 β^0).
        scaffold_weights: of c_i in c: 1/N ("uniform") or n_i/Σ_all n ("examples").
        corrections: any of CORRECTIONS; "prox" (`mu`) combines with all, the others exclude one another. `cm_a`;
            `dyn_alpha`, `dyn_scaling` ("uniform" or "examples"); `mime_base` ("momentum" with `mime_rho`,
            or "adam" with `mime_b1`, `mime_b2`, `mime_eps`).
        aggregation: "mean", "fednova" (uses `mu` if "prox" is on), "feddyn" (uniform mean over the cohort, minus hbar).
    """

    alpha: float = 1.0
    beta: float = 0.1
    weighting: str = "examples"
    client_optimizer: str = "sgd"
    server: str = "sgd"
    global_rate: str = "constant"
    server_local_rate: str = "constant"
    rate_start: str = "broadcast"
    client_rate: str = "constant"
    corrections: tuple[str, ...] = ()
    aggregation: str = "mean"
    # server
    server_momentum: float = 0.9
    b1: float = 0.9
    b2: float = 0.99
    tau: float = 1e-3
    v0: float = 0.0
    correction_offset: int = 1
    # global rate
    kappa: float = 1.0
    global_bounds: tuple[float, float] = (1 / 3, 3.0)
    fedexp_eps: float = 1e-3
    fedexp_eps_decay: float = 1.0
    # local rate on the server
    kappa_local: float = 1.0
    fathom_smoothing: float = 0.5
    fathom_step: float = 0.01
    fathom_upper: float = np.inf
    # local rate on the client
    kappa_client: float = 1.0
    local_bounds: tuple[float, float] | None = None
    global_weight: float | None = None
    delta_gamma: float = 2.0
    delta_delta: float = 0.1
    sps_c: float = 0.5
    sps_lstar: float = 0.0
    ngn_lstar: float = 0.0
    sls_c: float = 0.1
    sls_shrink: float = 0.9
    sls_trials: int = 100
    sls_fallback: float = 1e-6
    # corrections
    scaffold_weights: str = "uniform"
    mu: float = 0.0
    dyn_alpha: float = 1e-2
    dyn_scaling: str = "uniform"
    cm_a: float = 0.1
    mime_base: str = "momentum"
    mime_rho: float = 0.9
    mime_b1: float = 0.9
    mime_b2: float = 0.999
    mime_eps: float = 1e-8

    def __post_init__(self) -> None:
        """Refuse unknown names and combinations without a definition."""
        for name, known in (
            ("client_optimizer", CLIENT_OPTIMIZERS),
            ("server", SERVERS),
            ("global_rate", GLOBAL_RATES),
            ("server_local_rate", SERVER_LOCAL_RATES),
            ("rate_start", RATE_STARTS),
            ("client_rate", CLIENT_RATES),
            ("aggregation", AGGREGATIONS),
            ("weighting", ("examples", "uniform")),
            ("dyn_scaling", ("uniform", "examples")),
            ("mime_base", ("momentum", "adam")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if not set(self.corrections) <= set(CORRECTIONS) or len(set(self.corrections) - {"prox"}) > 1:
            raise ValueError(f"corrections must be 'prox' and at most one other of {CORRECTIONS}: {self.corrections}")
        if ("feddyn" in self.corrections) != (self.aggregation == "feddyn"):
            raise ValueError("the correction 'feddyn' and the aggregation 'feddyn' go together")
        if self.rate_start == "per_client" and self.server_local_rate != "constant":
            raise ValueError("per_client rates with a rule for the server's local rate")
        if self.aggregation == "fednova" and "prox" in self.corrections and self.client_optimizer != "sgd":
            raise ValueError("fednova with a proximal term needs client_optimizer 'sgd'")
        if "mimelite" in self.corrections and self.client_optimizer != "sgd":
            raise ValueError("mimelite replaces the client optimizer: leave it at 'sgd'")


METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavgm": {"server": "fedavgm"},
    "fedadagrad": {"server": "fedadagrad"},
    "fedadam": {"server": "fedadam"},
    "fedadam_corrected": {"server": "fedadam_corrected"},
    "fedyogi": {"server": "fedyogi"},
    "fedexp": {"global_rate": "fedexp"},
    "fathom": {"server_local_rate": "fathom"},
    "fedprox": {"corrections": ("prox",)},
    "scaffold": {"corrections": ("scaffold",)},
    "fednova": {"aggregation": "fednova"},
    "fednova_prox": {"aggregation": "fednova", "corrections": ("prox",)},
    "feddyn": {"aggregation": "feddyn", "corrections": ("feddyn",)},
    "fedcm": {"corrections": ("fedcm",)},
    "mimelite": {"corrections": ("mimelite",)},
    "delta_sgd": {"client_rate": "delta_sgd"},
    "fedsps": {"client_rate": "sps"},
    "ngn": {"client_rate": "ngn"},
    "fedsls": {"client_rate": "sls"},
    "fedhyper_g": {"global_rate": "G"},
    "fedhyper_sl": {"server_local_rate": "SL"},
    "fedhyper_cl": {"client_rate": "CL"},
}


class State(NamedTuple):
    """State before the next round.

    Attributes:
        round: t.
        w: w^t.
        alpha: α last used (α^0 before round 0).
        beta: β^t, which the server broadcasts in round t.
        previous: Δ^{t-1}, zero before round 0.
        server: by name: "m", "v" (server optimizers); "sm" (FATHOM); "c" (SCAFFOLD); "hbar" (FedDyn); "M" (FedCM);
            "s" (MIME-lite: the trace, or Adam's first moment), "s2" (Adam's second moment). Unused ones stay zero.
        c, h: SCAFFOLD's c_i and FedDyn's h_i, of every client of the population.
        rates: the rate every client of the population would start from under "per_client" (β^0 if never drawn).
    """

    round: int
    w: Vector
    alpha: float
    beta: float
    previous: Vector
    server: dict[str, Vector]
    c: dict[int, Vector]
    h: dict[int, Vector]
    rates: dict[int, float]


class ClientResult(NamedTuple):
    """`update` is Δ_m; `rates` the rate of every step; `displacement` D_m, see `train_client`; `normalizer` FedNova's
    a_m in units of the broadcast rate."""

    update: Vector
    rates: np.ndarray
    displacement: float
    normalizer: float


class Record(NamedTuple):
    """Observations of round t, and the state after it. Mappings are by client id, over the cohort.

    Attributes:
        round: t.
        w: w^{t+1}.
        evaluation: (w^{t+1} + w^t)/2, FedExP's evaluation point.
        alpha: α^t as used.
        beta: β^t as broadcast.
        pseudo_gradient: the final Δ^t, after the aggregation rule: what the server optimizer is fed.
        direction: u^t: w^{t+1} = w^t − α^t u^t.
        inner_product: ⟨Δ^t, Δ^{t-1}⟩.
        weights: p_m.
        updates: Δ_m.
        final_rates: β_m^{K_m−1}.
        rates: β_m^k of every step k.
        normalizers: FedNova's a_m in units of the broadcast rate (K_m for plain SGD at a constant rate).
        state: the state after the round; its `beta` is β^{t+1}.
    """

    round: int
    w: Vector
    evaluation: Vector
    alpha: float
    beta: float
    pseudo_gradient: Vector
    direction: Vector
    inner_product: float
    weights: dict[int, float]
    updates: dict[int, Vector]
    final_rates: dict[int, float]
    rates: dict[int, np.ndarray]
    normalizers: dict[int, float]
    state: State


def inner(a: Vector, b: Vector) -> float:
    """⟨a, b⟩."""
    return float(np.sum(a * b))


def clip(value: float, bounds: tuple[float, float]) -> float:
    """min(max(value, lower), upper)."""
    return min(max(value, bounds[0]), bounds[1])


def population(num_examples: Mapping[int, float] | Sequence[float] | np.ndarray) -> dict[int, float]:
    """n_m by client id, of all N clients."""
    if isinstance(num_examples, Mapping):
        return {client: float(n) for client, n in num_examples.items()}
    return {client: float(n) for client, n in enumerate(num_examples)}


def initial_state(
    w0: Vector, num_examples: Mapping[int, float] | Sequence[float] | np.ndarray, settings: Settings
) -> State:
    """The state before round 0: everything zero, but w, the rates and Adam's v_0."""
    w0 = np.array(w0, np.float64)
    clients = population(num_examples)
    server = {name: np.zeros_like(w0) for name in ("m", "v", "sm", "c", "hbar", "M", "s", "s2")}
    server["v"] = np.full_like(w0, settings.v0)
    return State(
        round=0,
        w=w0,
        alpha=settings.alpha,
        beta=settings.beta,
        previous=np.zeros_like(w0),
        server=server,
        c={client: np.zeros_like(w0) for client in clients},
        h={client: np.zeros_like(w0) for client in clients},
        rates={client: settings.beta for client in clients},
    )


def local_bounds(settings: Settings) -> tuple[float, float]:
    """(β^0/10, 10 β^0) unless given."""
    return settings.local_bounds or (settings.beta / 10.0, settings.beta * 10.0)


# --------------------------------------------------------------------------------------------------------------------
# Clients
# --------------------------------------------------------------------------------------------------------------------


def delta_sgd_rate(
    rate: float, theta: float, step: Vector, gradient_change: Vector, gamma: float, delta: float
) -> tuple[float, float]:
    """Δ-SGD: η_k = min(γ‖x_k − x_{k-1}‖ / (2‖g_k(x_k) − g_k(x_{k-1})‖), sqrt(1 + δ θ_{k-1}) η_{k-1}); η_k, θ_k.

    With a zero denominator only the second bound counts.
    """
    new_rate = np.sqrt(1.0 + delta * theta) * rate
    denominator = 2.0 * np.sqrt(inner(gradient_change, gradient_change))
    if denominator > 0.0:
        new_rate = min(gamma * np.sqrt(inner(step, step)) / denominator, new_rate)
    return float(new_rate), float(new_rate / rate)  # θ_k = η_k/η_{k-1}


def sps_rate(value: float, g: Vector, lstar: float, c: float, upper: float) -> float:
    """FedSPS: η = min((F(w; batch) − l*) / (c‖g‖²), γ_b); γ_b where g = 0."""
    square = inner(g, g)
    return upper if square == 0.0 else min((value - lstar) / (c * square), upper)


def ngn_rate(gap: float, g: Vector, sigma: float) -> float:
    """NGN, eq. (2) of the paper: η = σ / (1 + σ‖g‖² / (2f)) with f = F(w; batch) − l*; 0 where f ≤ 0 but g is not."""
    square = inner(g, g)
    if square == 0.0:
        return sigma
    return sigma / (1.0 + sigma * square / (2.0 * gap)) if gap > 0.0 else 0.0


def armijo_rate(
    value: Callable[[Vector], float], w: Vector, g: Vector, start: float, c: float, shrink: float, trials: int,
    fallback: float,
) -> float:  # fmt: skip
    """FedSLS: the first η in start, 0.9 start, 0.9² start, … (`trials` of them) with F(w − ηg) ≤ F(w) − cη‖g‖²."""
    rate, here, square = start, value(w), inner(g, g)
    for _ in range(trials):
        if value(w - rate * g) <= here - c * rate * square:
            return rate
        rate = shrink * rate
    return fallback


def mime_direction(g: Vector, state: State, s: Settings) -> Vector:
    """MIME-lite: what the base optimizer makes of g with its frozen state, which g does not enter for good."""
    if s.mime_base == "momentum":
        return g + s.mime_rho * state.server["s"]  # g + ρ s
    count = state.round + 1  # Adam, with bias correction: as if g were the next gradient
    mu_hat = (s.mime_b1 * state.server["s"] + (1.0 - s.mime_b1) * g) / (1.0 - s.mime_b1**count)
    nu_hat = (s.mime_b2 * state.server["s2"] + (1.0 - s.mime_b2) * g**2) / (1.0 - s.mime_b2**count)
    return mu_hat / (np.sqrt(nu_hat) + s.mime_eps)


def train_client(
    gradient: Gradient, loss: Loss, state: State, client: int, batches: ClientBatches, dyn_alpha_i: float, s: Settings
) -> ClientResult:
    """Local training of one client.

    Every correction has the form g(x) = scale·∇F(x; batch) + pull·(x − w^t) + shift, the gradient of
    scale·F(x; batch) + (pull/2)‖x − w^t‖² + ⟨shift, x − w^t⟩.

    The displacement D under unit gradients: T ← 1 + ρT, D ← D + β_k T, i.e. Σ_k β_k for SGD and
    β Σ_k (1 + ρ + … + ρ^{k-1}) for momentum at a constant rate. FedNova's with a proximal term (a_m in units of the
    broadcast rate is D/β^t, hence a ← (1 − βμ) a + 1): D ← (1 − β_k μ) D + β_k T.
    """
    if len(batches) == 0 or any(len(rows) == 0 for rows in batches):
        raise ValueError("a client needs at least one local step, and each step at least one example")
    w = state.w
    scale, pull, shift = 1.0, 0.0, np.zeros_like(w)
    prox = s.mu if "prox" in s.corrections else 0.0
    if "prox" in s.corrections:
        pull = pull + s.mu  # FedProx: g + μ (x − w^t)
    if "scaffold" in s.corrections:
        shift = state.server["c"] - state.c[client]  # SCAFFOLD: g − c_i + c
    if "feddyn" in s.corrections:
        pull = pull + dyn_alpha_i  # FedDyn: g + α_i (x − w^t + h_i)
        shift = dyn_alpha_i * state.h[client]
    if "fedcm" in s.corrections:
        scale, shift = s.cm_a, (1.0 - s.cm_a) * state.server["M"]  # FedCM: a g + (1 − a) M

    def fed(x: Vector, rows: np.ndarray) -> Vector:
        return scale * gradient(x, rows) + pull * (x - w) + shift

    def objective(x: Vector, rows: np.ndarray) -> float:
        return scale * float(loss(x, rows)) + 0.5 * pull * inner(x - w, x - w) + inner(shift, x - w)

    start = state.rates[client] if s.rate_start == "per_client" else state.beta
    share = 1.0 / len(batches) if s.global_weight is None else s.global_weight
    x, rate, theta = w.copy(), start, 1.0  # θ_0 = 1
    trace = np.zeros_like(w)
    previous_x, previous_g = x, np.zeros_like(w)
    unit_trace = displacement = nova = 0.0
    rates = []

    for k, rows in enumerate(batches):
        g = fed(x, rows)

        # ---- the rate of this step ----------------------------------------------------------------------------------
        if s.client_rate == "CL" and k >= 1:
            # β_k = clip(β_{k-1} + κ (⟨g_k, g_{k-1}⟩ + (1/K) ⟨g_k, Δ^{t-1}⟩), β_lo, β_hi)
            product = inner(g, previous_g) + share * inner(g, state.previous)
            if np.isfinite(product):
                rate = clip(rate + s.kappa_client * product, local_bounds(s))
        elif s.client_rate == "delta_sgd" and k >= 1:
            change = g - fed(previous_x, rows)  # both on the current minibatch
            rate, theta = delta_sgd_rate(rate, theta, x - previous_x, change, s.delta_gamma, s.delta_delta)
        elif s.client_rate == "sps":
            rate = sps_rate(objective(x, rows), g, s.sps_lstar, s.sps_c, start)
        elif s.client_rate == "ngn":
            rate = ngn_rate(objective(x, rows) - s.ngn_lstar, g, start)
        elif s.client_rate == "sls":
            rate = armijo_rate(
                lambda point, rows=rows: objective(point, rows), x, g, start, s.sls_c, s.sls_shrink, s.sls_trials,
                s.sls_fallback,
            )  # fmt: skip
        rates.append(rate)

        # ---- the step -----------------------------------------------------------------------------------------------
        if "mimelite" in s.corrections:
            direction = mime_direction(g, state, s)
            unit_trace = 1.0
        elif s.client_optimizer == "momentum":
            trace = g + RHO * trace
            direction = trace
            unit_trace = 1.0 + RHO * unit_trace
        else:
            direction = g
            unit_trace = 1.0
        previous_x, previous_g = x, g
        x = x - rate * direction  # x ← x − β_k · direction
        displacement = displacement + rate * unit_trace
        nova = (1.0 - rate * prox) * nova + rate * unit_trace

    return ClientResult(w - x, np.array(rates), displacement, nova / state.beta)


# --------------------------------------------------------------------------------------------------------------------
# Server
# --------------------------------------------------------------------------------------------------------------------


def server_direction(delta: Vector, t: int, old: Mapping[str, Vector], s: Settings) -> tuple[Vector, dict[str, Vector]]:
    """u^t and the changed entries of the server's state."""
    if s.server == "sgd":  # FedAvg: u = Δ
        return delta, {}
    if s.server == "fedavgm":  # m ← 0.9 m + Δ; u = m
        m = s.server_momentum * old["m"] + delta
        return m, {"m": m}
    if s.server == "fedadagrad":  # v ← v + Δ²; u = Δ / (√v + τ)
        v = old["v"] + delta**2
        return delta / (np.sqrt(v) + s.tau), {"v": v}
    m = s.b1 * old["m"] + (1.0 - s.b1) * delta  # m ← b1 m + (1 − b1) Δ
    if s.server == "fedyogi":  # v ← v − (1 − b2) Δ² sign(v − Δ²)
        v = old["v"] - (1.0 - s.b2) * delta**2 * np.sign(old["v"] - delta**2)
    else:  # v ← b2 v + (1 − b2) Δ²
        v = s.b2 * old["v"] + (1.0 - s.b2) * delta**2
    u = m / (np.sqrt(v) + s.tau)  # u = m / (√v + τ), no bias correction
    if s.server == "fedadam_corrected":  # times √(1 − b2^{t+1}) / (1 − b1^{t+1}), t = 0 in the first round
        e = t + s.correction_offset  # t + 1, or t + 2 to agree with Flower to the letter
        u = np.sqrt(1.0 - s.b2**e) / (1.0 - s.b1**e) * u
    return u, {"m": m, "v": v}


def play_round(
    gradient: Gradient,
    loss: Loss,
    state: State,
    cohort: Sequence[int],
    batches: Mapping[int, ClientBatches],
    num_examples: Mapping[int, float] | Sequence[float] | np.ndarray,
    s: Settings,
    client_rows: Mapping[int, np.ndarray] | None = None,
) -> Record:
    """Round `state.round` from the given state."""
    n = population(num_examples)
    big_n = len(n)
    t, w, beta = state.round, state.w, state.beta
    server = dict(state.server)
    c, h, client_start = dict(state.c), dict(state.h), dict(state.rates)

    # ---- p_m and the clients ----------------------------------------------------------------------------------------
    raw = {m: n[m] if s.weighting == "examples" else 1.0 for m in cohort}
    p = {m: raw[m] / sum(raw.values()) for m in cohort}
    results: dict[int, ClientResult] = {}
    for m in cohort:
        # FedDyn: α_i = α, or α / (N n_i / Σ_all n)
        alpha_i = s.dyn_alpha if s.dyn_scaling == "uniform" else s.dyn_alpha / (big_n * n[m] / sum(n.values()))
        results[m] = train_client(gradient, loss, state, m, batches[m], alpha_i, s)
        if not np.all(np.isfinite(results[m].update)):
            raise FloatingPointError(f"client {m} diverged in round {t}; this oracle does not leave clients out")
        client_start[m] = float(results[m].rates[-1])
    updates = {m: results[m].update for m in cohort}

    # ---- Δ ----------------------------------------------------------------------------------------------------------
    delta = np.zeros_like(w)
    if s.aggregation == "mean":
        for m in cohort:
            delta = delta + p[m] * updates[m]  # Δ = Σ p_m Δ_m
    elif s.aggregation == "fednova":
        tau_eff = 0.0
        for m in cohort:
            a = results[m].normalizer
            delta = delta + p[m] * updates[m] / a
            # τ_eff = Σ p_m a_m, or Σ p_m τ_m (steps) with a proximal term
            tau_eff += p[m] * (len(batches[m]) if "prox" in s.corrections and s.mu > 0.0 else a)
        delta = tau_eff * delta  # Δ = τ_eff Σ p_m Δ_m / a_m
    else:
        for m in cohort:
            h[m] = h[m] - updates[m]  # FedDyn: h_i ← h_i + (w_i − w^t)
            delta = delta + updates[m] / len(cohort)
        hbar = np.zeros_like(w)
        for m in n:
            hbar = hbar + h[m] / big_n  # hbar = (1/N) Σ_all h_i
        server["hbar"] = hbar
        delta = delta - hbar  # w^{t+1} = mean_S w_i + hbar, so Δ = mean_S Δ_i − hbar
        p = {m: 1.0 / len(cohort) for m in cohort}

    # ---- α^t, then w^{t+1} = w^t − α^t u^t --------------------------------------------------------------------------
    product = inner(delta, state.previous)
    alpha = state.alpha
    if s.global_rate == "G":  # α^t = clip(α^{t-1} + κ ⟨Δ^t, Δ^{t-1}⟩)
        if np.isfinite(product):
            alpha = clip(alpha + s.kappa * product, s.global_bounds)
    elif s.global_rate == "fedexp":  # α = max(1, Σ p_m ‖Δ_m‖² / (2 (‖Δ‖² + ε)))
        numerator = sum(p[m] * inner(updates[m], updates[m]) for m in cohort)
        denominator = 2.0 * (inner(delta, delta) + s.fedexp_eps * s.fedexp_eps_decay**t)
        alpha = max(1.0, numerator / denominator) if denominator > 0.0 else 1.0
    u, changed = server_direction(delta, t, state.server, s)
    server.update(changed)
    new_w = w - alpha * u

    # ---- β^{t+1} ----------------------------------------------------------------------------------------------------
    next_beta = beta
    if s.rate_start == "warm":  # Σ p_m β_m, final rates
        next_beta = sum(p[m] * float(results[m].rates[-1]) for m in cohort)
    if s.server_local_rate == "SL":  # β^{t+1} = clip(β^t + κ ⟨Δ^t, Δ^{t-1}⟩), or from the mean above
        if np.isfinite(product):
            next_beta = next_beta + s.kappa_local * product
    if s.server_local_rate == "SL" or s.rate_start == "warm":
        next_beta = clip(next_beta, local_bounds(s))
    if s.server_local_rate == "fathom":  # H = −cos(Δ^t, sm_{t-1}) (0 where a norm is 0); β^{t+1} = β^t exp(−0.01 H)
        norms = np.sqrt(inner(delta, delta)) * np.sqrt(inner(server["sm"], server["sm"]))
        cosine = inner(delta, server["sm"]) / norms if norms > 0.0 else 0.0
        next_beta = min(next_beta * float(np.exp(-s.fathom_step * -cosine)), s.fathom_upper)
        # sm_t = a sm_{t-1} + (1 − a) Δ^t, after its use
        server["sm"] = s.fathom_smoothing * server["sm"] + (1.0 - s.fathom_smoothing) * delta

    # ---- states of the client-side methods --------------------------------------------------------------------------
    if "scaffold" in s.corrections:
        for m in cohort:
            # c_i+ = c_i − c + Δ_i / D_i with the c of the round's start; c ← c + Σ_S (c_i+ − c_i)/N, or n_i/Σ n
            c[m] = state.c[m] - state.server["c"] + updates[m] / results[m].displacement
            share = 1.0 / big_n if s.scaffold_weights == "uniform" else n[m] / sum(n.values())
            server["c"] = server["c"] + share * (c[m] - state.c[m])
    if "fedcm" in s.corrections:
        server["M"] = np.zeros_like(w)
        for m in cohort:
            server["M"] = server["M"] + p[m] * updates[m] / results[m].rates.sum()  # M = Σ p_m Δ_m / Σ_k β_m^k
    if "mimelite" in s.corrections:
        if client_rows is None:
            raise ValueError("mimelite needs client_rows")
        full = np.zeros_like(w)
        for m in cohort:
            full = full + p[m] * gradient(w, client_rows[m])  # c = Σ p_m ∇F_m(w^t) on all of m's examples
        if s.mime_base == "momentum":  # s ← c + ρ s
            server["s"] = full + s.mime_rho * server["s"]
        else:  # Adam's moments
            server["s"] = s.mime_b1 * server["s"] + (1.0 - s.mime_b1) * full
            server["s2"] = s.mime_b2 * server["s2"] + (1.0 - s.mime_b2) * full**2

    return Record(
        round=t,
        w=new_w,
        evaluation=(new_w + w) / 2.0,
        alpha=alpha,
        beta=beta,
        pseudo_gradient=delta,
        direction=u,
        inner_product=product,
        weights=p,
        updates=updates,
        final_rates={m: float(results[m].rates[-1]) for m in cohort},
        rates={m: results[m].rates for m in cohort},
        normalizers={m: results[m].normalizer for m in cohort},
        state=State(t + 1, new_w, alpha, next_beta, delta, server, c, h, client_start),
    )


def run(
    gradient: Gradient,
    loss: Loss,
    w0: Vector,
    cohorts: Sequence[Sequence[int]],
    batches: Sequence[Mapping[int, ClientBatches]],
    num_examples: Mapping[int, float] | Sequence[float] | np.ndarray,
    *,
    method: str = "fedavg",
    client_rows: Mapping[int, np.ndarray] | None = None,
    **settings: Any,
) -> list[Record]:
    """len(cohorts) rounds from w0. `method` is a key of METHODS, whose settings `settings` (see Settings) overrides."""
    s = Settings(**{**METHODS[method], **settings})
    state = initial_state(w0, num_examples, s)
    records = []
    for cohort, round_batches in zip(cohorts, batches, strict=True):
        records.append(play_round(gradient, loss, state, cohort, round_batches, num_examples, s, client_rows))
        state = records[-1].state
    return records


# --------------------------------------------------------------------------------------------------------------------
# The authors' code as named variants: SPEC.md section 3. Ascent sense: v = −Δ is the mean parameter change. Uniform
# weights throughout.
# --------------------------------------------------------------------------------------------------------------------

REFERENCE_VARIANTS = ("FedAvg", "G", "GM", "CL", "FULL", "FedAdam")


class ReferenceState(NamedTuple):
    """Between rounds: `agg` starts at 0, `last` (what the next product is taken with), `v` (the last round's mean
    parameter change) and FedAdam's moments `m`, `s` at zero."""

    round: int
    w: Vector
    agg: float
    last: Vector
    v: Vector
    m: Vector
    s: Vector


class ReferenceRecord(NamedTuple):
    """A round of a reference variant.

    Attributes:
        w: w^{t+1}.
        v: v^t = −Δ^t.
        agg: after the round's update; α^t = 1 + agg.
        changes: w_i − w^t, by client.
        multipliers: CL's b as used at every step, by client (rate = b β^0); all 1 without CL.
        final_multipliers: b after the round's last update, by client.
        state: the state after the round.
    """

    w: Vector
    v: Vector
    agg: float
    changes: dict[int, Vector]
    multipliers: dict[int, np.ndarray]
    final_multipliers: dict[int, float]
    state: ReferenceState


def reference_initial_state(w0: Vector) -> ReferenceState:
    """The state before round 0."""
    w0 = np.array(w0, np.float64)
    zero = np.zeros_like(w0)
    return ReferenceState(0, w0, 0.0, zero, zero, zero, zero)


def reference_client(
    w: Vector,
    gradients: Sequence[Vector | Callable[[Vector], Vector]],
    beta: float,
    *,
    adapt: bool,
    v_prev: Vector,
    cohort_size: int,
    steps_per_epoch: int,
    momentum: float = 0.0,
) -> tuple[Vector, np.ndarray, float]:
    """One client: w_i − w, the b used at every step, the b after the last update.

    `gradients[k]` is the gradient of step k, or a function of the local iterate. The first batch of an epoch is a
    multiple of `steps_per_epoch`. `momentum` is that of the local SGD: buffer ← momentum·buffer + g, fresh each round.
    """
    x, b, buffer = w.copy(), 1.0, np.zeros_like(w)  # b = 1 at each round's start
    u_prev = v_prev  # u_prev starts as v_prev
    used = []
    for k, given in enumerate(gradients):
        g = given(x) if callable(given) else np.asarray(given, np.float64)
        buffer = momentum * buffer + g
        used.append(b)
        before = x
        x = x - b * beta * buffer  # rate = b·β^0
        if adapt and k % steps_per_epoch != 0:  # from the second batch of each epoch, after the optimizer step
            u = x - before  # u = w_now − w_before
            gamma = min(1.1, 1.0 + 0.1 * inner(u, v_prev) / cohort_size + inner(u, u_prev))
            b = clip(gamma * b, (0.1, 10.0))
            u_prev = u  # remembered only where b was updated
    return x - w, np.array(used), b


def reference_round(
    variant: str,
    state: ReferenceState,
    gradients: Mapping[int, Sequence[Vector | Callable[[Vector], Vector]]],
    beta: float,
    steps_per_epoch: Mapping[int, int],
    momentum: float = 0.0,
) -> ReferenceRecord:
    """Round `state.round` of a reference variant; the cohort are the keys of `gradients`."""
    if variant not in REFERENCE_VARIANTS:
        raise ValueError(f"variant must be one of {REFERENCE_VARIANTS}, got {variant!r}")
    changes, multipliers, final_multipliers = {}, {}, {}
    for client, given in gradients.items():
        changes[client], multipliers[client], final_multipliers[client] = reference_client(
            state.w,
            given,
            beta,
            adapt=variant in ("CL", "FULL"),
            v_prev=state.v,
            cohort_size=len(gradients),
            steps_per_epoch=steps_per_epoch[client],
            momentum=momentum,
        )
    v = np.zeros_like(state.w)
    for change in changes.values():
        v = v + change / len(changes)  # uniform weights

    w, agg, last, m, s = state.w, state.agg, state.last, state.m, state.s
    if variant in ("FedAvg", "CL"):
        w = w + v
    elif variant == "G":
        if state.round >= 1:  # nothing adapted in round 0
            agg = clip(agg + inner(last, v), (-0.8, 4.0))  # agg += ⟨Δ^{t-1}, Δ^t⟩
        w = w + (1.0 + agg) * v  # α = 1 + agg
        last = v
    elif variant in ("GM", "FULL"):
        if state.round == 0:
            w = w + v
            last = v
        else:
            agg = clip(agg + inner(last, v), (-0.2, 4.0))  # last is the momentum vector
            w = w + (1.0 + agg) * v + 0.9 * agg * last
            last = v + 0.9 * last
    elif variant == "FedAdam":
        agg = clip(agg + inner(last, v), (-0.2, 4.0))
        x = 0.1 * (1.0 + agg) * v
        m = 0.9 * m + 0.1 * x
        s = 0.99 * s + 0.01 * m**2  # the square of m, not of x
        w = w + (m / 0.1) / np.sqrt(s / 0.01 + 0.0316)
        last = v

    after = ReferenceState(state.round + 1, w, agg, last, v, m, s)
    return ReferenceRecord(w, v, agg, changes, multipliers, final_multipliers, after)


def reference_run(
    variant: str,
    w0: Vector,
    gradients: Sequence[Mapping[int, Sequence[Vector | Callable[[Vector], Vector]]]],
    beta: float,
    *,
    steps_per_epoch: Mapping[int, int] | None = None,
    momentum: float = 0.0,
) -> list[ReferenceRecord]:
    """len(gradients) rounds of a reference variant.

    Args:
        variant: one of REFERENCE_VARIANTS; "FedAdam" is FedAdam+FedHyper, "FULL" CL on the clients, GM on the server.
        w0: w^0.
        gradients: `gradients[t][client][k]`, the gradient of each local step, an array or a function of the iterate.
        beta: β^0.
        steps_per_epoch: by client, ⌈n_m/B⌉; None: all of a client's steps are one epoch.
        momentum: of the local SGD; 0.5 in the authors' code.
    """
    state = reference_initial_state(w0)
    records = []
    for given in gradients:
        lengths = {client: len(steps) if steps_per_epoch is None else steps_per_epoch[client]
                   for client, steps in given.items()}  # fmt: skip
        records.append(reference_round(variant, state, given, beta, lengths, momentum))
        state = records[-1].state
    return records
