"""The method `retained_gain` in plain NumPy and float64, written from its description, not from the package.

One loop over rounds, one over clients, one over local steps; it shares no code with the package. Parameters are one
flat vector, a problem is a `fedhyper_numpy.Problem`, and `batches[t]` maps a client to the rows of its local steps.
"""

from typing import NamedTuple

import numpy as np


class Record(NamedTuple):
    """A round: what it used and found, and the parameters after it."""

    global_rate: float  # α after the round, which is the α^t of a round that counts
    local_rate: float  # β^t that clients used
    share: float  # ρ of the round; NaN where it measured
    target: float  # ρ* of the round; likewise
    taken_back: bool
    w: np.ndarray
    next_rate: float  # β^{t+1}
    ceiling: float  # C after the round


def target_share_of(predicted, descent, target_share, power):
    """ρ* of the averages of P and E."""
    coherence = predicted / descent if predicted > 0 and descent > 0 else 1.0
    return min(max(target_share * min(coherence, 5.0) ** -power, 0.02), 0.9)


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return a @ b / norms if norms > 0 else 0.0


def measure(problem, w, batches):
    """‖g‖² and ⟨g, H g⟩ of a client's first minibatch, by a finite difference."""
    gradient = problem.gradient(w, batches[0])
    step = 1e-3 * (1 + np.linalg.norm(w)) / np.linalg.norm(gradient)
    return gradient @ gradient, gradient @ (gradient - problem.gradient(w - step * gradient, batches[0])) / step


def train(problem, w, rate, batches):
    """A client's update Δ_m and its numbers A_m, P_m, E_m."""
    local, promised = w, 0.0
    for rows in batches:
        gradient = problem.gradient(local, rows)
        moved = local - rate * gradient
        promised += gradient @ (local - moved)
        local = moved
    first = batches[0]
    gain = problem.loss(w, first) - problem.loss(local, first)
    predicted = problem.gradient(w, first) @ (w - local)
    return w - local, np.array([gain, predicted, promised / len(batches)])


def run(
    problem,
    w,
    cohorts,
    batches,
    sizes,
    *,
    local_rate,
    start="measured",
    target_share=0.35,
    coherence_power=0.2,
    share_rate=2.0,
    global_hyper_rate=0.2,
    memory=0.6,
    growth=1.3,
    first_step=0.25,
    smallest_gain=0.05,
    ceiling_growth=1.03,
):
    """All rounds; `sizes[m]` weighs client m."""
    alpha, beta, ceiling = 1.0, local_rate, np.inf
    previous, slopes, found, measured, records = np.zeros_like(w), None, False, start == "given", []

    for cohort, drawn in zip(cohorts, batches, strict=True):
        weights = np.array([sizes[client] for client in cohort], np.float64)
        if not measured:
            norms, curvatures = zip(*(measure(problem, w, drawn[client]) for client in cohort), strict=True)
            norm, curvature = np.average(norms, weights=weights), np.average(curvatures, weights=weights)
            beta, measured = first_step * norm / abs(curvature), True
            if not (np.isfinite(beta) and beta > 0):
                beta = local_rate
            records.append(Record(alpha, 1e-20, 0.0, np.nan, False, w, beta, ceiling))
            continue

        used = beta
        with np.errstate(over="ignore", invalid="ignore"):
            trained = [train(problem, w, beta, drawn[client]) for client in cohort]
        finite = np.array([np.all(np.isfinite(update)) and np.all(np.isfinite(look)) for update, look in trained])
        failed = weights[~finite].sum() / weights.sum()
        if finite.any():
            present = [pair for pair, fine in zip(trained, finite, strict=True) if fine]
            update = np.average([update for update, _ in present], axis=0, weights=weights[finite])
            look = np.average([look for _, look in present], axis=0, weights=weights[finite])
        else:
            update, look = np.zeros_like(w), np.zeros(3)
        gain, predicted, descent = look
        new = look[1:] / used
        smooth = new if slopes is None else memory * slopes + (1 - memory) * new
        target = target_share_of(*smooth, target_share, coherence_power)
        share = gain / predicted if predicted > 0 else 0.0
        expected = used * smooth[0]
        bent = predicted - gain >= (1 - target / 6) * predicted
        little = gain <= smallest_gain * descent
        if bent or little or failed >= 0.5:
            beta = used * (0.5 if found else 0.1)
            ceiling, alpha, back = used / 2, max(alpha / 2, 1 / 3), True
        else:
            slopes, found = smooth, found or share > target
            fastest = growth**2 if share > 0.85 else growth
            surplus = (gain - target * predicted) / expected if expected > 0 else 0.0
            beta = used * min(max(np.exp(share_rate * surplus), 0.5), fastest)
            ceiling *= ceiling_growth
            beta = min(beta, ceiling)
            alpha = min(max(alpha * np.exp(global_hyper_rate * cosine(update, previous)), 1 / 3), 3.0)
            w, previous, back = w - alpha * update, update, False
        records.append(Record(alpha, used, share, target, back, w, beta, ceiling))
    return records
