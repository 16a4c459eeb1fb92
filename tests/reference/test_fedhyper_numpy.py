"""Checks of the oracle itself: gradients, optimizers against optax, and cases computed by hand."""

import jax
import numpy as np
import optax
import pytest

from tests.reference.fedhyper_numpy import (
    SERVER_OPTIMIZERS,
    mlp,
    optimizer_init,
    optimizer_update,
    pack,
    relative_bounds,
    round_from_state,
    run,
    softmax_regression,
    unpack,
)

G, SL, CL = frozenset({"G"}), frozenset({"SL"}), frozenset({"CL"})


def linear(slopes):
    """One-dimensional linear losses: the gradient of row r is slopes[r] wherever w is."""
    slopes = np.asarray(slopes, np.float64)
    return lambda w, rows: np.array([slopes[rows].mean()])


def quadratic(w, rows):
    """f_r(w) = ½ (w − 4 r)² in one dimension: the gradient of row 0 is w, that of row 1 is w − 4."""
    return np.array([np.mean(w[0] - 4.0 * np.asarray(rows))])


def column(records, name):
    return [getattr(record, name) for record in records]


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["softmax", "tanh", "relu"])
def test_gradients_equal_central_differences(model):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 5)), rng.integers(0, 3, size=12)
    problem = softmax_regression(x, y, 3) if model == "softmax" else mlp(x, y, 4, 3, model)
    w = rng.normal(size=problem.size)
    rows = np.array([0, 3, 4, 9, 11])
    numeric = np.empty(problem.size)
    for i in range(problem.size):
        step = np.zeros(problem.size)
        step[i] = 1e-6
        numeric[i] = (problem.loss(w + step, rows) - problem.loss(w - step, rows)) / 2e-6
    np.testing.assert_allclose(problem.gradient(w, rows), numeric, rtol=0, atol=1e-8)


def test_loss_is_a_mean_and_stable_for_large_logits():
    x, y = np.array([[1.0], [2.0]]), np.array([0, 1])
    problem = softmax_regression(x, y, 2)
    # logits of the first row (1000, 0), of the second (2000, 0): losses 0 and 2000
    w = np.array([1000.0, 0.0, 0.0, 0.0])
    assert problem.loss(w, np.array([0, 1])) == 1000.0
    np.testing.assert_array_equal(problem.gradient(w, np.array([0, 1])), [1.0, -1.0, 0.5, -0.5])


def test_flat_order():
    rng = np.random.default_rng(1)
    problem = mlp(rng.normal(size=(6, 2)), rng.integers(0, 3, size=6), 4, 3, "tanh")
    assert problem.shapes == ((2, 4), (4,), (4, 3), (3,))
    w = np.arange(problem.size, dtype=np.float64)
    w1, b1, w2, b2 = unpack(w, problem.shapes)
    np.testing.assert_array_equal(w1, [[0, 1, 2, 3], [4, 5, 6, 7]])
    np.testing.assert_array_equal(b2, [24, 25, 26])
    np.testing.assert_array_equal(pack([w1, b1, w2, b2]), w)
    with pytest.raises(ValueError, match="need 27"):
        unpack(w[:-1], problem.shapes)
    with pytest.raises(ValueError, match="activation"):
        mlp(np.zeros((1, 1)), np.zeros(1), 1, 2, "sigmoid")


# ---- optimizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_optimizers_equal_optax(name):
    transform = {
        "sgd": lambda: optax.sgd(1.0),
        "momentum": lambda: optax.sgd(1.0, momentum=0.9),
        "adam": lambda: optax.adam(1e-2),
        "adagrad": lambda: optax.adagrad(1e-2),
        "yogi": lambda: optax.yogi(1e-2),
    }[name]()
    rng = np.random.default_rng(2)
    state = optimizer_init(name, 6)
    with jax.enable_x64(True):
        optax_state = transform.init(jax.numpy.zeros(6, "float64"))
        for step in range(8):
            # scales from 1e-4 to 10, so that every eps matters somewhere; and an entry which is always zero
            g = rng.normal(size=6) * np.array([1e-4, 1e-3, 1e-2, 1.0, 10.0, 0.0]) * 0.5**step
            expected, optax_state = transform.update(jax.numpy.asarray(g), optax_state)
            assert expected.dtype == "float64"
            update, state = optimizer_update(name, g, state)
            np.testing.assert_allclose(update, np.asarray(expected), rtol=1e-12, atol=0)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        optimizer_init("lion", 3)
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        optimizer_update("lion", np.zeros(3), {})


# ---- the two-client, two-round quadratic, by hand -------------------------------------------------------------------
#
# f_0 = ½ w², f_1 = ½ (w − 4)²; w^0 = 8, α^0 = 1, β^0 = 1/2, K = 2, n = (1, 3), so p = (1/4, 3/4).
#
# Without CL:
#   round 0  client 0: 8 → 4 → 2, Δ_0 = 6;   client 1 (distance to 4): 4 → 2 → 1, Δ_1 = 3
#            Δ^0 = 6/4 + 9/4 = 15/4,   w^1 = 8 − 15/4 = 17/4
#   round 1  client 0: 17/4 → 17/8 → 17/16, Δ_0 = 51/16;   client 1: 1/4 → 1/8 → 1/16, Δ_1 = 3/16
#            Δ^1 = (51 + 9)/64 = 15/16,   ⟨Δ^1, Δ^0⟩ = 225/64
#
# With CL, κ = 1/64:
#   round 0  Δ^{-1} = 0, so there is no global term
#            client 0: g = 8, w = 4;   g = 4, β = 1/2 + 32/64 = 1, w = 0;                           Δ_0 = 8
#            client 1: g = 4, w = 6;   g = 2, β = 1/2 + 8/64 = 5/8, w = 6 − 5/4 = 19/4;             Δ_1 = 13/4
#            Δ^0 = (8 + 39/4)/4 = 71/16,   w^1 = 57/16
#   round 1  client 0: g = 57/16, w = 57/32;   g = 57/32: ⟨g, g'⟩ = 3249/512, ½⟨g, Δ^0⟩ = +4047/1024
#                      β = 1/2 + 10545/65536 = 43313/65536
#            client 1: g = −7/16, w = 121/32;  g = −7/32: ⟨g, g'⟩ = 49/512, ½⟨g, Δ^0⟩ = −497/1024
#                      β = 1/2 − 399/65536 = 32369/65536
#            (with the global term's sign reversed, client 1 would have 1/2 + 595/65536, client 0 1/2 + 2451/65536)
#            Δ_0 = 57/32 (1 + 43313/65536) = 57·108849 / 2^21
#            Δ_1 = −7/32 (1 + 32369/65536) = −7·97905 / 2^21
#            Δ^1 = (57·108849 − 21·97905) / 2^23 = 4148388 / 2^23 = 1037097 / 2^21
#            ⟨Δ^1, Δ^0⟩ = 71·1037097 / 2^25 = 73633887 / 2^25

QUADRATIC = {"cohorts": [[0, 1]] * 2, "num_examples": [1, 3]}
QUADRATIC_BATCHES = [[[np.array([0])] * 2, [np.array([1])] * 2]] * 2


def run_quadratic(schedulers, **options):
    return run(
        quadratic, np.array([8.0]), batches=QUADRATIC_BATCHES, beta=0.5, schedulers=schedulers, **QUADRATIC, **options
    )


def test_quadratic_without_schedulers():
    first, second = run_quadratic(frozenset())
    np.testing.assert_array_equal(first.client_updates, [[6.0], [3.0]])
    np.testing.assert_array_equal(first.weights, [0.25, 0.75])
    assert first.pseudo_gradient == 15 / 4 and first.w == 17 / 4 and first.inner_product == 0.0
    np.testing.assert_array_equal(second.client_updates, [[51 / 16], [3 / 16]])
    assert second.pseudo_gradient == 15 / 16 and second.inner_product == 225 / 64 and second.w == 53 / 16
    assert (first.alpha, second.alpha, first.beta, second.beta) == (1.0, 1.0, 0.5, 0.5)
    assert second.alpha_updates == second.beta_updates == 0


def test_quadratic_uniform_weights():
    first, _ = run_quadratic(frozenset(), weighting="uniform")
    assert first.pseudo_gradient == 4.5


def test_quadratic_global():
    first, second = run_quadratic(G, kappa_global=1 / 16)
    assert first.alpha == 1.0 and first.w == 17 / 4
    # α^1 = 1 + 225/1024, used in the same round: w^2 = 17/4 − (1249/1024)(15/16)
    assert second.alpha == 1249 / 1024
    assert second.w == (4 * 17 * 1024 - 1249 * 15) / 16384
    assert (first.alpha_updates, second.alpha_updates, second.alpha_clipped) == (1, 1, 0)
    assert (second.beta, second.beta_updates) == (0.5, 0)


def test_quadratic_server_local():
    first, second = run_quadratic(SL, kappa_server_local=1 / 16)
    # the product of round 1 is known only after it: both rounds use 1/2, round 2 would use 1/2 + 225/1024
    assert (first.beta, second.beta) == (0.5, 0.5)
    assert second.state.beta == 737 / 1024
    assert (second.alpha, second.w) == (1.0, 53 / 16)
    assert (second.beta_updates, second.beta_clipped, second.alpha_updates) == (1, 0, 0)


def test_quadratic_client_and_the_sign_of_its_global_term():
    first, second = run_quadratic(CL, kappa_client=1 / 64)
    np.testing.assert_array_equal(first.client_final_rates, [1.0, 5 / 8])
    np.testing.assert_array_equal(first.client_updates, [[8.0], [13 / 4]])
    assert first.pseudo_gradient == 71 / 16 and first.w == 57 / 16
    np.testing.assert_array_equal(second.client_final_rates, [43313 / 65536, 32369 / 65536])
    np.testing.assert_array_equal(second.client_updates, [[57 * 108849 / 2**21], [-7 * 97905 / 2**21]])
    assert second.pseudo_gradient == 1037097 / 2**21
    assert second.w == 57 / 16 - 1037097 / 2**21
    assert (second.beta, second.beta_updates, second.beta_clipped) == (0.5, 2, 0)


def test_quadratic_all_three():
    first, second = run_quadratic(G | SL | CL, kappa_global=1 / 16, kappa_server_local=1 / 32, kappa_client=1 / 64)
    assert first.w == 57 / 16
    np.testing.assert_allclose(second.inner_product, 73633887 / 2**25, rtol=1e-15)
    np.testing.assert_allclose(second.alpha, 1 + 73633887 / 2**29, rtol=1e-15)
    np.testing.assert_allclose(second.state.beta, 0.5 + 73633887 / 2**30, rtol=1e-15)
    expected = 57 / 16 - (1 + 73633887 / 2**29) * 1037097 / 2**21
    np.testing.assert_allclose(second.w, [expected], rtol=1e-15)
    assert (second.alpha_updates, second.beta_updates) == (1, 3)


# ---- the client's K, SL under CL, momentum, the applied product -----------------------------------------------------


def one_client(slopes_by_round, **options):
    """Client 0 alone; its k-th step in round t has the gradient slopes_by_round[t][k]."""
    flat = [slope for slopes in slopes_by_round for slope in slopes]
    batches, row = [], 0
    for slopes in slopes_by_round:
        batches.append({0: [np.array([row + k]) for k in range(len(slopes))]})
        row += len(slopes)
    return run(linear(flat), np.zeros(1), [[0]] * len(batches), batches, {0: 1}, **options)


@pytest.mark.parametrize(("global_weight", "middle"), [(None, 0.90625), (0.5, 0.984375)])
def test_global_term_is_divided_by_the_clients_own_number_of_steps(global_weight, middle):
    # Rows 0, 1, 2 have the slopes 1, −1, 3. β^0 = 1/2, κ = 1/4, uniform weights.
    # round 0: client 0 with K = 3 and slopes 1, 1, 1 has the rates 1/2, 3/4, 1, Δ_0 = 9/4;
    #          client 1 with K = 1 and slope 3: Δ_1 = 3/2; Δ^0 = 15/8
    # round 1: client 0 with slopes 1, 1, −1: ½ + ¼(1 + ⅓·15/8) = 0.90625, and then − ¼(1 + ⅓·15/8), back to ½
    #          (with the weight ½ for ⅓: ½ + ¼(1 + 15/16) = 0.984375)
    a, b, c = np.array([0]), np.array([1]), np.array([2])
    first, second = run(
        linear([1, -1, 3]),
        np.zeros(1),
        [[0, 1], [1, 0]],
        [[[a, a, a], [c]], [[c], [a, a, b]]],
        [5, 1],
        beta=0.5,
        schedulers=CL,
        kappa_client=0.25,
        weighting="uniform",
        global_weight=global_weight,
    )
    np.testing.assert_array_equal(first.client_final_rates, [1.0, 0.5])
    np.testing.assert_array_equal(first.client_rate_updates, [2, 0])
    assert first.pseudo_gradient == 15 / 8
    np.testing.assert_allclose(second.client_final_rates, [0.5, 0.5], rtol=1e-15)  # in the cohort's order
    np.testing.assert_allclose(second.client_updates, [[1.5], [0.5 + middle - 0.5]], rtol=1e-15)
    assert second.beta_updates == 2


def test_client_rates_start_from_the_servers():
    # slopes 1, K = 2, κ_SL = 1/10, κ_CL = 1/4:
    # round 0: ½, ¾: Δ = 1.25; β^1 = ½
    # round 1: ½, ½ + ¼(1 + ½·1.25) = 0.90625: Δ = 1.40625, product 1.7578125, β^2 = 0.67578125
    # round 2: 0.67578125, + ¼(1 + ½·1.40625) = 1.1015625
    records = one_client([[1, 1]] * 3, beta=0.5, schedulers=SL | CL, kappa_server_local=0.1, kappa_client=0.25)
    np.testing.assert_allclose(column(records, "beta"), [0.5, 0.5, 0.67578125], rtol=1e-15)
    np.testing.assert_allclose(np.ravel(column(records, "client_final_rates")), [0.75, 0.90625, 1.1015625], rtol=1e-15)
    assert column(records, "beta_updates") == [2, 2, 2]


def test_client_momentum_starts_afresh_and_leaves_the_product_alone():
    # slopes 1, 2, 1: the traces are 1, 2.9, 3.61; CL's products are 1·2 and 2·1, of the gradients, not the traces
    # round 0: rates ½, ¾, 1:  ½·1 + ¾·2.9 + 1·3.61 = 6.285
    # round 1: rates ½, ½ + ⅛(2 + ⅓·2·6.285) = 1.27375, + ⅛(2 + ⅓·6.285) = 1.785625:
    #          ½·1 + 1.27375·2.9 + 1.785625·3.61 = 10.63998125
    records = one_client([[1, 2, 1]] * 2, beta=0.5, schedulers=CL, kappa_client=0.125, client_optimizer="momentum")
    np.testing.assert_allclose(np.ravel(column(records, "pseudo_gradient")), [6.285, 10.63998125], rtol=1e-14)


def test_server_momentum_and_the_applied_product():
    # β = 1, slopes 1, 2, 3: Δ = 1, 2, 3; traces u = 1, 2.9, 5.61; w = −1, −3.9, −9.51
    options = {"beta": 1.0, "server_optimizer": "momentum"}
    plain = one_client([[1], [2], [3]], **options)
    applied = one_client([[1], [2], [3]], inner_product="applied", **options)
    np.testing.assert_allclose(np.ravel(column(plain, "w")), [-1, -3.9, -9.51], rtol=1e-15)
    np.testing.assert_allclose(np.ravel(column(plain, "direction")), [1, 2.9, 5.61], rtol=1e-15)
    np.testing.assert_allclose(column(plain, "inner_product"), [0, 2, 6], rtol=1e-15)
    np.testing.assert_allclose(column(applied, "inner_product"), [0, 2, 8.7], rtol=1e-15)


def test_alpha_multiplies_the_optimizers_update():
    # Adam's first update is −0.01 sign(Δ); α stays outside the preconditioner
    (record,) = one_client([[4]], beta=1.0, alpha=2.0, server_optimizer="adam")
    np.testing.assert_allclose(record.w, [-0.02], rtol=1e-8)


# ---- clipping -------------------------------------------------------------------------------------------------------


def test_global_rate_is_clipped_at_both_bounds():
    # β = 1, K = 1, κ = 1: Δ is the slope. α: 1 (product 0); 1 + 2 = 3, on the bound, not outside; 3 + 6 → 3;
    # 3 − 3 = 0 → ⅓; ⅓ + 10 → 3
    records = one_client([[1], [2], [3], [-1], [-10]], beta=1.0, schedulers=G)
    assert column(records, "alpha") == [1.0, 3.0, 3.0, 1 / 3, 3.0]
    assert column(records, "alpha_clipped") == [0, 0, 1, 1, 1]
    assert column(records, "alpha_updates") == [1] * 5
    np.testing.assert_allclose(np.ravel(column(records, "w")), [-1, -7, -16, -16 + 1 / 3, 14 + 1 / 3], rtol=1e-15)


def test_server_local_rate_is_clipped_at_both_bounds():
    # β^0 = ½, bounds (0.05, 5): Δ^t = β^t s^t = 1, 2, 2.5, −5, −0.05; products 0, 2, 5, −12.5, 0.25
    # next β: 0.5, 2.5, 7.5 → 5, −7.5 → 0.05, 0.3
    records = one_client([[2], [4], [1], [-1], [-1]], beta=0.5, schedulers=SL)
    np.testing.assert_allclose(column(records, "beta"), [0.5, 0.5, 2.5, 5.0, 0.05], rtol=1e-15)
    np.testing.assert_allclose(records[-1].state.beta, 0.3, rtol=1e-15)
    assert column(records, "beta_clipped") == [0, 0, 1, 1, 0]


@pytest.mark.parametrize(("bounds", "lower", "upper"), [(None, 0.05, 5.0), ((0.1, 10.0), 0.1, 10.0)])
def test_client_rate_is_clipped_at_both_bounds(bounds, lower, upper):
    # slopes 1, 1, 10, −10: rates ½, 1.5, 11.5 → upper, upper − 100 → lower
    (record,) = one_client([[1, 1, 10, -10]], beta=0.5, schedulers=CL, local_bounds=bounds)
    assert record.client_final_rates == lower
    assert record.pseudo_gradient == 0.5 + 1.5 + upper * 10 - lower * 10
    assert (record.beta_updates, record.beta_clipped) == (3, 2)


# ---- decay ----------------------------------------------------------------------------------------------------------


def test_decay_by_schedules():
    # slopes 1, K = 2, α^t = 2^{-t}, β^t = 4^{-t}: Δ^t = 2·4^{-t}, steps 2, 1/4, 1/32
    records = one_client([[1, 1]] * 3, beta=1.0, alpha_schedule=lambda t: 0.5**t, beta_schedule=lambda t: 0.25**t)
    assert column(records, "alpha") == [1.0, 0.5, 0.25]
    assert column(records, "beta") == [1.0, 0.25, 0.0625]
    assert column(records, "w") == [-2.0, -2.25, -2.28125]
    assert sum(column(records, "alpha_updates") + column(records, "beta_updates")) == 0


def test_client_scheduler_on_a_decaying_base():
    # β^0 = 1 fixes the bounds (0.1, 10); round 1 starts from ¼, then ¼ + ¼(1 + ½·Δ^0), Δ^0 = 1 + 1.25
    records = one_client([[1, 1]] * 2, beta=1.0, schedulers=CL, kappa_client=0.25, beta_schedule=lambda t: 0.25**t)
    assert column(records, "client_final_rates") == [1.25, 0.25 + 0.25 * (1 + 0.5 * 2.25)]


# ---- bad clients, bad products --------------------------------------------------------------------------------------


def test_non_finite_client_is_left_out():
    # slopes of rows 0, 1, 2: 1, nan, 4; clients 7, 3, 5 with n = 1, 2, 3; β = ½. Client 3 fails in round 0 only.
    # round 0: p = (¼, 0, ¾), Δ^0 = ⅛ + 3/2 = 13/8;  round 1: p = (1/6, 1/3, 1/2), client 3 uses row 0:
    #          Δ^1 = 1/12 + 1/6 + 1 = 5/4
    gradient = linear([1.0, np.nan, 4.0])
    ok, bad, four = np.array([0]), np.array([1]), np.array([2])
    first, second = run(
        gradient,
        np.zeros(1),
        [[7, 3, 5]] * 2,
        [{7: [ok], 3: [bad, ok], 5: [four]}, {7: [ok], 3: [ok], 5: [four]}],
        {7: 1, 3: 2, 5: 3},
        beta=0.5,
        schedulers=G | CL,
    )
    np.testing.assert_array_equal(first.survived, [True, False, True])
    np.testing.assert_array_equal(first.weights, [0.25, 0.0, 0.75])
    assert np.isnan(first.client_updates[1, 0])
    assert first.pseudo_gradient == 13 / 8 and first.w == -13 / 8
    assert first.beta_updates == 0 and first.nonfinite_products == 0  # client 3's counts are left out with it
    assert second.survived.all()
    np.testing.assert_allclose(second.pseudo_gradient, [5 / 4], rtol=1e-15)
    np.testing.assert_allclose(second.inner_product, 65 / 32, rtol=1e-15)


def test_round_without_survivors_changes_only_the_counter():
    gradient = linear([1.0, np.inf])
    ok, bad = np.array([0]), np.array([1])
    first, second, third = run(
        gradient,
        np.zeros(1),
        [[0]] * 3,
        [[[ok]], [[bad]], [[ok]]],
        [1],
        beta=0.5,
        schedulers=G | SL,
        server_optimizer="momentum",
    )
    assert second.state.round == 2
    assert second.state._replace(round=1) == first.state
    assert (second.inner_product, second.alpha_updates, second.beta_updates) == (0.0, 0, 0)
    assert not second.survived.any() and second.weights == 0.0
    # Δ^{t-1} of round 2 is that of round 0
    assert third.inner_product == 0.25
    np.testing.assert_allclose(third.w, [-0.5 - 1.25 * (0.5 + 0.45)], rtol=1e-15)


def test_non_finite_product_leaves_the_rate():
    # Δ = 1e200 is finite, its square is not; round 2, back at w = 0, has the product −1e200
    records = one_client([[1e200], [-1e200], [1.0]], beta=1.0, schedulers=G | SL)
    assert column(records, "inner_product") == [0.0, -np.inf, -1e200]
    assert column(records, "alpha") == [1.0, 1.0, 1 / 3]
    assert column(records, "beta") == [1.0, 1.0, 1.0] and records[-1].state.beta == 0.1
    assert column(records, "nonfinite_products") == [0, 1, 0]
    assert column(records, "alpha_updates") == [1, 0, 1]
    (record,) = one_client([[1e200, 1e200, 1.0]], beta=1.0, schedulers=CL, kappa_client=0.0)
    assert (record.client_final_rates, record.beta_updates, record.nonfinite_products) == (1.0, 1, 1)


# ---- the whole ------------------------------------------------------------------------------------------------------


def ragged_case(rounds=6):
    """Four ragged clients, three a round, of a small MLP."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(40, 5)), rng.integers(0, 3, size=40)
    problem = mlp(x, y, 4, 3, "tanh")
    pools = np.split(rng.permutation(40), [5, 12, 25])
    cohorts, batches = [], []
    for _ in range(rounds):
        cohort = [int(client) for client in rng.choice(4, size=3, replace=False)]
        batch = {}
        for client in cohort:
            rows = rng.permutation(pools[client])
            batch[client] = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        cohorts.append(cohort)
        batches.append(batch)
    w0 = 0.5 * rng.normal(size=problem.size)
    return problem, w0, cohorts, batches, [len(pool) for pool in pools]


def test_zero_kappa_is_fedavg_bit_for_bit():
    problem, w0, cohorts, batches, num_examples = ragged_case()
    plain = run(problem.gradient, w0, cohorts, batches, num_examples, beta=0.1)
    zero = run(
        problem.gradient,
        w0,
        cohorts,
        batches,
        num_examples,
        beta=0.1,
        schedulers=G | SL | CL,
        kappa_global=0.0,
        kappa_server_local=0.0,
        kappa_client=0.0,
    )
    np.testing.assert_array_equal(column(plain, "w"), column(zero, "w"))


@pytest.mark.parametrize("server_optimizer", SERVER_OPTIMIZERS)
def test_run_is_a_loop_over_rounds_and_batches_may_be_listed_by_position(server_optimizer):
    problem, w0, cohorts, batches, num_examples = ragged_case()
    options = {"schedulers": G | SL | CL, "server_optimizer": server_optimizer, "inner_product": "applied"}
    records = run(problem.gradient, w0, cohorts, batches, num_examples, beta=0.1, **options)
    listed = [[batch[client] for client in cohort] for cohort, batch in zip(cohorts, batches, strict=True)]
    again = run(problem.gradient, w0, cohorts, listed, num_examples, beta=0.1, **options)
    np.testing.assert_array_equal(column(records, "w"), column(again, "w"))
    fourth = round_from_state(
        problem.gradient,
        records[2].state,
        cohorts[3],
        batches[3],
        num_examples,
        local_bounds=relative_bounds(0.1),
        **options,
    )
    np.testing.assert_array_equal(fourth.w, records[3].w)
    assert (fourth.round, fourth.alpha, fourth.beta) == (3, records[3].alpha, records[3].beta)
    assert len(set(column(records, "alpha"))) > 1 and len(set(column(records, "beta"))) > 1
    np.testing.assert_array_equal(w0, ragged_case()[1])  # the caller's array is left alone


def test_one_step_full_participation_is_hypergradient_descent():
    # K = 1, full batches, equal clients: w ← w − α β ∇f, α ← α + κ β² ⟨∇f, ∇f_prev⟩ on f = ½ Σ a_i (w_i − c̄_i)²
    rng = np.random.default_rng(4)
    a, centres = np.array([1.0, 0.3, 2.0]), rng.normal(size=(4, 3))

    def gradient(w, rows):
        return np.mean(a * (w - centres[rows]), axis=0)

    batches = [{m: [np.array([m])] for m in range(4)}] * 10
    records = run(gradient, np.ones(3), [range(4)] * 10, batches, np.ones(4), beta=0.2, schedulers=G, kappa_global=0.5)
    w, alpha, previous = np.ones(3), 1.0, np.zeros(3)
    for record in records:
        g = a * (w - centres.mean(axis=0))
        alpha = min(max(alpha + 0.5 * 0.2**2 * (g @ previous), 1 / 3), 3.0)
        w, previous = w - alpha * 0.2 * g, g
        np.testing.assert_allclose(record.w, w, rtol=1e-12)
        np.testing.assert_allclose(record.alpha, alpha, rtol=1e-12)
    assert records[-1].alpha > 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedulers": frozenset({"X"})}, "subset"),
        ({"weighting": "equal"}, "weighting"),
        ({"inner_product": "cosine"}, "inner_product"),
        ({"server_optimizer": "lion"}, "unknown optimizer"),
        ({"client_optimizer": "adam"}, "client_optimizer"),
        ({"schedulers": G, "alpha_schedule": lambda t: 1.0}, "two rules for the global rate"),
        ({"schedulers": SL, "beta_schedule": lambda t: 1.0}, "two rules for the server's local rate"),
        ({"alpha": 5.0}, "alpha = 5.0"),
        ({"beta": 0.0}, "beta = 0.0"),
        ({"local_bounds": (2.0, 3.0)}, "beta = 1.0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        one_client([[1.0]], **{"beta": 1.0, **options})


def test_bad_shapes():
    arguments = {"num_examples": [1], "beta": 1.0}
    rows = np.array([0])
    with pytest.raises(ValueError, match="flat vector"):
        run(quadratic, np.zeros((2, 2)), [[0]], [[[rows]]], **arguments)
    with pytest.raises(ValueError, match="2 rounds"):
        run(quadratic, np.zeros(1), [[0]], [[[rows]]] * 2, **arguments)
    with pytest.raises(ValueError, match="batches for 2 clients"):
        run(quadratic, np.zeros(1), [[0]], [[[rows]] * 2], **arguments)
    for steps in ([], [rows, rows[:0]]):
        with pytest.raises(ValueError, match="at least one local step"):
            run(quadratic, np.zeros(1), [[0]], [[steps]], **arguments)
