"""Tests of the oracle itself, by closed forms and numbers worked out by hand."""

import inspect
import types

import numpy as np
import pytest

from tests.reference import baselines_numpy as oracle
from tests.reference import fedhyper_numpy as fedhyper
from tests.reference.baselines_numpy import METHODS, reference_run, run
from tests.reference.hand_traces import HAND_TRACES


def linear(table):
    """F_r(w) = ⟨table[r], w⟩: gradients given in advance."""
    table = np.asarray(table, np.float64)
    return (lambda w, rows: table[rows].mean(axis=0)), (lambda w, rows: float(np.mean(table[rows] @ w)))


def quadratic(curvature, centre):
    """F_r(w) = (a_r/2) ‖w − b_r‖²."""
    a, b = np.asarray(curvature, np.float64), np.asarray(centre, np.float64)

    def gradient(w, rows):
        return np.mean([a[r] * (w - b[r]) for r in rows], axis=0)

    def loss(w, rows):
        return float(np.mean([0.5 * a[r] * np.sum((w - b[r]) ** 2) for r in rows]))

    return gradient, loss


def steps(row, count):
    """`count` steps on the single example `row`."""
    return [np.array([row])] * count


def close(a, b, rtol=1e-12, atol=1e-14):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def one_client(table_or_problem, rounds, count, *, size=2, w0=None, **settings):
    """A single client, all steps on row 0, or on row t in round t if there are that many rows."""
    gradient, loss = table_or_problem
    w0 = np.zeros(size) if w0 is None else np.asarray(w0, np.float64)
    return run(gradient, loss, w0, [[0]] * rounds, [{0: steps(0, count)}] * rounds, {0: 1}, **settings)


def sequence(table, **settings):
    """One client, one step with the gradient table[t] in round t and β = 1 unless given: Δ^t = β table[t]."""
    gradient, loss = linear(table)
    batches = [{0: steps(t, 1)} for t in range(len(table))]
    settings = {"beta": 1.0, **settings}
    return run(gradient, loss, np.zeros(len(table[0])), [[0]] * len(table), batches, {0: 1}, **settings)


# ---- FedAvg and the server optimizers ------------------------------------------------------------------------------


def test_fedavg_weights_ragged_steps_and_partial_participation():
    gradient, loss = linear([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    batches = {0: steps(0, 3), 2: steps(2, 1)}
    n = {0: 1, 1: 5, 2: 3}
    record = run(gradient, loss, np.zeros(2), [[0, 2]], [batches], n, beta=0.5, alpha=2.0)[0]
    close(record.updates[0], [1.5, 0.0])
    close(record.updates[2], [1.0, 1.0])
    close(record.pseudo_gradient, [0.25 * 1.5 + 0.75, 0.75])
    close(record.w, [-2.25, -1.5])
    record = run(gradient, loss, np.zeros(2), [[0, 2]], [batches], n, beta=0.5, weighting="uniform")[0]
    close(record.pseudo_gradient, [1.25, 0.5])


def test_client_momentum():
    record = one_client(linear([[1.0, -2.0]]), 2, 3, beta=0.1, client_optimizer="momentum")[1]
    # displacement 0.1 (1 + 1.9 + 2.71) = 0.561, the same in both rounds: fresh traces
    close(record.updates[0], 0.561 * np.array([1.0, -2.0]))


def test_fedavgm_closed_form():
    # Δ = d each round: m_t = 10 (1 − 0.9^{t+1}) d
    d = np.array([3.0, -1.0])
    records = sequence([d] * 6, method="fedavgm", alpha=0.5)
    expected = np.zeros(2)
    for t, record in enumerate(records):
        expected = expected - 0.5 * 10 * (1 - 0.9 ** (t + 1)) * d
        close(record.w, expected)


def test_fedadagrad_closed_form():
    # v_t = (t+1) d²: u = d / (√(t+1) |d| + τ)
    d = np.array([3.0, -1.0])
    for t, record in enumerate(sequence([d] * 5, method="fedadagrad", tau=0.1)):
        close(record.direction, d / (np.sqrt(t + 1) * np.abs(d) + 0.1))


def test_fedadam_closed_form_with_and_without_correction():
    # m_t = (1 − b1^{t+1}) d, v_t = (1 − b2^{t+1}) d²
    d = np.array([3.0, -1.0])
    kwargs = {"b1": 0.8, "b2": 0.9, "tau": 0.1}
    for method in ("fedadam", "fedadam_corrected"):
        for t, record in enumerate(sequence([d] * 5, method=method, alpha=0.3, **kwargs)):
            e1, e2 = 1 - 0.8 ** (t + 1), 1 - 0.9 ** (t + 1)
            expected = e1 * d / (np.sqrt(e2) * np.abs(d) + 0.1)
            if method == "fedadam_corrected":
                expected = np.sqrt(e2) * d / (np.sqrt(e2) * np.abs(d) + 0.1)
            close(record.direction, expected)
            close(record.alpha, 0.3)
    first = sequence([d], method="fedadam_corrected", correction_offset=2, **kwargs)[0].direction
    close(first, np.sqrt(1 - 0.81) / (1 - 0.64) * 0.2 * d / (np.sqrt(0.1) * np.abs(d) + 0.1))


def test_fedyogi_by_hand():
    # b2 = 1/2. Δ² = 4, 4, 4, 1: v = 2 (sign −), 4 (sign −), 4 (sign 0), 4 − 1/2 = 3.5 (sign +)
    records = sequence([[2.0], [-2.0], [2.0], [1.0]], method="fedyogi", b1=0.0, b2=0.5, tau=1.0)
    close([r.state.server["v"][0] for r in records], [2.0, 4.0, 4.0, 3.5])
    close(records[3].direction, [1.0 / (np.sqrt(3.5) + 1.0)])
    # Adam would have v = 2, 3, 3.5, 2.25
    records = sequence([[2.0], [-2.0], [2.0], [1.0]], method="fedadam", b1=0.0, b2=0.5, tau=1.0)
    close([r.state.server["v"][0] for r in records], [2.0, 3.0, 3.5, 2.25])


# ---- rules for the global rate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clients", [1, 2, 5, 8])
def test_fedexp_orthogonal_updates(clients):
    gradient, loss = linear(2.0 * np.eye(clients))
    batches = {m: steps(m, 1) for m in range(clients)}
    record = run(gradient, loss, np.zeros(clients), [range(clients)], [batches], [1] * clients, method="fedexp",
                 fedexp_eps=0.0, beta=1.0)[0]  # fmt: skip
    close(record.alpha, max(1.0, clients / 2))
    close(record.w, -record.alpha * 2.0 / clients * np.ones(clients))
    close(record.evaluation, record.w / 2)


def test_fedexp_weights_and_epsilon_by_hand():
    # p = 1/4, 3/4; Δ_0 = (4, 0), Δ_1 = (0, 2): Σ p‖Δ‖² = 4 + 3 = 7, Δ = (1, 1.5), ‖Δ‖² = 3.25; ε does not grow with S
    gradient, loss = linear(np.diag([4.0, 2.0]))

    def play(eps, **more):
        batches = [{0: steps(0, 1), 1: steps(1, 1)}] * 2
        return run(gradient, loss, np.zeros(2), [[0, 1]] * 2, batches, {0: 1, 1: 3}, method="fedexp", beta=1.0,
                   fedexp_eps=eps, **more)  # fmt: skip

    close(play(0.0)[0].alpha, 7 / 6.5)
    close(play(0.125)[0].alpha, 7 / 6.75)
    assert play(0.5)[0].alpha == 1.0  # 7 / 7.5
    close(play(0.2, fedexp_eps_decay=0.5)[1].alpha, 7 / 6.7)


def test_g_by_hand_with_server_momentum():
    # products: 0, 1·2 + 0·1 = 2, 2·(−3) + 1·0 = −6; α = 1, 1 + 0.5·2 = 2, 2 − 3 = −1 → 0.2
    table = [[1.0, 0.0], [2.0, 1.0], [-3.0, 0.0]]
    for server in ("sgd", "fedavgm"):
        records = sequence(table, method="fedhyper_g", kappa=0.5, global_bounds=(0.2, 3.0), server=server)
        close([r.alpha for r in records], [1.0, 2.0, 0.2])
    close(records[1].direction, [2.9, 1.0])
    close(sequence(table, method="fedhyper_g", kappa=5.0)[1].alpha, 3.0)


def test_g_is_hypergradient_descent_on_a_quadratic():
    # SPEC.md section 5, fact 1. F = ½‖w‖², K = 1: Δ^t = β w^t; α^t = α^{t-1} + κ β² ⟨w^t, w^{t-1}⟩
    w, previous, alpha = np.array([1.0, -2.0]), None, 1.0
    problem = quadratic([1.0], [[0.0, 0.0]])
    for record in one_client(problem, 20, 1, w0=w, method="fedhyper_g", kappa=0.1, beta=0.3):
        if previous is not None:
            alpha = min(max(alpha + 0.1 * 0.09 * float(w @ previous), 1 / 3), 3.0)
        previous, w = w, (1 - alpha * 0.3) * w
        close(record.w, w)
        close(record.alpha, alpha)


# ---- rules for the local rate on the server ------------------------------------------------------------------------


def test_fathom_by_hand():
    # Δ: (1,0), (3,4), (0,−2). sm_0 = (.5,0); cos = 3/5; sm_1 = (.25,0) + (1.5,2) = (1.75,2); cos = −2/√(1.75²+4)
    records = sequence([[1.0, 0.0], [3.0, 4.0], [0.0, -2.0]], method="fathom", alpha=1.0, beta=1.0)
    # Δ is scaled by β, which leaves directions but not sm alone: undo it by hand
    b1 = 1.0
    b2 = np.exp(0.01 * 0.6)
    sm = 0.5 * np.array([0.5, 0.0]) + 0.5 * np.array([3.0, 4.0]) * b1
    b3 = b2 * np.exp(0.01 * -sm[1] / np.sqrt(sm @ sm))
    close([r.beta for r in records] + [records[-1].state.beta], [1.0, b1, b2, b3])
    close(records[1].state.server["sm"], sm)
    assert b2 > 1.0 > b3 / b2
    capped = sequence([[1.0]] * 4, method="fathom", fathom_upper=1.015)
    close([r.beta for r in capped] + [capped[-1].state.beta], [1.0, 1.0, np.exp(0.01), 1.015, 1.015])


def test_sl_by_hand():
    # β 0.5 → Δ = 0.5·2 = 1, next Δ = 1, product 1 → β = 0.5 + 0.25; next Δ = 1.5, product 1.5 → 0.75 + 0.375
    records = sequence([[2.0]] * 4, method="fedhyper_sl", kappa_local=0.25, beta=0.5)
    close([r.beta for r in records], [0.5, 0.5, 0.75, 1.125])
    close(sequence([[2.0], [-20.0], [2.0]], method="fedhyper_sl", beta=0.5)[2].beta, 0.05)


# ---- client-side rules ---------------------------------------------------------------------------------------------


def test_prox_contracts_to_its_own_minimiser():
    # F = (a/2)(w − b)²: x_k − x* = (1 − β(a+μ))^k (w − x*), x* = (ab + μw)/(a + μ)
    a, b, mu, beta, w = 2.0, 3.0, 0.5, 0.1, 1.0
    record = one_client(quadratic([a], [[b]]), 1, 7, w0=[w], method="fedprox", mu=mu, beta=beta)[0]
    star = (a * b + mu * w) / (a + mu)
    close(record.w, [star + (1 - beta * (a + mu)) ** 7 * (w - star)])


@pytest.mark.parametrize("client_optimizer", ["sgd", "momentum"])
def test_scaffold_on_linear_losses(client_optimizer):
    # ∇F_i = g_i: c_i+ = c_i − c + (g_i − c_i + c) = g_i whatever the rates; c = (1/N) Σ_{seen} g_i
    table = np.array([[1.0, 2.0], [-3.0, 0.5], [0.0, 4.0], [9.0, 9.0]])
    gradient, loss = linear(table)
    cohorts = [[0, 2], [1, 2], [2, 0]]
    batches = [{m: steps(m, 2 + m) for m in cohort} for cohort in cohorts]
    # CL moves the rates within the round, so that Σ_k β_k is put to the test
    records = run(gradient, loss, np.zeros(2), cohorts, batches, [1, 2, 3, 4], method="scaffold", beta=0.1,
                  client_optimizer=client_optimizer, client_rate="CL", kappa_client=1e-3)  # fmt: skip
    seen = set()
    for cohort, record in zip(cohorts, records, strict=True):
        assert all(len(set(record.rates[m])) > 1 for m in cohort)
        c = sum((table[m] for m in seen), np.zeros(2)) / 4
        for m in cohort:
            unit, displacement = 0.0, 0.0
            for rate in record.rates[m]:
                unit = 1 + (0.9 * unit if client_optimizer == "momentum" else 0.0)
                displacement += rate * unit
            close(record.updates[m], displacement * (table[m] - (table[m] if m in seen else 0.0) + c))
        seen |= set(cohort)
        for m in range(4):
            close(record.state.c[m], table[m] if m in seen else np.zeros(2))
        close(record.state.server["c"], sum(table[m] for m in seen) / 4)


def test_scaffold_averages_by_examples_but_updates_c_evenly():
    gradient, loss = linear([[1.0], [5.0]])
    record = run(gradient, loss, np.zeros(1), [[0, 1]], [{0: steps(0, 1), 1: steps(1, 1)}], {0: 3, 1: 1, 7: 1},
                 method="scaffold", beta=1.0)[0]  # fmt: skip
    close(record.pseudo_gradient, [2.0])  # (3·1 + 5)/4
    close(record.state.server["c"], [2.0])  # (1 + 5)/3, N = 3


def test_scaffold_with_prox_and_fedexp():
    # One step from w^t: the proximal pull is zero there, so only the second step feels it.
    gradient, loss = linear([[1.0, 0.0], [0.0, 1.0]])
    record = run(gradient, loss, np.zeros(2), [[0, 1]], [{0: steps(0, 2), 1: steps(1, 2)}], [1, 1], beta=0.5,
                 corrections=("prox", "scaffold"), mu=0.4, global_rate="fedexp", fedexp_eps=-0.205)[0]  # fmt: skip
    # x_1 = −0.5 g, x_2 = −0.5 g − 0.5 (g − 0.2 g) = −0.9 g; c_i+ = 0.9 g / (2·0.5); Σp‖Δ‖² = 0.81, ‖Δ‖² = 0.405
    close(record.updates[1], [0.0, 0.9])
    close(record.state.c[0], [0.9, 0.0])
    close(record.state.server["c"], [0.45, 0.45])
    close(record.alpha, 0.81 / 0.4)


@pytest.mark.parametrize("client_optimizer", ["sgd", "momentum"])
def test_fednova_on_linear_losses(client_optimizer):
    # Δ_i = β a_i g_i, so Δ = β τ_eff Σ p g with τ_eff = Σ p a
    table = np.array([[1.0, 2.0], [-3.0, 0.5], [0.0, 4.0]])
    gradient, loss = linear(table)
    counts, p = {0: 1, 1: 2, 2: 4}, {0: 0.1, 1: 0.3, 2: 0.6}
    a = {0: 1.0, 1: 2.0, 2: 4.0}
    if client_optimizer == "momentum":
        a = {0: 1.0, 1: 1 + 1.9, 2: 1 + 1.9 + 2.71 + 3.439}
    record = run(gradient, loss, np.zeros(2), [[0, 1, 2]], [{m: steps(m, counts[m]) for m in counts}], [1, 3, 6],
                 method="fednova", beta=0.05, client_optimizer=client_optimizer)[0]  # fmt: skip
    close([record.normalizers[m] for m in a], list(a.values()))
    close(record.pseudo_gradient, 0.05 * sum(p[m] * a[m] for m in a) * sum(p[m] * table[m] for m in a))


def test_fednova_with_proximal_term():
    # a: 1, then 0.98·1 + 1, … with βμ = 0.02; Δ_i = β a_i g_i; τ_eff counts steps
    table = np.array([[1.0, 2.0], [-3.0, 0.5]])
    gradient, loss = linear(table)
    record = run(gradient, loss, np.zeros(2), [[0, 1]], [{0: steps(0, 1), 1: steps(1, 3)}], [1, 3],
                 method="fednova_prox", mu=0.2, beta=0.1)[0]  # fmt: skip
    close([record.normalizers[0], record.normalizers[1]], [1.0, 1 + 0.98 + 0.98**2])
    close(record.updates[1], 0.1 * (1 + 0.98 + 0.98**2) * table[1])
    close(record.pseudo_gradient, 0.1 * (0.25 * 1 + 0.75 * 3) * (0.25 * table[0] + 0.75 * table[1]))


def test_fednova_equals_fedavg_for_equal_steps():
    gradient, loss = quadratic([1.0, 3.0], [[1.0, 0.0], [0.0, 2.0]])
    batches = [{0: steps(0, 3), 1: steps(1, 3)}] * 4
    nova = run(gradient, loss, np.ones(2), [[0, 1]] * 4, batches, [1, 2], method="fednova", beta=0.1)
    avg = run(gradient, loss, np.ones(2), [[0, 1]] * 4, batches, [1, 2], beta=0.1)
    close(nova[-1].w, avg[-1].w)


def test_feddyn_first_rounds_by_hand():
    # Linear losses g_0 = 1, g_1 = 3, g_2 = 7 (N = 3), β = 0.5, α = 0.2, two steps from w = 0.
    # x_1 = −g/2, x_2 = −g/2 − (g + 0.2·(−g/2))/2 = −0.95 g. Cohort {0, 1}: h = −0.95, −2.85, 0; hbar = −3.8/3
    # mean_S Δ = 1.9; Δ = 1.9 + 3.8/3 = 9.5/3, in spite of unequal n.
    gradient, loss = linear([[1.0], [3.0], [7.0]])
    batches = [{0: steps(0, 2), 1: steps(1, 2)}, {1: steps(1, 1), 2: steps(2, 1)}]
    first, second = run(gradient, loss, np.zeros(1), [[0, 1], [1, 2]], batches, [1, 2, 3], method="feddyn", beta=0.5,
                        dyn_alpha=0.2)  # fmt: skip
    close(first.pseudo_gradient, [9.5 / 3])
    close(first.w, [-9.5 / 3])
    close(first.state.server["hbar"], [-3.8 / 3])
    # Round 1, one step: Δ_1 = (3 + 0.2·(−2.85))/2 = 1.215; Δ_2 = 3.5; h = −0.95, −4.065, −3.5
    close(second.updates[1], [1.215])
    close(second.updates[2], [3.5])
    close([second.state.h[m][0] for m in range(3)], [-0.95, -4.065, -3.5])
    close(second.pseudo_gradient, [(1.215 + 3.5) / 2 + 8.515 / 3])


def test_feddyn_example_scaling():
    # α_i = 0.6/(2·n_i/4) = 1.2 (n = 1), 0.4 (n = 3); two steps: x_2 = −βg(2 − βα_i)
    gradient, loss = linear([[1.0], [3.0]])
    record = run(gradient, loss, np.zeros(1), [[0, 1]], [{0: steps(0, 2), 1: steps(1, 2)}], [1, 3], method="feddyn",
                 beta=0.5, dyn_alpha=0.6, dyn_scaling="examples")[0]  # fmt: skip
    close(record.updates[0], [0.5 * 1 * (2 - 0.6)])
    close(record.updates[1], [0.5 * 3 * (2 - 0.2)])


def test_feddyn_reaches_the_minimum_of_the_sum_in_spite_of_ragged_steps():
    # Curvatures 1 and 3, centres 0 and 4: minimiser of the mean (0 + 12)/4 = 3. FedAvg stops elsewhere.
    gradient, loss = quadratic([1.0, 3.0], [[0.0], [4.0]])
    batches = [{0: steps(0, 60), 1: steps(1, 40)}] * 300
    common = {"beta": 0.1, "weighting": "uniform"}
    dyn = run(gradient, loss, np.zeros(1), [[0, 1]] * 300, batches, [1, 1], method="feddyn", dyn_alpha=0.5, **common)
    avg = run(gradient, loss, np.zeros(1), [[0, 1]] * 300, batches, [1, 1], **common)
    close(dyn[-1].w, [3.0], rtol=1e-6)
    assert abs(avg[-1].w[0] - 3.0) > 0.5


def test_fedcm_on_linear_losses():
    # Round 0: Δ_m = β K_m a g_m; M = a Σ p g. Round 1: Δ_m = β K_m (a g_m + (1 − a) M), M ← a Σ p g + (1 − a) M.
    table = np.array([[1.0, 2.0], [-3.0, 0.5]])
    gradient, loss = linear(table)
    batches = [{0: steps(0, 2), 1: steps(1, 5)}] * 2
    first, second = run(gradient, loss, np.zeros(2), [[0, 1]] * 2, batches, [1, 3], method="fedcm", beta=0.2)
    g = 0.25 * table[0] + 0.75 * table[1]
    close(first.updates[1], 0.2 * 5 * 0.1 * table[1])
    close(first.state.server["M"], 0.1 * g)
    close(second.updates[0], 0.2 * 2 * (0.1 * table[0] + 0.9 * 0.1 * g))
    close(second.state.server["M"], 0.1 * g + 0.9 * 0.1 * g)


def test_fedcm_forgets_clients_not_drawn():
    gradient, loss = linear([[1.0], [3.0]])
    records = run(gradient, loss, np.zeros(1), [[0], [1], [0]], [{0: steps(0, 1)}, {1: steps(1, 1)}, {0: steps(0, 1)}],
                  [1, 1], method="fedcm", beta=1.0, cm_a=0.5)  # fmt: skip
    close([r.state.server["M"][0] for r in records], [0.5, 1.5 + 0.25, 0.5 + 0.875])


def test_mimelite_on_linear_losses():
    # Client 0 has rows 0 and 1 but visits row 0 only; client 1 has row 2. s_1 = c = Σ p (mean of all rows), s_2 = 1.9 c
    table = np.array([[1.0, 0.0], [3.0, 2.0], [0.0, -1.0]])
    gradient, loss = linear(table)
    rows = {0: np.array([0, 1]), 1: np.array([2])}
    records = run(gradient, loss, np.zeros(2), [[0, 1]] * 3, [{0: steps(0, 3), 1: steps(2, 1)}] * 3, {0: 2, 1: 1},
                  method="mimelite", beta=0.1, alpha=2.0, client_rows=rows)  # fmt: skip
    c = 2 / 3 * np.array([2.0, 1.0]) + 1 / 3 * table[2]
    close(records[0].updates[0], 0.3 * table[0])
    close(records[1].updates[0], 0.3 * (table[0] + 0.9 * c))  # frozen: three equal steps
    close(records[2].updates[1], 0.1 * (table[2] + 0.9 * 1.9 * c))
    close(records[2].state.server["s"], (1 + 0.9 + 0.81) * c)
    close(records[0].w, -2.0 * (2 / 3 * 0.3 * table[0] + 1 / 3 * 0.1 * table[2]))


def test_mimelite_takes_the_full_gradient_at_the_old_parameters():
    gradient, loss = quadratic([2.0], [[0.0]])
    record = run(gradient, loss, np.array([5.0]), [[0]], [{0: steps(0, 2)}], [1], method="mimelite", beta=0.1,
                 client_rows={0: np.array([0])})[0]  # fmt: skip
    close(record.state.server["s"], [10.0])


def test_mimelite_with_adam_first_round_is_sign_descent():
    # m̂ = g, v̂ = g²: direction sign(g) for each of the frozen steps; then s = 0.1 c, s2 = 0.001 c²
    record = run(*linear([[3.0, -4.0]]), np.zeros(2), [[0]], [{0: steps(0, 3)}], [1], method="mimelite", beta=0.1,
                 mime_base="adam", mime_eps=0.0, client_rows={0: np.array([0])})[0]  # fmt: skip
    close(record.updates[0], [0.3, -0.3])
    close(record.state.server["s"], [0.3, -0.4])
    close(record.state.server["s2"], [0.009, 0.016])


def test_delta_sgd_by_hand():
    # F = (a/2)w²: ‖Δx‖/‖Δg‖ = 1/a of the *current* row. Rows a = 2, 8, 2, with γ = 1, δ = 3: first bounds 1/16, 1/4.
    # η_0 = 0.1; η_1 = min(1/16, √4·0.1 = 0.2) = 1/16, θ = 0.625; η_2 = min(1/4, √(1 + 1.875)/16 = 0.106) = √2.875/16
    gradient, loss = quadratic([2.0, 8.0], [[0.0], [0.0]])
    batches = {0: [np.array([0]), np.array([1]), np.array([0])]}
    records = run(gradient, loss, np.array([1.0]), [[0]] * 2, [batches] * 2, [1], method="delta_sgd", beta=0.1,
                  delta_gamma=1.0, delta_delta=3.0)  # fmt: skip
    for record in records:  # restarted each round
        close(record.rates[0], [0.1, 1 / 16, np.sqrt(2.875) / 16])
    close(records[0].w, [(1 - 0.2) * (1 - 0.5) * (1 - np.sqrt(2.875) / 8)])
    # the first bound grows with γ
    records = run(gradient, loss, np.array([1.0]), [[0]], [batches], [1], method="delta_sgd", beta=0.1,
                  delta_gamma=2.0, delta_delta=3.0)  # fmt: skip
    close(records[0].rates[0][1], 1 / 8)


def test_delta_sgd_with_zero_denominator_grows_by_the_second_bound():
    record = one_client(linear([[1.0, 1.0]]), 1, 4, method="delta_sgd", beta=0.1, delta_delta=0.1)[0]
    theta, eta, expected = 1.0, 0.1, [0.1]
    for _ in range(3):
        theta = np.sqrt(1 + 0.1 * theta)
        eta *= theta
        expected.append(eta)
    close(record.rates[0], expected)
    record = one_client(linear([[0.0, 0.0]]), 1, 3, method="delta_sgd", beta=0.1)[0]  # no movement at all
    assert np.all(np.isfinite(record.rates[0]))


def test_delta_sgd_sees_the_proximal_term():
    record = one_client(quadratic([2.0], [[0.0]]), 1, 2, w0=[1.0], corrections=("prox",), mu=3.0,
                        client_rate="delta_sgd", beta=0.3, delta_delta=0.1)[0]  # fmt: skip
    close(record.rates[0], [0.3, 0.2])  # 1/(a + μ)


def test_sps_on_a_quadratic():
    # F/(c g²) = 1/(2ca) = 0.25 for a = 4, c = 1/2: the minimum in one step; then g = 0 and the rate is γ_b
    record = one_client(quadratic([4.0], [[1.0]]), 1, 2, w0=[3.0], method="fedsps", beta=0.8)[0]
    close(record.rates[0], [0.25, 0.8])
    close(record.w, [1.0])
    record = one_client(quadratic([4.0], [[1.0]]), 1, 1, w0=[3.0], method="fedsps", beta=0.1)[0]
    close(record.rates[0], [0.1])
    # l* = 2: (8 − 2)/(0.5·64)
    record = one_client(quadratic([4.0], [[1.0]]), 1, 1, w0=[3.0], method="fedsps", beta=0.8, sps_lstar=2.0)[0]
    close(record.rates[0], [6 / 32])


def test_ngn_on_a_quadratic():
    # f = a x²/2 and g = a x: ‖g‖²/(2f) = a, so σ/(1 + σa): 0.8/4.2 for a = 4, whatever x; of what is left 1 − 4η
    record = one_client(quadratic([4.0], [[1.0]]), 1, 2, w0=[3.0], method="ngn", beta=0.8)[0]
    close(record.rates[0], [0.8 / 4.2, 0.8 / 4.2])
    close(record.w, [1 + 2 * (1 - 3.2 / 4.2) ** 2])
    # l* = 2: f = 8 − 2 and ‖g‖² = 64
    record = one_client(quadratic([4.0], [[1.0]]), 1, 1, w0=[3.0], method="ngn", beta=0.8, ngn_lstar=2.0)[0]
    close(record.rates[0], [0.8 / (1 + 0.8 * 64 / 12)])
    record = one_client(quadratic([4.0], [[1.0]]), 1, 1, w0=[3.0], method="ngn", beta=0.8, ngn_lstar=9.0)[0]
    close(record.rates[0], [0.0])


def test_sls_on_a_quadratic():
    # F(w − ηg) ≤ F − cη g² ⟺ η ≤ 2(1 − c)/a = 0.45 for a = 4. From 1: 0.9^7 = 0.478, 0.9^8 = 0.4305
    record = one_client(quadratic([4.0], [[0.0]]), 1, 3, w0=[3.0], method="fedsls", beta=1.0)[0]
    close(record.rates[0], [0.9**8] * 3)  # every step starts anew
    record = one_client(quadratic([4.0], [[0.0]]), 1, 1, w0=[3.0], method="fedsls", beta=0.4)[0]
    close(record.rates[0], [0.4])
    record = one_client(quadratic([4.0], [[0.0]]), 1, 1, w0=[3.0], method="fedsls", beta=1.0, sls_c=0.9)[0]
    close(record.rates[0], [0.9**29])  # bound 0.05: 0.9^28 = 0.0523, 0.9^29 = 0.0471


def test_sps_and_sls_see_the_proximal_objective():
    # F + (μ/2)(x − 1)² with a = 4, then 8; μ = 12, w^t = 1
    gradient, loss = quadratic([4.0, 8.0], [[0.0], [0.0]])
    batches = [{0: [np.array([0]), np.array([1])]}]
    record = run(gradient, loss, np.ones(1), [[0]], batches, [1], corrections=("prox",), mu=12.0, client_rate="sps",
                 beta=1.0, sps_c=8.0)[0]  # fmt: skip
    # SPS: 2/(8·16) = 1/64, x = 15/16; there the value is 4·225/256 + 6/256 and g = 7.5 − 0.75
    close(record.rates[0], [1 / 64, 906 / 256 / (8 * 6.75**2)])
    # SLS: curvatures a + μ = 16, 20, so η ≤ 1.8/16 = 0.1125, then 1.8/20 = 0.09; from 0.12: 0.108, 0.0875
    record = run(gradient, loss, np.ones(1), [[0]], batches, [1], corrections=("prox",), mu=12.0, client_rate="sls",
                 beta=0.12)[0]  # fmt: skip
    close(record.rates[0], [0.108, 0.12 * 0.9**3])


def test_sls_counts_its_trials_and_falls_back():
    gradient, loss = quadratic([4.0], [[0.0]])
    tried = []

    def watched(w, rows):
        tried.append(w[0])
        return loss(w, rows)

    record = one_client((lambda w, rows: -gradient(w, rows), watched), 1, 1, w0=[3.0], method="fedsls", beta=1.0)[0]
    close(record.rates[0], [1e-6])
    assert len(tried) == 101  # F(w) and 100 trials
    close([*tried[1:3], tried[-1]], [15.0, 3.0 + 12 * 0.9, 3.0 + 12 * 0.9**99])
    # eight shrinkages need nine trials
    for trials, rate in ((9, 0.9**8), (8, 1e-6)):
        record = one_client((gradient, loss), 1, 1, w0=[3.0], method="fedsls", beta=1.0, sls_trials=trials)[0]
        close(record.rates[0], [rate])


# ---- FedHyper-CL ---------------------------------------------------------------------------------------------------


def test_cl_by_hand():
    # g = 1, β^0 = 0.5, κ = 0.1, K = 2: round 0: β = 0.5, 0.6; Δ = 1.1. Round 1: 0.5, 0.5 + 0.1(1 + 1.1/2) = 0.655
    records = one_client(linear([[1.0]]), 2, 2, size=1, method="fedhyper_cl", beta=0.5, kappa_client=0.1)
    close(records[0].rates[0], [0.5, 0.6])
    close(records[1].rates[0], [0.5, 0.655])
    records = one_client(linear([[1.0]]), 2, 2, size=1, method="fedhyper_cl", beta=0.5, kappa_client=0.1,
                         global_weight=2.0)  # fmt: skip
    close(records[1].rates[0], [0.5, 0.5 + 0.1 * (1 + 2.2)])


def test_cl_clips():
    records = one_client(linear([[1.0]]), 1, 4, size=1, method="fedhyper_cl", beta=0.5, kappa_client=3.0)
    close(records[0].rates[0], [0.5, 3.5, 5.0, 5.0])
    gradient, loss = linear([[1.0], [-1.0]])
    batches = {0: [np.array([0]), np.array([1]), np.array([1])]}
    records = run(gradient, loss, np.zeros(1), [[0]], [batches], [1], method="fedhyper_cl", beta=0.5)
    close(records[0].rates[0], [0.5, 0.05, 1.05])


def test_cl_warm_and_warm_with_sl():
    # Clients with g = 1, 2; K = 2, κ = 0.1, no global term: final rates β + 0.1 g²
    gradient, loss = linear([[1.0], [2.0]])
    batches = [{0: steps(0, 2), 1: steps(1, 2)}] * 3
    common = {"method": "fedhyper_cl", "beta": 0.5, "kappa_client": 0.1, "global_weight": 0.0, "rate_start": "warm"}
    records = run(gradient, loss, np.zeros(1), [[0, 1]] * 3, batches, [1, 3], **common)
    close([r.beta for r in records], [0.5, 0.825, 1.15])  # + 0.1 (1/4·1 + 3/4·4)
    close([records[1].final_rates[0], records[1].final_rates[1]], [0.925, 1.225])
    records = run(gradient, loss, np.zeros(1), [[0, 1]] * 3, batches, [1, 3], server_local_rate="SL",
                  kappa_local=0.01, **common)  # fmt: skip
    d0 = 0.25 * (0.5 + 0.6) + 0.75 * 2 * (0.5 + 0.9)
    d1 = 0.25 * (0.825 + 0.925) + 0.75 * 2 * (0.825 + 1.225)
    close([r.beta for r in records], [0.5, 0.825, 1.15 + 0.01 * d0 * d1])
    assert run(gradient, loss, np.zeros(1), [[0, 1]] * 3, batches, [1, 3], local_bounds=(0.1, 0.7),
               server_local_rate="SL", **common)[-1].beta == 0.7  # fmt: skip


def test_cl_per_client():
    # g = 1: a client gains 0.1 per later step; clients not drawn keep their row
    gradient, loss = linear([[1.0], [1.0], [1.0]])
    cohorts = [[0, 1], [1, 2], [0, 1]]
    batches = [{m: steps(m, 2) for m in cohort} for cohort in cohorts]
    records = run(gradient, loss, np.zeros(1), cohorts, batches, [1, 1, 1], method="fedhyper_cl", beta=0.5,
                  kappa_client=0.1, global_weight=0.0, rate_start="per_client")  # fmt: skip
    close(records[1].rates[1], [0.6, 0.7])
    close(records[1].rates[2], [0.5, 0.6])
    close(records[2].rates[0], [0.6, 0.7])
    close([records[2].state.rates[m] for m in range(3)], [0.7, 0.8, 0.6])
    assert all(r.beta == 0.5 for r in records)


# ---- neutral settings give FedAvg; refusals --------------------------------------------------------------------------


NEUTRAL = {
    "fedavgm": {"server_momentum": 0.0},
    "fedprox": {"mu": 0.0},
    "fathom": {"fathom_step": 0.0},
    "fednova_prox": {"mu": 0.0},
    "fedcm": {"cm_a": 1.0},
    "mimelite": {"mime_rho": 0.0},
    "fedexp": {"fedexp_eps": 1e9},
    "fedhyper_g": {"kappa": 0.0},
    "fedhyper_sl": {"kappa_local": 0.0},
    "fedhyper_cl": {"kappa_client": 0.0},
    "fedsps": {"sps_c": 1e-12},
    "fedsls": {"sls_c": -1e12},
    "ngn": {"ngn_lstar": -1e15},
    "delta_sgd": {"delta_delta": 0.0, "delta_gamma": 1e12},
}


@pytest.mark.parametrize("method", sorted(NEUTRAL))
def test_neutral_settings_give_fedavg(method):
    rng = np.random.default_rng(0)
    gradient, loss = quadratic(rng.uniform(0.5, 2, 6), rng.normal(size=(6, 3)))
    cohorts = [list(rng.permutation(3)[:2]) for _ in range(5)]
    # the same number of steps everywhere, for FedNova
    batches = [{m: [rng.choice(6, 2) for _ in range(3)] for m in cohort} for cohort in cohorts]
    common = {"beta": 0.1, "client_rows": {m: np.array([m]) for m in range(3)}}
    result = run(gradient, loss, np.ones(3), cohorts, batches, [1, 2, 3], method=method, **NEUTRAL[method], **common)
    fedavg = run(gradient, loss, np.ones(3), cohorts, batches, [1, 2, 3], **common)
    for a, b in zip(result, fedavg, strict=True):
        close(a.w, b.w)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_descends_on_a_quadratic(method):
    rng = np.random.default_rng(1)
    gradient, loss = quadratic(rng.uniform(0.5, 2, 8), rng.normal(size=(8, 3)))
    cohorts = [list(rng.permutation(4)[:3]) for _ in range(20)]
    batches = [{m: [rng.choice([2 * m, 2 * m + 1], 1) for _ in range(1 + m)] for m in cohort} for cohort in cohorts]
    settings = {"mu": 0.1, "beta": 0.05, "client_rows": {m: np.array([2 * m, 2 * m + 1]) for m in range(4)}}
    settings["alpha"] = 0.1 if method in ("fedadagrad", "fedadam", "fedadam_corrected", "fedyogi") else 1.0
    records = run(gradient, loss, 3 * np.ones(3), cohorts, batches, [1, 2, 3, 4], method=method, **settings)
    assert loss(records[-1].w, np.arange(8)) < 0.7 * loss(3 * np.ones(3), np.arange(8))
    for before, record in zip([None, *records], records, strict=False):
        old = 3 * np.ones(3) if before is None else before.w
        close(record.w, old - record.alpha * record.direction)
        close(record.evaluation, (record.w + old) / 2)


@pytest.mark.parametrize("settings", [
    {"corrections": ("scaffold", "fedcm")},
    {"corrections": ("feddyn",)},
    {"corrections": ("unknown",)},
    {"server": "unknown"},
    {"rate_start": "per_client", "server_local_rate": "SL"},
    {"method": "fednova_prox", "client_optimizer": "momentum"},
    {"method": "mimelite", "client_optimizer": "momentum"},
    {"method": "mimelite"},
])  # fmt: skip
def test_refusals(settings):
    with pytest.raises(ValueError):
        one_client(linear([[1.0, 1.0]]), 1, 1, **settings)


def test_agrees_with_the_older_oracle():
    rng = np.random.default_rng(2)
    gradient, loss = quadratic(rng.uniform(0.5, 2, 12), rng.normal(size=(12, 5)))
    cohorts = [list(rng.permutation(5)[:3]) for _ in range(12)]
    batches = [{m: [rng.choice(12, 1 + rng.integers(3)) for _ in range(1 + m)] for m in c} for c in cohorts]
    n = [3, 1, 4, 1, 5]
    for client_optimizer in ("sgd", "momentum"):
        for schedulers, ours in (
            ({"G"}, {"global_rate": "G", "kappa": 0.3}),
            ({"SL"}, {"server_local_rate": "SL", "kappa_local": 0.02}),
            ({"CL"}, {"client_rate": "CL", "kappa_client": 0.003}),
            ({"G", "SL", "CL"}, {"global_rate": "G", "server_local_rate": "SL", "client_rate": "CL", "kappa": 0.3,
                                 "kappa_local": 0.02, "kappa_client": 0.003}),
        ):  # fmt: skip
            for server, theirs in (("sgd", "sgd"), ("fedavgm", "momentum")):
                a = run(gradient, loss, np.ones(5), cohorts, batches, n, beta=0.05, alpha=0.6, server=server,
                        client_optimizer=client_optimizer, **ours)  # fmt: skip
                b = fedhyper.run(gradient, np.ones(5), cohorts, batches, n, beta=0.05, alpha=0.6,
                                 schedulers=frozenset(schedulers), kappa_global=0.3, kappa_server_local=0.02,
                                 kappa_client=0.003, server_optimizer=theirs,
                                 client_optimizer=client_optimizer)  # fmt: skip
                for x, y in zip(a, b, strict=True):
                    close(x.w, y.w)
                    close([x.alpha, x.beta, x.inner_product], [y.alpha, y.beta, y.inner_product])
                    close(list(x.final_rates.values()), y.client_final_rates)


# ---- the authors' reference variants ---------------------------------------------------------------------------------


def check_trace(module, trace):
    records = module.reference_run(trace["variant"], np.array(trace["w0"]), trace["gradients"], trace["beta"],
                                   steps_per_epoch=trace["steps_per_epoch"])  # fmt: skip
    assert len(records) == len(trace["w"])
    for t, record in enumerate(records):
        close(record.v, trace["v"][t])
        close(record.w, trace["w"][t])
        if "agg" in trace:
            close(record.agg, trace["agg"][t])
        for name in ("m", "s"):
            if name in trace:
                close(getattr(record.state, name), trace[name][t], atol=1e-18)
        for client, expected in trace.get("multipliers", [{}] * len(records))[t].items():
            close(record.multipliers[client], expected)
            close(record.final_multipliers[client], trace["final_multipliers"][t][client])


@pytest.mark.parametrize("name", sorted(HAND_TRACES))
def test_hand_trace(name):
    check_trace(oracle, HAND_TRACES[name])


# Every one of these changes to the transcription must be noticed by the named trace.
UPDATE = "agg = clip(agg + inner(last, v), (-0.2, 4.0))"  # of GM, FULL and FedAdam
MUTATIONS = [
    ("G", "(-0.8, 4.0)", "(-0.2, 4.0)"),
    ("G", "(-0.8, 4.0)", "(-0.8, 5.0)"),
    ("G", "agg = clip(agg + inner(last, v), (-0.8, 4.0))", "agg = clip(inner(last, v), (-0.8, 4.0))"),
    ("G", "# α = 1 + agg\n        last = v", "\n        last = (1.0 + agg) * v"),
    ("G", "v = v + change / len(changes)", "v = v + change / len(changes) ** 2"),
    ("GM", "0.9 * agg * last", "0.9 * last"),
    ("GM", "0.9 * agg * last", "0.9 * (1.0 + agg) * last"),
    ("GM", "last = v + 0.9 * last", "last = v"),
    ("GM", "last = v + 0.9 * last", "last = v + 0.9 * agg * last"),
    ("GM", UPDATE, "agg = clip(agg + inner(last, v), (-0.8, 4.0))"),
    ("GM", UPDATE, "agg = clip(agg + inner(state.v, v), (-0.2, 4.0))"),
    ("GM", UPDATE, "agg = agg + inner(last, v)"),
    ("FULL", "v_prev=state.v", "v_prev=state.last"),
    ("FULL", "0.9 * agg * last", "0.9 * last"),
    ("FedAdam", "0.01 * m**2", "0.01 * x**2"),
    ("FedAdam", "0.99 * s", "0.9 * s"),
    ("FedAdam", "np.sqrt(s / 0.01 + 0.0316)", "(np.sqrt(s / 0.01) + 0.0316)"),
    ("FedAdam", "x = 0.1 * (1.0 + agg) * v", "x = (1.0 + agg) * v"),
    ("FedAdam", UPDATE, "agg = clip(agg + inner(last, v), (-0.8, 4.0))"),
    ("FedAdam", UPDATE, "agg = agg + inner(last, v)"),
    ("FedAdam", UPDATE, "agg = clip(agg + inner(state.m, v), (-0.2, 4.0))"),
    ("CL", "k % steps_per_epoch != 0", "k > 0"),
    ("CL", "k % steps_per_epoch != 0", "True"),
    ("CL", "            u_prev = u  #", "        if adapt:\n            u_prev = x - before  #"),
    ("CL", "u_prev = v_prev", "u_prev = 0 * v_prev"),
    ("CL", "min(1.1, ", "min(2.0, "),
    ("CL", "0.1 * inner(u, v_prev) / cohort_size", "0.1 * inner(u, v_prev)"),
    ("CL", "0.1 * inner(u, v_prev) / cohort_size", "inner(u, v_prev) / cohort_size"),
    ("CL", "+ inner(u, u_prev)", "- inner(u, u_prev)"),
    ("CL", "clip(gamma * b, (0.1, 10.0))", "clip(gamma, (0.1, 10.0))"),
    ("CL", "clip(gamma * b, (0.1, 10.0))", "clip(gamma * b, (0.01, 10.0))"),
    ("CL", "u = x - before", "u = before - x"),
    ("CL", "u = x - before", "u = -buffer"),
    ("CL_upper_bound", "(0.1, 10.0)", "(0.1, 11.0)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new"), MUTATIONS)
def test_hand_traces_notice_mistakes(name, old, new):
    source = inspect.getsource(oracle)
    start = source.index("REFERENCE_VARIANTS = ")
    assert old in source[start:], old
    mutant = types.ModuleType("mutant")
    exec(compile(source[:start] + source[start:].replace(old, new), "mutant", "exec"), mutant.__dict__)
    with pytest.raises((AssertionError, ValueError)):
        check_trace(mutant, HAND_TRACES[name])


def test_reference_gradients_may_be_functions_and_local_momentum():
    # F = ½x² from 1, β = 0.1, momentum 0.5: x = 0.9; buffer 0.5 + 0.9 = 1.4, x = 0.76
    record = reference_run("FedAvg", np.array([1.0]), [{0: [lambda x: x, lambda x: x]}], 0.1, momentum=0.5)[0]
    close(record.w, [0.76])


def test_reference_cl_restarts_each_round():
    trace = HAND_TRACES["CL"]
    per_epoch = trace["steps_per_epoch"]
    records = reference_run("CL", np.array(trace["w0"]), trace["gradients"], 0.5, steps_per_epoch=per_epoch)
    assert all(b[0] == 1.0 for record in records for b in record.multipliers.values())
