"""FedHyper in plain NumPy and float64: the oracle against which the JAX package is tested.

Source: Wang, Wang, Li, "FedHyper: A Universal and Robust Learning Rate Scheduler for Federated Learning with
Hypergradient Descent", ICLR 2024, arXiv 2310.03156, equations 15 to 20, with the conventions of shared/SPEC.md
sections 1 and 2. It is written from those equations, not from the package, and shares no code with it: one loop over
rounds, one over clients, one over local steps. The optimizers are transcribed from optax 0.2.8.

Parameters are one flat float64 vector. Everything called Δ points in the gradient direction (old minus new).

Two conventions on indices:

* `batches[t]` is either a mapping from client id to that client's list of row-index arrays, or a sequence of such lists
  in the order of `cohorts[t]` (as many as the cohort has clients).
* `num_examples` is indexed by client id (a mapping, or an array over the whole population).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Vector = np.ndarray
Gradient = Callable[[Vector, np.ndarray], Vector]
ClientBatches = Sequence[np.ndarray]
RoundBatches = Mapping[int, ClientBatches] | Sequence[ClientBatches]
Schedule = Callable[[int], float]

SCHEDULERS = frozenset({"G", "SL", "CL"})
SERVER_OPTIMIZERS = ("sgd", "momentum", "adam", "adagrad", "yogi")
CLIENT_OPTIMIZERS = ("sgd", "momentum")


# --------------------------------------------------------------------------------------------------------------------
# Models with hand-derived gradients
# --------------------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A model on a pool of examples.

    `gradient(w, rows)` and `loss(w, rows)` are means over the examples `rows` of the pool. `size` is the number of
    parameters; `shapes` the shapes of the arrays which, each in C order, are concatenated to the flat vector.
    """

    gradient: Gradient
    loss: Callable[[Vector, np.ndarray], float]
    size: int
    shapes: tuple[tuple[int, ...], ...]


def unpack(w: Vector, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """Cut the flat vector into arrays of the given shapes, each in C order."""
    needed = sum(int(np.prod(shape)) for shape in shapes)
    if w.shape != (needed,):
        raise ValueError(f"the vector has shape {w.shape}, the shapes {tuple(shapes)} need {needed} entries")
    arrays = []
    start = 0
    for shape in shapes:
        stop = start + int(np.prod(shape))
        arrays.append(w[start:stop].reshape(shape))
        start = stop
    return arrays


def pack(arrays: Sequence[np.ndarray]) -> Vector:
    """The inverse of `unpack`."""
    return np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of log Σ_c exp(z_c) − z_label."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_normalizer = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(log_normalizer - shifted[np.arange(len(labels)), labels]))


def _cross_entropy_gradient(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Gradient of the mean cross-entropy with respect to the logits: (softmax(z) − onehot) / number of examples."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    probabilities[np.arange(len(labels)), labels] -= 1.0
    return probabilities / len(labels)


def softmax_regression(x: np.ndarray, y: np.ndarray, num_classes: int) -> Problem:
    """Multinomial logistic regression with the logits x W + b and the mean cross-entropy.

    Flat order: W of shape (features, classes) in C order, then b of shape (classes,).
    """
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    y = np.asarray(y, np.int64)
    shapes = ((x.shape[1], num_classes), (num_classes,))

    def loss(w: Vector, rows: np.ndarray) -> float:
        weights, bias = unpack(w, shapes)
        return _cross_entropy(x[rows] @ weights + bias, y[rows])

    def gradient(w: Vector, rows: np.ndarray) -> Vector:
        weights, bias = unpack(w, shapes)
        d_logits = _cross_entropy_gradient(x[rows] @ weights + bias, y[rows])
        return pack([x[rows].T @ d_logits, d_logits.sum(axis=0)])

    return Problem(gradient, loss, x.shape[1] * num_classes + num_classes, shapes)


def mlp(x: np.ndarray, y: np.ndarray, hidden: int, num_classes: int, activation: str) -> Problem:
    """One hidden layer: the logits are act(x W1 + b1) W2 + b2, the loss is the mean cross-entropy.

    `activation` is "tanh" or "relu" (with relu'(0) = 0). Flat order: W1 of shape (features, hidden) in C order, then b1
    of shape (hidden,), then W2 of shape (hidden, classes) in C order, then b2 of shape (classes,).
    """
    if activation not in ("tanh", "relu"):
        raise ValueError(f"activation must be 'tanh' or 'relu', got {activation!r}")
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    y = np.asarray(y, np.int64)
    shapes = ((x.shape[1], hidden), (hidden,), (hidden, num_classes), (num_classes,))

    def activate(z: np.ndarray) -> np.ndarray:
        return np.tanh(z) if activation == "tanh" else np.maximum(z, 0.0)

    def loss(w: Vector, rows: np.ndarray) -> float:
        w1, b1, w2, b2 = unpack(w, shapes)
        return _cross_entropy(activate(x[rows] @ w1 + b1) @ w2 + b2, y[rows])

    def gradient(w: Vector, rows: np.ndarray) -> Vector:
        w1, b1, w2, b2 = unpack(w, shapes)
        z = x[rows] @ w1 + b1
        h = activate(z)
        d_logits = _cross_entropy_gradient(h @ w2 + b2, y[rows])
        d_h = d_logits @ w2.T
        d_z = d_h * (1.0 - h**2) if activation == "tanh" else d_h * (z > 0.0)
        return pack([x[rows].T @ d_z, d_z.sum(axis=0), h.T @ d_logits, d_logits.sum(axis=0)])

    return Problem(gradient, loss, sum(int(np.prod(shape)) for shape in shapes), shapes)


# --------------------------------------------------------------------------------------------------------------------
# Optimizers, as optax 0.2.8 defines them. The update is to be added: w ← w + rate · update.
# --------------------------------------------------------------------------------------------------------------------


def optimizer_init(name: str, size: int) -> dict[str, Any]:
    """State of a fresh optimizer: {} | {trace} | {count, mu, nu} | {sum_of_squares} | {count, mu, nu}."""
    if name == "sgd":
        return {}
    if name == "momentum":
        return {"trace": np.zeros(size)}
    if name == "adam":
        return {"count": 0, "mu": np.zeros(size), "nu": np.zeros(size)}
    if name == "adagrad":
        return {"sum_of_squares": np.full(size, 0.1)}  # initial_accumulator_value = 0.1
    if name == "yogi":
        # initial_accumulator_value = 1e-6, for both moments
        return {"count": 0, "mu": np.full(size, 1e-6), "nu": np.full(size, 1e-6)}
    raise ValueError(f"unknown optimizer {name!r}; known are {SERVER_OPTIMIZERS}")


def optimizer_update(name: str, g: Vector, state: Mapping[str, Any]) -> tuple[Vector, dict[str, Any]]:
    """One step of the optimizer fed with g: the update, own rate and sign included, and the new state."""
    if name == "sgd":  # optax.sgd(1.0)
        return -1.0 * g, {}

    if name == "momentum":  # optax.sgd(1.0, momentum=0.9): trace ← g + 0.9 trace; not an exponential average
        trace = g + 0.9 * state["trace"]
        return -1.0 * trace, {"trace": trace}

    if name == "adam":  # optax.adam(1e-2): b1 = 0.9, b2 = 0.999, eps = 1e-8 outside the root
        count = state["count"] + 1
        mu = (1.0 - 0.9) * g + 0.9 * state["mu"]
        nu = (1.0 - 0.999) * g**2 + 0.999 * state["nu"]
        mu_hat = mu / (1.0 - 0.9**count)
        nu_hat = nu / (1.0 - 0.999**count)
        return -1e-2 * mu_hat / (np.sqrt(nu_hat) + 1e-8), {"count": count, "mu": mu, "nu": nu}

    if name == "adagrad":  # optax.adagrad(1e-2): eps = 1e-7 inside the root
        sum_of_squares = state["sum_of_squares"] + g**2
        return -1e-2 * g / np.sqrt(sum_of_squares + 1e-7), {"sum_of_squares": sum_of_squares}

    if name == "yogi":  # optax.yogi(1e-2): b1 = 0.9, b2 = 0.999, eps = 1e-3 outside the root, bias-corrected like Adam
        count = state["count"] + 1
        mu = (1.0 - 0.9) * g + 0.9 * state["mu"]
        nu = state["nu"] - (1.0 - 0.999) * np.sign(state["nu"] - g**2) * g**2
        mu_hat = mu / (1.0 - 0.9**count)
        nu_hat = nu / (1.0 - 0.999**count)
        return -1e-2 * mu_hat / (np.sqrt(nu_hat) + 1e-3), {"count": count, "mu": mu, "nu": nu}

    raise ValueError(f"unknown optimizer {name!r}; known are {SERVER_OPTIMIZERS}")


# --------------------------------------------------------------------------------------------------------------------
# FedHyper
# --------------------------------------------------------------------------------------------------------------------


class ServerState(NamedTuple):
    """State before the next round.

    Attributes:
        w: w^t, the global parameters at the start of round t.
        alpha: α^{t-1}, the global rate last used (α^0 before round 0).
        beta: β^t, the local rate the server broadcasts in round t (overridden by `beta_schedule`).
        previous_pseudo_gradient: Δ^{t-1}, zero before round 0.
        previous_direction: u^{t-1} = −(server optimizer's update), not multiplied by α; zero before round 0.
        optimizer: the server optimizer's state, see `optimizer_init`.
        round: t.
    """

    w: Vector
    alpha: float
    beta: float
    previous_pseudo_gradient: Vector
    previous_direction: Vector
    optimizer: dict[str, Any]
    round: int


class ClientResult(NamedTuple):
    """Results of one client's local training.

    Attributes:
        update: Δ_m^t = w^t − w_m^{t,K}.
        final_rate: β_m^{t,K−1}.
        rate_updates: how often the rate was updated: K − 1 with CL unless a product was not finite, else 0.
        rate_clipped: how many of those had a value outside the bounds before clipping.
        nonfinite_products: products that were not finite, so that the rate stayed as it was.
    """

    update: Vector
    final_rate: float
    rate_updates: int
    rate_clipped: int
    nonfinite_products: int


class RoundRecord(NamedTuple):
    """Observations of round t, and the state after it. Arrays over clients follow the order of the cohort.

    Attributes:
        round: t.
        w: w^{t+1}.
        alpha: α^t, as used.
        beta: β^t, as broadcast.
        inner_product: the product that served G and SL; 0 if nobody survived.
        pseudo_gradient: Δ^t; zero if nobody survived.
        direction: u^t = −(server optimizer's update); zero if nobody survived.
        weights: p_m, renormalised over the survivors; 0 for clients left out. Shape (clients,).
        survived: False for clients left out because Δ_m is not finite. Shape (clients,).
        client_updates: Δ_m^t of every client, left-out ones included. Shape (clients, parameters).
        client_final_rates: β_m^{t,K_m−1} of every client, left-out ones included. Shape (clients,).
        alpha_updates, alpha_clipped: G's rate updates (0 or 1), and those outside the bounds before clipping.
        beta_updates, beta_clipped: the same for β: SL's (0 or 1) plus those of CL over the survivors.
        client_rate_updates, client_rate_clipped: CL's counts of every client, left-out ones included. Shape (clients,).
        nonfinite_products: 1 if `inner_product` is not finite, plus CL's products that are not, over the survivors.
        state: the state after the round.
    """

    round: int
    w: Vector
    alpha: float
    beta: float
    inner_product: float
    pseudo_gradient: Vector
    direction: Vector
    weights: np.ndarray
    survived: np.ndarray
    client_updates: np.ndarray
    client_final_rates: np.ndarray
    alpha_updates: int
    alpha_clipped: int
    beta_updates: int
    beta_clipped: int
    client_rate_updates: np.ndarray
    client_rate_clipped: np.ndarray
    nonfinite_products: int
    state: ServerState


def relative_bounds(beta: float, factor: float = 10.0) -> tuple[float, float]:
    """(β^0/γ_β, β^0·γ_β), the default bounds of the local rate; fixed by the run's β^0."""
    return beta / factor, beta * factor


def initial_state(w0: Vector, *, alpha: float = 1.0, beta: float, server_optimizer: str = "sgd") -> ServerState:
    """The state before round 0: Δ^{-1} = 0, u^{-1} = 0, a fresh server optimizer."""
    w0 = np.array(w0, np.float64)
    if w0.ndim != 1:
        raise ValueError(f"w0 must be a flat vector, got shape {w0.shape}")
    return ServerState(
        w=w0,
        alpha=float(alpha),
        beta=float(beta),
        previous_pseudo_gradient=np.zeros_like(w0),
        previous_direction=np.zeros_like(w0),
        optimizer=optimizer_init(server_optimizer, w0.size),
        round=0,
    )


def _inner(a: Vector, b: Vector) -> float:
    """⟨a, b⟩: the sum of the elementwise product."""
    return float(np.sum(a * b))


def _update_rate(rate: float, kappa: float, product: float, bounds: tuple[float, float]) -> tuple[float, int, int]:
    """clip(rate + κ·product, bounds): the new rate, whether it was updated (0 or 1), whether it was clipped (0 or 1).

    A product that is not finite leaves the rate as it is.
    """
    if not np.isfinite(product):
        return rate, 0, 0
    lower, upper = bounds
    value = rate + kappa * product
    if value < lower:
        return lower, 1, 1
    if value > upper:
        return upper, 1, 1
    return value, 1, 0


def train_client(
    gradient: Gradient,
    w: Vector,
    beta: float,
    client_batches: ClientBatches,
    previous_pseudo_gradient: Vector,
    *,
    adapt: bool,
    kappa: float,
    bounds: tuple[float, float],
    optimizer: str = "sgd",
    global_weight: float | None = None,
) -> ClientResult:
    """Local training of one client, with FedHyper-CL (eq. 19-20) if `adapt`."""
    num_steps = len(client_batches)  # K
    if num_steps == 0 or any(len(rows) == 0 for rows in client_batches):
        raise ValueError("a client needs at least one local step, and each step at least one example")
    share = 1.0 / num_steps if global_weight is None else global_weight

    local_w = w.copy()
    rate = beta  # k = 0: β_m^{t,0} = β^t
    optimizer_state = optimizer_init(optimizer, w.size)  # afresh each round
    previous_g = np.zeros_like(w)
    rate_updates = rate_clipped = nonfinite_products = 0

    for k in range(num_steps):
        # g_m^{t,k}: minibatch gradient at w_m^{t,k}
        g = gradient(local_w, client_batches[k])
        if adapt and k >= 1:
            # eq. 19-20: β_m^{t,k} = clip(
            #     β_m^{t,k-1} + κ (⟨g_m^{t,k}, g_m^{t,k-1}⟩ + (1/K) ⟨g_m^{t,k}, Δ^{t-1}⟩), β_lo, β_hi)
            product = _inner(g, previous_g) + share * _inner(g, previous_pseudo_gradient)
            rate, updated, clipped = _update_rate(rate, kappa, product, bounds)
            rate_updates += updated
            rate_clipped += clipped
            nonfinite_products += 1 - updated
        # eq. 19-20: w_m^{t,k+1} = w_m^{t,k} − β_m^{t,k} g_m^{t,k}, or in general w ← w + β·update
        update, optimizer_state = optimizer_update(optimizer, g, optimizer_state)
        local_w = local_w + rate * update
        previous_g = g

    # Δ_m^t = w^t − w_m^{t,K}
    return ClientResult(w - local_w, rate, rate_updates, rate_clipped, nonfinite_products)


def _check(
    schedulers: frozenset[str],
    weighting: str,
    inner_product: str,
    server_optimizer: str,
    client_optimizer: str,
    alpha_schedule: Schedule | None,
    beta_schedule: Schedule | None,
) -> None:
    if not schedulers <= SCHEDULERS:
        raise ValueError(f"schedulers must be a subset of {sorted(SCHEDULERS)}, got {sorted(schedulers)}")
    if weighting not in ("examples", "uniform"):
        raise ValueError(f"weighting must be 'examples' or 'uniform', got {weighting!r}")
    if inner_product not in ("pseudo_gradient", "applied"):
        raise ValueError(f"inner_product must be 'pseudo_gradient' or 'applied', got {inner_product!r}")
    if server_optimizer not in SERVER_OPTIMIZERS:
        raise ValueError(f"server_optimizer must be one of {SERVER_OPTIMIZERS}, got {server_optimizer!r}")
    if client_optimizer not in CLIENT_OPTIMIZERS:
        raise ValueError(f"client_optimizer must be one of {CLIENT_OPTIMIZERS}, got {client_optimizer!r}")
    if alpha_schedule is not None and "G" in schedulers:
        raise ValueError("two rules for the global rate: alpha_schedule and the scheduler G")
    if beta_schedule is not None and "SL" in schedulers:
        raise ValueError("two rules for the server's local rate: beta_schedule and the scheduler SL")


def round_from_state(
    gradient: Gradient,
    state: ServerState,
    cohort: Sequence[int],
    batches: RoundBatches,
    num_examples: Mapping[int, float] | Sequence[float] | np.ndarray,
    *,
    local_bounds: tuple[float, float],
    schedulers: frozenset[str] = frozenset(),
    kappa_global: float = 1.0,
    kappa_server_local: float = 1.0,
    kappa_client: float = 1.0,
    global_bounds: tuple[float, float] = (1 / 3, 3.0),
    weighting: str = "examples",
    server_optimizer: str = "sgd",
    client_optimizer: str = "sgd",
    inner_product: str = "pseudo_gradient",
    alpha_schedule: Schedule | None = None,
    beta_schedule: Schedule | None = None,
    global_weight: float | None = None,
) -> RoundRecord:
    """Round `state.round` from the given state; the state after it is `record.state`.

    `local_bounds` must be given: relative bounds are fixed by the run's β^0, which is not part of the state.
    """
    schedulers = frozenset(schedulers)
    _check(schedulers, weighting, inner_product, server_optimizer, client_optimizer, alpha_schedule, beta_schedule)
    if not isinstance(batches, Mapping) and len(batches) != len(cohort):
        raise ValueError(f"batches for {len(batches)} clients, but the cohort has {len(cohort)}")

    # A run may diverge on purpose: overflow and inf − inf are results here, not accidents.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        t = state.round
        beta = state.beta if beta_schedule is None else float(beta_schedule(t))

        # ---- clients ------------------------------------------------------------------------------------------------
        results = []
        for position, client in enumerate(cohort):
            client_batches = batches[client] if isinstance(batches, Mapping) else batches[position]
            result = train_client(
                gradient,
                state.w,
                beta,
                client_batches,
                state.previous_pseudo_gradient,
                adapt="CL" in schedulers,
                kappa=kappa_client,
                bounds=local_bounds,
                optimizer=client_optimizer,
                global_weight=global_weight,
            )
            results.append(result)
        survived = np.array([bool(np.all(np.isfinite(result.update))) for result in results], bool)

        # ---- p_m, renormalised over the clients not left out --------------------------------------------------------
        raw_weights = np.zeros(len(results))
        for position, client in enumerate(cohort):
            if survived[position]:
                raw_weights[position] = float(num_examples[client]) if weighting == "examples" else 1.0
        weights = raw_weights / raw_weights.sum() if survived.any() else raw_weights

        # ---- Δ^t = Σ p_m Δ_m^t --------------------------------------------------------------------------------------
        pseudo_gradient = np.zeros_like(state.w)
        for position, result in enumerate(results):
            if survived[position]:
                pseudo_gradient = pseudo_gradient + weights[position] * result.update

        # ---- server -------------------------------------------------------------------------------------------------
        product = 0.0
        alpha = state.alpha if alpha_schedule is None else float(alpha_schedule(t))
        next_beta = beta
        alpha_updates = alpha_clipped = sl_updates = sl_clipped = 0
        nonfinite_products = 0
        direction = np.zeros_like(state.w)

        if survived.any():
            # ⟨Δ^t, Δ^{t-1}⟩, or ⟨Δ^t, u^{t-1}⟩ if applied; one product serves G and SL
            if inner_product == "pseudo_gradient":
                product = _inner(pseudo_gradient, state.previous_pseudo_gradient)
            else:
                product = _inner(pseudo_gradient, state.previous_direction)
            nonfinite_products = 0 if np.isfinite(product) else 1

            if "G" in schedulers:
                # eq. 15-16: α^t = clip(α^{t-1} + κ ⟨Δ^t, Δ^{t-1}⟩, 1/γ_α, γ_α): first updated, then used
                alpha, alpha_updates, alpha_clipped = _update_rate(alpha, kappa_global, product, global_bounds)
            if "SL" in schedulers:
                # eq. 17-18: β^{t+1} = clip(β^t + κ ⟨Δ^t, Δ^{t-1}⟩, β_lo, β_hi), for the clients of round t + 1
                next_beta, sl_updates, sl_clipped = _update_rate(beta, kappa_server_local, product, local_bounds)

            # eq. 15-16: w^{t+1} = w^t − α^t Δ^t, or in general w^{t+1} = w^t − α^t u^t with u^t = −update
            update, optimizer_state = optimizer_update(server_optimizer, pseudo_gradient, state.optimizer)
            direction = -update
            next_state = ServerState(
                w=state.w + alpha * update,
                alpha=alpha,
                beta=next_beta,
                previous_pseudo_gradient=pseudo_gradient,
                previous_direction=direction,
                optimizer=optimizer_state,
                round=t + 1,
            )
        else:
            # a round without survivors changes nothing but the counter
            next_state = state._replace(round=t + 1)

    cl_updates = np.array([result.rate_updates for result in results], int)
    cl_clipped = np.array([result.rate_clipped for result in results], int)
    cl_nonfinite = np.array([result.nonfinite_products for result in results], int)
    return RoundRecord(
        round=t,
        w=next_state.w,
        alpha=alpha,
        beta=beta,
        inner_product=product,
        pseudo_gradient=pseudo_gradient,
        direction=direction,
        weights=weights,
        survived=survived,
        client_updates=np.stack([result.update for result in results]),
        client_final_rates=np.array([result.final_rate for result in results]),
        alpha_updates=alpha_updates,
        alpha_clipped=alpha_clipped,
        beta_updates=sl_updates + int(cl_updates[survived].sum()),
        beta_clipped=sl_clipped + int(cl_clipped[survived].sum()),
        client_rate_updates=cl_updates,
        client_rate_clipped=cl_clipped,
        nonfinite_products=nonfinite_products + int(cl_nonfinite[survived].sum()),
        state=next_state,
    )


def run(
    gradient: Gradient,
    w0: Vector,
    cohorts: Sequence[Sequence[int]],
    batches: Sequence[RoundBatches],
    num_examples: Mapping[int, float] | Sequence[float] | np.ndarray,
    *,
    alpha: float = 1.0,
    beta: float,
    schedulers: frozenset[str] = frozenset(),
    kappa_global: float = 1.0,
    kappa_server_local: float = 1.0,
    kappa_client: float = 1.0,
    global_bounds: tuple[float, float] = (1 / 3, 3.0),
    local_bounds: tuple[float, float] | None = None,
    weighting: str = "examples",
    server_optimizer: str = "sgd",
    client_optimizer: str = "sgd",
    inner_product: str = "pseudo_gradient",
    alpha_schedule: Schedule | None = None,
    beta_schedule: Schedule | None = None,
    global_weight: float | None = None,
) -> list[RoundRecord]:
    """Run len(cohorts) rounds from w0 and return one record per round.

    Args:
        gradient: `gradient(w, rows)`, the mean gradient over the pool's examples `rows`.
        w0: the initial parameters.
        cohorts: `cohorts[t]` lists the client ids of round t.
        batches: `batches[t]` gives each client's local steps, see the module's docstring. The k-th array holds only the
            real examples of the k-th step, so that K_m is the number of arrays.
        num_examples: n_m by client id.
        alpha: α^0.
        beta: β^0; it fixes the relative bounds.
        schedulers: a subset of {"G", "SL", "CL"}.
        kappa_global: κ of G.
        kappa_server_local: κ of SL.
        kappa_client: κ of CL.
        global_bounds: the bounds of α.
        local_bounds: the bounds of β, for SL and CL alike; None for (β^0/10, β^0·10).
        weighting: p_m proportional to n_m ("examples") or equal ("uniform").
        server_optimizer: "sgd", "momentum", "adam", "adagrad" or "yogi", see `optimizer_update`.
        client_optimizer: "sgd" or "momentum".
        inner_product: "pseudo_gradient" for ⟨Δ^t, Δ^{t-1}⟩, "applied" for ⟨Δ^t, u^{t-1}⟩.
        alpha_schedule: α^t as a function of t, in place of `alpha`; refused with G.
        beta_schedule: β^t as a function of t, in place of `beta` (which still fixes the bounds); refused with SL.
        global_weight: the factor of CL's global term; None for 1/K_m.
    """
    if local_bounds is None:
        local_bounds = relative_bounds(beta)
    for name, rate, (lower, upper) in (("alpha", alpha, global_bounds), ("beta", beta, local_bounds)):
        if not (0.0 <= lower <= rate <= upper and 0.0 < rate < np.inf):
            raise ValueError(f"{name} = {rate} must be finite, positive and within its bounds ({lower}, {upper})")
    if len(batches) != len(cohorts):
        raise ValueError(f"batches for {len(batches)} rounds, cohorts for {len(cohorts)}")

    state = initial_state(w0, alpha=alpha, beta=beta, server_optimizer=server_optimizer)
    records = []
    for cohort, round_batches in zip(cohorts, batches, strict=True):
        record = round_from_state(
            gradient,
            state,
            cohort,
            round_batches,
            num_examples,
            local_bounds=local_bounds,
            schedulers=schedulers,
            kappa_global=kappa_global,
            kappa_server_local=kappa_server_local,
            kappa_client=kappa_client,
            global_bounds=global_bounds,
            weighting=weighting,
            server_optimizer=server_optimizer,
            client_optimizer=client_optimizer,
            inner_product=inner_product,
            alpha_schedule=alpha_schedule,
            beta_schedule=beta_schedule,
            global_weight=global_weight,
        )
        records.append(record)
        state = record.state
    return records
