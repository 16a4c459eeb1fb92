"""Each method against numbers worked out by hand, chosen so that its best-known mistake gives others.

Two losses do for nearly all of it. Of the *linear* one a row is the gradient itself, wherever w is, so that every
pseudo-gradient of a run can be prescribed; the data may change from round to round. Of the *quadratic* one a row is
(curvature, centre). Clients are lists of rows, one row an example.

Rounds run one operation at a time (strategy 'debug'), which with such clients is quicker than to compile each; that the
compiled ones do the same, `test_contracts.py` transcribes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax import client_rules, fedavg, federated_algorithm, fedhyper, rates, server_optimizers, terms
from fedhyper_jax.data import Cohort, local_epochs, local_steps, pack
from fedhyper_jax.methods import fedexp, fedprox, make_method, server_mechanic
from fedhyper_jax.methods.authors_rules import reference_local_rule
from fedhyper_jax.parts.client_rules import ClientFacts
from tests.helpers import product
from tests.reference.hand_traces import HAND_TRACES

pytestmark = pytest.mark.usefixtures("float64")

TRANSCRIBED = pytest.mark.product
"""Of a method that equals its NumPy transcription in `test_contracts.py`; the transcription is held to hand-worked
numbers in `tests/reference`, so that `make test` proves the sum of the two."""
ONE_STEP = local_steps(1, batch_size=8)
MOMENTUM = optax.sgd(1.0, momentum=0.5)


def linear(w, batch):
    return batch["x"] @ w


def quadratic(w, batch):
    curvature, centre = batch["x"].T
    return curvature * (w[0] - centre) ** 2 / 2


def play(name, rounds, *, loss=linear, cohorts=None, w0=(0.0,), work=ONE_STEP, local_rate=1.0, **settings):
    """One round for each federation in ``rounds``; the states after the rounds and the records, stacked."""
    algorithm = make_method(name, loss, work=work, local_rate=local_rate, strategy="debug", **settings)
    state, states, infos = algorithm.init(jnp.asarray(w0)), [], []
    for t, clients in enumerate(rounds):
        ends = np.cumsum([len(rows) for rows in clients])
        data = pack({"x": np.concatenate(clients).astype(float)}, np.split(np.arange(ends[-1]), ends[:-1]))
        ids = np.arange(len(clients)) if cohorts is None else np.asarray(cohorts[t])
        state, info = algorithm.round(jax.random.key(0), state, Cohort(data=data, client_ids=ids))
        states.append(state)
        infos.append(info)
    return tuple(jax.tree.map(lambda *leaves: np.stack(leaves), *items) for items in (states, infos))


def steady(*pseudo_gradients):
    """Rounds of one client whose updates, at rate 1 and in one step, are these."""
    return [[[np.atleast_1d(gradient)]] for gradient in pseudo_gradients]


def close(actual, expected, rtol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# The server's step
# ---------------------------------------------------------------------------------------------------------------------


@TRANSCRIBED
def test_fedavg_weighs_clients_by_examples():
    """Mistake: weights by local steps, or uniform; or a ragged last batch divided by the full batch size.

    β = 1/2. Client 0: one example of gradient 8, one step: Δ = 4. Client 1: three of gradient 2 in batches of two, two
    steps: Δ = 2. By examples (4 + 3·2)/4 = 5/2; by steps 8/3; uniform 3; with the last batch halved (4 + 3·3/2)/4.
    """
    states, _ = play("fedavg", [[[[8]], [[2]] * 3]], work=local_epochs(1, 2), local_rate=0.5, global_rate=2.0)
    close(states.params, [[-5.0]])


def test_fedavgm_is_not_dampened():
    """Mistake: m ← μ m + (1−μ) Δ, or Nesterov's step.

    μ = 1/2, Δ = 1, 1, 0: m = 1, 3/2, 3/4. Dampened, all of it is half as much; Nesterov starts with 3/2.
    """
    states, _ = play("fedavgm", steady(1, 1, 0), momentum=0.5)
    close(states.params[:, 0], [-1, -2.5, -3.25])


def test_fedadagrad_has_its_adaptivity_outside_the_root_and_starts_at_zero():
    """Mistake: τ inside the root, as optax has it; an accumulator that starts at 0.1; one that decays.

    τ = 1, Δ = 3, 4: v = 9, 25, steps 3/(3+1) and 4/(5+1).
    """
    states, _ = play("fedadagrad", steady(3, 4), adaptivity=1.0, global_rate=1.0)
    close(states.params[:, 0], [-3 / 4, -3 / 4 - 2 / 3])


@pytest.mark.parametrize(
    ("name", "steps"), [("fedadam", [1, 3 / 4]), ("fedadam_corrected", [2 / 3, 3 / 4 * 4 * math.sqrt(7) / 15])]
)
def test_fedadam_corrects_its_bias_only_where_it_says_so(name, steps):
    """Mistake: a bias correction smuggled in, or left out; its exponent one too large; τ inside the root.

    b1 = 1/4, b2 = 3/4, τ = 1, Δ = 4, 2. m = 3, then 3/4 + 3/2 = 9/4; v = 4, then 3 + 1 = 4: steps 3/3 and (9/4)/3.
    Corrections √(1 − 3/4)/(1 − 1/4) = 2/3, then √(1 − 9/16)/(1 − 1/16) = (√7/4)(16/15) = 4√7/15; Flower's, whose
    exponent is one larger, would begin with the latter.
    """
    states, _ = play(name, steady(4, 2), b1=0.25, b2=0.75, adaptivity=1.0, global_rate=1.0)
    close(states.params[:, 0], -np.cumsum(steps))


def test_fedyogi_lets_its_second_moment_shrink():
    """Mistake: the sign reversed, which makes v negative at once; v that only grows; FedAdam's v.

    b1 = 1/2, b2 = 3/4, τ = 1/2, Δ = 5, 7/5. v = 0 + 25/4, root 5/2; then 25/4 > 49/25, so v falls by 49/100, to
    576/100, root 12/5. m = 5/2, then 5/4 + 7/10 = 39/20. Steps (5/2)/3 and (39/20)/(29/10) = 39/58.
    """
    states, _ = play("fedyogi", steady(5, 7 / 5), b1=0.5, b2=0.75, adaptivity=0.5, global_rate=1.0)
    close(states.params[:, 0], [-5 / 6, -5 / 6 - 39 / 58])


def test_server_dog_measures_its_distance_from_the_start():
    """Mistake: r̄ as the distance from w^{t-1}; the norm of w^0 left out of the first distance; G without the present Δ.

    w^0 = 2, first distance (1 + 2)/3 = 1, Δ = 3, 4, −12. Steps 3·1/3, 4·1/5 (distance still 1), and −12·r̄/13 with
    r̄ = 1 + 4/5; from w^{t-1} it would be 4/5, and r̄ still 1. (optax adds 1e-8 to G.)
    """
    states, _ = play("server_dog", steady(3, 4, -12), w0=(2.0,), initial_distance=1 / 3)
    close(states.params[:, 0], [1, 1 / 5, 1 / 5 + 1.8 * 12 / 13], rtol=1e-7)


@pytest.mark.parametrize(
    ("name", "options", "optimizer"),
    [
        ("server_dog", {"initial_distance": 0.1}, optax.contrib.dog(1.0, ("heuristic", 0.1))),
        ("server_mechanic", {"initial_scale": 0.1}, optax.contrib.mechanize(optax.sgd(1.0), s_init=0.1)),
    ],
)
def test_servers_without_a_rate_are_optaxs_on_the_pseudo_gradients(name, options, optimizer):
    """Mistake: a pseudo-gradient of the other sign; an optimizer that is not told the parameters; a second rate.

    Mechanic's first step is its first scale: with no sum of updates yet, s = 0.1 and w ← w − 0.1 Δ.
    """
    pseudo_gradients = [[3.0, -1.0, 0.0], [1.0, 2.0, 1.0], [2.0, 2.0, -1.0], [-1.0, 0.5, 0.5], [0.5, 0.5, 0.0]]
    states, _ = play(name, steady(*pseudo_gradients), w0=(2.0, 1.0, 1.0), **options)
    w, expected = jnp.asarray([2.0, 1.0, 1.0]), []
    state = optimizer.init(w)
    for gradient in pseudo_gradients:
        update, state = optimizer.update(jnp.asarray(gradient), state, w)
        w = w + update
        expected.append(w)
    close(states.params, expected)
    if name == "server_mechanic":
        close(states.params[0], [2 - 0.3, 1 + 0.1, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Rules of the rates
# ---------------------------------------------------------------------------------------------------------------------

ORTHOGONAL = [[[2, 0, 0, 0]], [[0, 2, 0, 0]], [[0, 0, 2, 0]], [[0, 0, 0, 2]]]


@pytest.mark.parametrize(
    ("clients", "epsilon", "rate"),
    [
        # Four orthogonal updates of squared norm 4, mean of squared norm 1: 4/(2·1) = S/2; without the 1/2 it is 4.
        product(ORTHOGONAL, 0.0, 2.0),
        # ε = 1/4: 4/(2·5/4); the published code's S·ε gives 4/(2·2) = 1.
        product(ORTHOGONAL, 0.25, 1.6),
        # Equal updates: the ratio is 1/2, the floor 1.
        product([[[2, 0, 0, 0]]] * 4, 0.0, 1.0),
        # (Those are transcribed, of equal weights.)
        # p = (1/4, 3/4): (16 + 3·4)/4 = 7 over 2·(1 − 3/2)²; unweighted squares give 20, ‖Δ‖² above and below 1/2.
        ([[[4]], [[-2]] * 3], 0.0, 14.0),
    ],
)
def test_fedexp_extrapolates_by_half_the_mean_squared_norm(clients, epsilon, rate):
    """Mistake: the 1/2 or the floor left out; ‖mean‖² for the mean of ‖·‖²; ε times the cohort's size."""
    _, infos = play("fedexp", [clients], w0=np.zeros(len(clients[0][0])), epsilon=epsilon)
    close(infos.global_rate, [rate])


def test_fedexp_measures_updates_from_the_present_parameters_and_evaluates_a_mean_of_iterates():
    """Mistake: an anchor that goes stale from the third round on, as in FedHyper's code, where the rate sticks at 1;
    evaluation at the last iterate, or training that goes on from the evaluated mean.

    The same updates 3 and −1 each round: α = 5/(2 · 1), and w moves by 5/2.
    """
    algorithm = make_method("fedexp", linear, work=ONE_STEP, local_rate=1.0, epsilon=0.0)
    states, infos = play("fedexp", [[[[3]], [[-1]]]] * 4, epsilon=0.0)
    close(infos.global_rate, [2.5] * 4)
    close(states.params[:, 0], -2.5 * np.arange(1, 5))
    close(algorithm.evaluated_params(states)[:, 0], -2.5 * np.arange(0.5, 4))


@pytest.mark.parametrize(("name", "field"), [("decay_global", "global_rate"), ("decay_local", "local_rate")])
def test_decays_act_and_start_in_the_second_round(name, field):
    """Mistake: Decay-SL without effect, as in FedHyper's code; a rate that has decayed once before round 0.

    factor 1/2, gradient 1: steps 1, 1/2, 1/4.
    """
    states, infos = play(name, steady(1, 1, 1), decay_factor=0.5, schedule_rounds=3)
    close(getattr(infos, field), [1, 0.5, 0.25])
    close(states.params[:, 0], [-1, -1.5, -1.75])


def test_plateaus_reduce_the_rate_when_the_loss_rises_or_stays():
    """Mistake: a loss that is to rise, not to fall; a patience off by one, as PyTorch counts it.

    Losses 3, 2, 4, 5, 1, 1, 1 with patience 2: rounds 2 and 3 are the first two without improvement, 5 and 6 the next.
    α^t has seen the loss of round t, β^t that of round t − 1.
    """

    def given_loss(w, batch):
        return batch["x"][:, 0] + 0 * w[0]

    settings = {"loss": given_loss, "plateau_factor": 0.5, "patience": 2}
    _, infos = play("plateau_global+plateau_local", steady(3, 2, 4, 5, 1, 1, 1), **settings)
    close(infos.global_rate, [1, 1, 1, 0.5, 0.5, 0.5, 0.25])
    close(infos.local_rate, [1, 1, 1, 1, 0.5, 0.5, 0.5])


@TRANSCRIBED
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_fathom_follows_the_cosine_with_what_went_before(scale):
    """Mistake: a buffer that holds the present update; the raw product for the cosine; the sign.

    κ = 1/2, Δ = (12,0), (0,8), (5,0), (−4,−2), half remembered: the buffer is (6,0), (3,4), (4,2) before rounds 1, 2,
    3, the cosines 0 (nothing before), 0, 3/5, −1. With the present one in the buffer, the first two are positive. β
    is 1 until round 3, so these are the updates (and of the last one only the direction counts). Gradients a thousand
    times as long change nothing.
    """
    rounds = steady(*(scale * np.array(gradient) for gradient in ([12, 0], [0, 8], [5, 0], [-4, -2])))
    states, infos = play("fathom", rounds, w0=(0.0, 0.0), cosine_rate=0.5)
    close(infos.local_rate, [1, 1, 1, math.exp(0.3)])
    close(states.local_rate.rate[-1], math.exp(0.3 - 0.5))


# ---------------------------------------------------------------------------------------------------------------------
# FedHyper
# ---------------------------------------------------------------------------------------------------------------------


def test_g_moves_its_rate_before_it_is_used():
    """Mistake: α used before it moves; a product of α-scaled updates; bounds relative to something else than 1.

    Δ = 1, 1/2, −1, −4: α = 1; 1 + 1/2; 3/2 − 1/2 (scaled updates: 3/2 − 3/4); 1 + 4, clipped to 3.
    """
    states, infos = play("G", steady(1, 0.5, -1, -4))
    close(infos.global_rate, [1, 1.5, 1, 3])
    close(states.params[:, 0], [-1, -1.75, -0.75, 11.25])


def test_sl_moves_the_rate_of_the_next_round():
    """Mistake: without effect, as in FedHyper's code; a rate that acts a round late.

    Gradients 1, 1/2, −1 at β = 1, 1, then 1 + 1·1/2: Δ = 1, 1/2, −3/2, and β falls by 3/4.
    """
    states, infos = play("SL", steady(1, 0.5, -1))
    close(infos.local_rate, [1, 1, 1.5])
    close(states.params[:, 0], [-1, -1.5, 0])
    close(states.local_rate.rate[-1], 0.75)


def test_sl_is_bounded_relative_to_the_first_rate():
    """Mistake: the paper's clip to [1/10, 10] read literally, which overwrites a small rate at once; bounds that move.

    β^0 = 1/100, gradients of 100: Δ = 1, 1, then products of 1 and more meet 10 β^0, and stay there.
    """
    _, infos = play("SL", steady(100, 100, 100, 100), local_rate=0.01)
    close(infos.local_rate, [0.01, 0.01, 0.1, 0.1])


@pytest.mark.parametrize(
    ("global_weight", "rate"),
    [(None, 1 / 2 + 1 / 16 + 1 / 4), (0.0, 1 / 2 + 1 / 16), (0.25, 1 / 2 + 1 / 16 + 1 / 8)],
)
def test_cl_agrees_with_the_raw_last_pseudo_gradient(global_weight, rate):
    """Mistake: the sign of the global term; Δ^{t-1} times α; no 1/K; a step 0 that adapts already.

    K = 2, α = 2. Round 0, g = 1: β = 1/2, then 1/2 + 1: Δ = 2. Round 1, g = 1/4: β = 1/2, then 1/2 + 1/16 + weight ·
    1/4 · 2, the weight 1/2 by default.
    """
    settings = {"work": local_steps(2, 1), "local_rate": 0.5, "global_rate": 2.0}
    states, infos = play("CL", steady(1, 0.25), global_weight=global_weight, **settings)
    close(infos.client_rate_max, [1.5, rate])
    close(states.params[:, 0], [-4, -4 - 2 * (1 / 2 + rate) / 4])


@TRANSCRIBED
def test_warm_rates_start_from_the_mean_by_examples_of_the_last_ones():
    """Mistake: a uniform mean, 3; or a restart at 1/2.

    K = 2, β = 1/2, gradients 1 (one example) and 2 (three): final rates 1/2 + 1 and 1/2 + 4; (1.5 + 3 · 4.5)/4 = 3.75.
    """
    clients = [[[1]], [[2]] * 3]
    _, infos = play("CL", [clients, clients], work=local_steps(2, 4), local_rate=0.5, client_rates="warm")
    close(infos.local_rate, [0.5, 3.75])


@TRANSCRIBED
def test_per_client_rates_wait_for_the_next_time_the_client_is_drawn():
    """Mistake: rows of clients that were not drawn overwritten, or a start from the server's rate.

    K = 2, β^0 = 1/2, gradients 1 and 1/2. Client 0: 1/2 + 1, Δ = 2. Client 1: 1/2 + 1/4 + 1/2 · 1/2 · 2 = 5/4, Δ = 7/8.
    Client 0: from 3/2 to 3/2 + 1 + 1/2 · 7/8 = 47/16.
    """
    settings = {"work": local_steps(2, 1), "local_rate": 0.5, "client_rates": "per_client", "population": 2}
    states, _ = play("CL", [[[[1]], [[0.5]]]] * 3, cohorts=[[0], [1], [0]], **settings)
    close(states.clients["rate"], [[3 / 2, 1 / 2], [3 / 2, 5 / 4], [47 / 16, 5 / 4]])


@pytest.mark.parametrize(("inner_product", "rate"), [("applied", 2.0), ("pseudo_gradient", 3.0)])
def test_applied_products_take_the_direction_of_the_step(inner_product, rate):
    """Mistake: ⟨Δ^t, Δ^{t-1}⟩ although Adam stepped elsewhere; the update's sign; α before the preconditioner.

    FedAdam's numbers above: Δ = 4, 2, directions 1, 3/4. κ = 1/2: α = 1 + 1/2 · 2 · 1, not 1 + 1/2 · 2 · 4, clipped.
    """
    settings = {"b1": 0.25, "b2": 0.75, "adaptivity": 1.0, "global_rate": 1.0, "hyper_rate": 0.5}
    states, infos = play("fedadam+G", steady(4, 2), inner_product=inner_product, **settings)
    close(infos.global_rate, [1, rate])
    close(states.params[:, 0], [-1, -1 - rate * 3 / 4])


# ---------------------------------------------------------------------------------------------------------------------
# Client drift
# ---------------------------------------------------------------------------------------------------------------------


def test_fedprox_is_anchored_at_the_present_global_parameters():
    """Mistake: the anchor w^0; a gradient of 2μ or μ/2 times the distance.

    β = 1/2, μ = 1, gradient 1, two steps: 1/2 and (1 − 1/2)/2 = 1/4, in every round; with 2μ the second step is 0.
    """
    states, _ = play("fedprox", steady(1, 1), work=local_steps(2, 1), local_rate=0.5, proximal_weight=1.0)
    close(states.params[:, 0], [-0.75, -1.5])


@pytest.mark.parametrize(("weighting", "mean"), [("examples", 11), ("uniform", 10)])
def test_scaffolds_c_is_a_mean_as_clients_count(weighting, mean):
    """Mistake: shares of 1/N where examples count, or of examples where every client does.

    Gradients 8 and 12 of one and three examples: c = (8 + 3 · 12)/4, or (8 + 12)/2.
    """
    settings = {"work": local_steps(2, 3), "population": 2, "weighting": weighting}
    states, _ = play("scaffold", [[[[8]], [[12]] * 3]], **settings)
    close(states.clients["control_variates"], [[[8], [12]]])
    close(states.terms["control_variates"], [[mean]])


@TRANSCRIBED
@pytest.mark.parametrize(("loss", "steps"), [(linear, 3), (quadratic, 1)])
def test_scaffolds_control_variates_are_gradients_and_c_is_their_mean(loss, steps):
    """Mistake: c += (|S|/N) Σ_S, |S| times too much; c_m⁺ with the new c; Δ_m over β instead of Kβ; rows that start
    from the parameters.

    Whatever c was, c_m⁺ is the mean gradient along the client's path: its gradient at w^t in one step, and the gradient
    itself where it is the same everywhere. N = 4, so Σ_S (c_m⁺ − c_m)/N keeps c the mean of all rows.
    """
    rows = np.array([[1.0], [-2.0], [4.0], [3.0]]) if loss is linear else np.array([[1, 0], [2, 1], [1, -3], [3, 5]])
    cohorts = [[0, 1], [1, 2], [3, 1], [0, 2], [2, 3]]
    settings = {"loss": loss, "work": local_steps(steps, 1), "local_rate": 0.25, "population": 4, "w0": (1.0,)}
    states, _ = play("scaffold", [[[row] for row in rows]] * 5, cohorts=cohorts, **settings)
    variates, starts = np.zeros((4, 1)), np.concatenate([[[1.0]], states.params[:-1]])
    for t, cohort in enumerate(cohorts):
        variates[cohort] = rows[cohort] if loss is linear else rows[cohort, :1] * (starts[t] - rows[cohort, 1:])
        close(states.clients["control_variates"][t], variates)
        close(states.terms["control_variates"][t], variates.mean(axis=0))


@TRANSCRIBED
@pytest.mark.parametrize(
    ("name", "options", "fixed_point"),
    [
        # Client m goes 1 − (1 − βa_m)² of its way, 7/16 and 15/16: weights 1/4 · 7/16 and 3/4 · 15/16.
        ("fedavg", {}, 45 / 52),
        ("scaffold", {"population": 2}, 9 / 10),
        ("scaffold", {"population": 2, "weighting": "uniform"}, 3 / 4),
        ("feddyn", {"population": 2, "dynamic_weight": 0.5}, 9 / 10),
        ("feddyn", {"population": 2, "dynamic_weight": 0.5, "weighting": "uniform"}, 3 / 4),
    ],
)
def test_drift_is_corrected_at_the_fixed_point(name, options, fixed_point):
    """Mistake: control variates or h_m of the wrong sign or size, which leave FedAvg's bias or make another; FedDyn's
    α_m not divided by the client's share; SCAFFOLD's c a uniform mean where examples count.

    Curvatures 1, 3, centres 0, 1, one and three examples, β = 1/4, two full-batch steps. Every example counting, the
    minimum is 3·3/(1 + 3·3) = 9/10; every client, 3/(1 + 3) = 3/4.
    """
    clients = [[[1, 0]], [[3, 1]] * 3]
    settings = {"loss": quadratic, "work": local_steps(2, 3), "local_rate": 0.25, "w0": (5.0,)}
    states, _ = play(name, [clients] * 120, **settings, **options)
    close(states.params[-1], [fixed_point], rtol=1e-8)


@TRANSCRIBED
@pytest.mark.parametrize(
    ("name", "fixed_point"), [("fednova", 0.00742525 / 0.00992525), ("fedavg", 0.02227575 / 0.02477575)]
)
def test_fednova_minimises_the_weighted_loss_whatever_the_numbers_of_steps(name, fixed_point):
    """Mistake: an average that is FedAvg's, in which clients with more steps count more.

    Curvature 1, centres 0, 1; one and three examples, as many steps: minimum 3/4. β = 1/100: client m goes
    ρ_m = 1 − 0.99^K of its way, 0.01 and 0.029701. FedNova weighs them by p_m ρ_m/K_m, 0.0025 and 0.00742525: 0.748,
    within β of the minimum; FedAvg by p_m ρ_m, 0.0025 and 0.02227575: 0.899.
    """
    clients = [[[1, 0]], [[1, 1]] * 3]
    settings = {"loss": quadratic, "work": local_epochs(1, 1), "local_rate": 0.01, "global_rate": 20.0}
    states, _ = play(name, [clients] * 60, **settings)
    close(states.params[-1], [fixed_point], rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "optimizer", "effective_steps"),
    [
        # a = β (1, 3), τ_eff = (1/2 + 3 · 3/2)/4
        product("fednova", None, 5 / 4),  # (transcribed)
        # ρ = 1/2: a = β (1, 1 + 3/2 + 7/4), τ_eff = (1/2 + 3 · 17/8)/4
        ("fednova", MOMENTUM, 55 / 32),
        # μ = 1: a = β (1, 1 + 1/2 + 1/4), but τ_eff is Σ p_m β K_m
        ("fedprox+fednova", None, 5 / 4),
    ],
)
def test_fednova_divides_by_what_the_gradients_weigh(name, optimizer, effective_steps):
    """Mistake: a_m = K_m for momentum or proximal clients; τ_eff as a uniform mean, or of a_m beside a proximal term.

    β = 1/2, one and three steps, p = (1/4, 3/4). Gradients 3 and −1 balance: no step at all, while FedAvg makes one.
    Gradients 4 and 4: 4 τ_eff.
    """
    options = {"proximal_weight": 1.0} if name != "fednova" else {}
    settings = {"work": local_epochs(1, 1), "local_rate": 0.5, "client_optimizer": optimizer}
    states, _ = play(name, [[[[3]], [[-1]] * 3], [[[4]], [[4]] * 3]], **settings, **options)
    close(states.params[:, 0], [0, -4 * effective_steps])


@TRANSCRIBED
def test_feddyn_adds_the_mean_of_all_clients_memories():
    """Mistake: the sign of h; its mean over the cohort instead of all N clients; no pull towards w^t.

    N = 4, β = 1, α = 1/2, two steps. With e = g + α h a client makes steps e and e − e/2: Δ = 3/2 e.
    Round 0, gradients 4, 8: Δ = 6, 12; mean 9; h = −6, −12, mean over all four −9/2; 9 + 9/2 = 27/2.
    Round 1, clients 0 and 2: e = 4 − 3 and 5: Δ = 3/2, 15/2; mean 9/2; h = −15/2, −12, −15/2, mean −27/4; in all 45/4.
    """
    clients = [[[4]], [[8]], [[5]], [[7]]]
    settings = {"work": local_steps(2, 1), "population": 4, "dynamic_weight": 0.5}
    states, _ = play("feddyn", [clients] * 2, cohorts=[[0, 1], [0, 2]], **settings)
    close(states.clients["dynamic_regularization"][-1], [[-7.5], [-12], [-7.5], [0]])
    close(states.params[:, 0], [-13.5, -24.75])


@pytest.mark.parametrize(("weighting", "updates"), [("examples", [12, 22]), ("uniform", [14, 21])])
def test_feddyn_weighs_its_regularizer_by_the_clients_share(weighting, updates):
    """Mistake: α_m = α · share, or α_m = α where examples count; or shares where every client does.

    One and three examples: shares of the mean size 1/2 and 3/2, α_m = 2α and 2α/3. α = 1/4, β = 1, gradients 8 and 12:
    steps g, then (1 − α_m) g: Δ = 8 + 4, 12 + 10. Uniformly 8 + 6, 12 + 9. Either way w moves by their plain mean,
    and as far again by that of h.
    """
    settings = {"work": local_steps(2, 3), "population": 2, "dynamic_weight": 0.25, "weighting": weighting}
    states, _ = play("feddyn", [[[[8]], [[12]] * 3]], **settings)
    close(states.clients["dynamic_regularization"], -np.array(updates, float).reshape(1, 2, 1))
    close(states.params, [[-2 * np.mean(updates)]])


@TRANSCRIBED
def test_fedcm_divides_its_momentum_by_each_clients_steps_and_rate():
    """Mistake: M not divided by K β, or by another client's K; a round 0 that uses all of g.

    a = 1/4, β = 1/4, one and three steps, p = (1/4, 3/4), gradients 8 and 4.
    Round 0, M = 0: directions 2, 1; Δ = (1/2 + 3 · 3/4)/4 = 11/16; M = (2 + 3)/4 = 5/4.
    Round 1: directions 2 + 15/16, 1 + 15/16; Δ = (47/64 + 3 · 93/64)/4 = 163/128; M = (47/16 + 3 · 31/16)/4 = 35/16.
    """
    clients = [[[8]], [[4]] * 3]
    settings = {"work": local_epochs(1, 1), "local_rate": 0.25, "gradient_weight": 0.25}
    states, _ = play("fedcm", [clients] * 2, **settings)
    close(states.terms["client_momentum"]["momentum"][:, 0], [5 / 4, 35 / 16])
    close(states.params[:, 0], [-11 / 16, -11 / 16 - 163 / 128])


@pytest.mark.parametrize("name", ["fedprox+fedcm", "fedcm+fedprox"])
def test_fedcm_mixes_the_loss_alone_and_undoes_the_proximal_pull(name):
    """Mistake: a proximal term that is mixed too, so that the order of the methods counts; M that holds its pull.

    g = 8, a = 1/4, μ = 1, β = 1/2, three steps: the mixed gradient is 2, and each step halves the way to go:
    Δ = 1 + 1/2 + 1/4 = 7/4, a_m = 1/2 + 1/4 + 1/8 = 7/8, M = 2.
    """
    settings = {"work": local_epochs(1, 1), "local_rate": 0.5, "gradient_weight": 0.25, "proximal_weight": 1.0}
    states, _ = play(name, [[[[8]] * 3]], **settings)
    close(states.params[0], [-7 / 4])
    close(states.terms["client_momentum"]["momentum"][0], [2])


def test_a_rate_that_moves_after_its_step_counts_as_it_was_used():
    """Mistake: Σ β_m^k of the authors' CL taken of the next steps' rates.

    SCAFFOLD's c_m of a constant gradient is that gradient, whatever the rates: 2/5.
    """
    settings = {"work": local_epochs(1, 1), "local_rate": 0.5, "population": 1}
    states, infos = play("reference_CL+scaffold", [[[[0.4]] * 3]] * 2, **settings)
    close(states.clients["control_variates"][:, 0], [[0.4], [0.4]])
    assert infos.client_rate_max[1] != 0.5


@TRANSCRIBED
def test_mime_lite_freezes_its_state_and_updates_it_from_the_full_gradient():
    """Mistake: a momentum that moves during local steps; a state updated from Δ, or from a uniform mean.

    μ = 1/2, β = 1/2, two full-batch steps, curvature 1; centres 0 (one example) and 2 (three); w^0 = 4.
    Round 0, s = 0: 4 → 2 → 1, and 2 → 1 → 1/2 from the centre: Δ = (3 + 3 · 3/2)/4 = 15/8.
      s = (4 + 3 · 2)/4 = 5/2, gradients at w^0 (uniform 3, from Δ 15/8).
    Round 1, w = 17/8, each direction with 5/4 added: 17/8 → 7/16 → −13/32, Δ = 81/32; 1/8 → −9/16 → −29/32, Δ = 33/32.
      Δ = (81 + 99)/128 = 45/32; s = (17/8 + 3/8)/4 + 5/4 = 15/8.
    """
    clients = [[[1, 0]], [[1, 2]] * 3]
    settings = {"loss": quadratic, "work": local_steps(2, 3), "local_rate": 0.5, "w0": (4.0,)}
    states, _ = play("mime_lite", [clients] * 2, momentum=0.5, **settings)
    close(states.params[:, 0], [17 / 8, 17 / 8 - 45 / 32])
    close(np.concatenate(jax.tree.leaves(states.terms["frozen_optimizer"])).ravel(), [5 / 2, 15 / 8])


# ---------------------------------------------------------------------------------------------------------------------
# Clients' own steps
# ---------------------------------------------------------------------------------------------------------------------


@TRANSCRIBED
def test_delta_sgd_compares_gradients_of_one_minibatch():
    """Mistake: the last step's gradient from its own minibatch, which measures the distance of centres as well.

    Two examples of curvature 2, centres 0 and 10, one a step: on one minibatch ‖g − g'‖ = 2 ‖w − w'‖, so β = γ/(2·2).
    """
    settings = {"loss": quadratic, "work": local_steps(2, 1), "local_rate": 0.01, "scale": 1.0, "growth": 1e6}
    _, infos = play("delta_sgd", [[[[2, 0], [2, 10]]]], w0=(3.0,), **settings)
    close(infos.client_rate_max, [1 / 4])


@TRANSCRIBED
def test_delta_sgd_grows_by_the_root_of_one_plus_the_last_growth():
    """Mistake: √(1 + θ) without δ; no root; a θ that is not remembered; a state that outlives the round.

    A linear loss has no curvature, so only the growth binds. δ = 3: β_0, √(1 + 3·1) β_0 = 2 β_0, √(1 + 3·2) 2 β_0.
    """
    states, _ = play("delta_sgd", steady(1, 1), work=local_steps(3, 1), local_rate=0.1, growth=3.0)
    step = 0.1 * (1 + 2 + 2 * math.sqrt(7))
    close(states.params[:, 0], [-step, -2 * step])


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"polyak_scale": 1.0}, 1 / 8),  # 1/(2cL)
        ({"polyak_scale": 0.25}, 1 / 2),
        ({"polyak_scale": 0.25, "local_rate": 0.3}, 0.3),  # the cap
        ({"polyak_scale": 0.25, "lower_bound": 9.0}, 1 / 4),  # (18 − 9)/(12²/4)
    ],
)
def test_fedsps_divides_the_gap_by_the_squared_gradient(options, rate):
    """Mistake: ‖g‖ not squared; no c; no lower bound; no cap.

    L = 4, minimum 0 at 0, w = 3: F = 18, g = 12, F/(c g²) = 1/(2 c L).
    """
    states, infos = play("fedsps", [[[[4, 0]]]], loss=quadratic, w0=(3.0,), **options)
    close(infos.client_rate_max, [rate])
    close(states.params, [[3 - 12 * rate]])


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 1 / 5),  # σ/(1 + σL)
        ({"local_rate": 1e6}, 1e6 / (1 + 4e6)),  # Polyak's F/(g²/2) = 1/L
        ({"lower_bound": 9.0}, 1 / 9),  # 1/(1 + 12²/(2 (18 − 9)))
        ({"lower_bound": 20.0}, 0.0),
    ],
)
def test_ngn_divides_sigma_by_one_and_what_it_would_overshoot(options, rate):
    """Mistake: F for 2F; no lower bound; a step against the gradient where the loss is below it.

    L = 4, minimum 0 at 0, w = 3: F = 18, g = 12.
    """
    states, infos = play("ngn", [[[[4, 0]]]], loss=quadratic, w0=(3.0,), **options)
    close(infos.client_rate_max, [rate])
    close(states.params, [[3 - 12 * rate]])


@pytest.mark.parametrize(("decrease", "found"), [(0.1, 0.75**3), (0.5, 0.75**5)])
def test_fedsls_takes_the_longest_step_that_decreases_enough(decrease, found):
    """Mistake: c left out, or with ‖g‖; the first step too long; searches that start over, or never do.

    On a quadratic of curvature L Armijo's condition is β ≤ 2(1 − c)/L: 0.45 and 0.25 for L = 4. On the grid 0.75^j that
    is 0.421875 (j = 3) and 0.2373046875 (j = 5). The second search starts 2^(1/500) longer, which still serves; the
    next round starts at 1 again.
    """
    settings = {"loss": quadratic, "work": local_steps(2, 1), "w0": (3.0,), "shrink": 0.75}
    states, infos = play("fedsls", [[[[4, 0]]]] * 2, decrease=decrease, **settings)
    second = found * 2 ** (1 / 500)
    close(infos.client_rate_max, [second] * 2)
    close(states.params[:, 0], 3 * ((1 - 4 * found) * (1 - 4 * second)) ** np.array([1, 2]))


# ---------------------------------------------------------------------------------------------------------------------
# The authors' code
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["G", "GM", "FedAdam", "FULL"])
def test_servers_of_the_authors_code_follow_the_hand_traces(variant):
    """Mistake: weights by examples; α moved in round 0; GM's product with Δ^{t-1}; momentum not multiplied by agg; agg
    remembered before it is clipped; FedAdam's second moment of x, corrections that depend on t, τ outside the root.

    FULL's server is given its trace's mean changes v by clients of one step, whose rates never move.
    """
    trace = HAND_TRACES[variant]
    if variant == "FULL":
        rounds = [[[-2 * np.array(v)]] for v in trace["v"]]
    else:
        rounds = [[rows * trace["num_examples"][m] for m, rows in clients.items()] for clients in trace["gradients"]]
    states, infos = play(f"reference_{variant}", rounds, w0=trace["w0"], local_rate=trace["beta"])
    close(infos.global_rate - 1, trace["agg"])
    close(states.params, trace["w"])
    close(states.pseudo_gradient, -np.array(trace["v"]))


@pytest.mark.parametrize("trace", ["CL", "CL_upper_bound"])
def test_clients_of_the_authors_code_follow_the_hand_traces(trace):
    """Mistake: the first batch of an epoch counted or remembered; u a gradient instead of a change; b moved before
    its step instead of after; no cap of 1.1, no 1/S; b that outlives the round."""
    trace = HAND_TRACES[trace]
    last = np.zeros(3)

    def transform(facts):
        return reference_local_rule().transform((), jnp.asarray(trace["beta"]), facts)

    update_fn = jax.jit(lambda facts, *args, **more: transform(facts).update(*args, **more))
    for t, clients in enumerate(trace["gradients"]):
        changes = []
        for m, gradients in clients.items():
            facts = ClientFacts(len(gradients), trace["steps_per_epoch"][m], 1.0, 1.0, len(clients))
            state, used, changed = transform(facts).init(jnp.zeros(3)), [], np.zeros(3)
            for gradient in gradients:
                used.append(state.multiplier)
                change, state = update_fn(facts, -jnp.asarray(gradient), state, global_update=-jnp.asarray(last))
                changed = changed + change
            close(used, trace["multipliers"][t][m])
            close(state.multiplier, trace["final_multipliers"][t][m])
            changes.append(changed)
        last = np.mean(changes, axis=0)
        close(last, trace["v"][t])


@pytest.mark.parametrize(("variant", "second"), [("CL", -1.2168), ("FULL", -1.595854592)])
def test_authors_client_rates_see_epochs_cohorts_and_the_last_round(variant, second):
    """Mistake: epochs, the cohort's size or the previous round's change not passed on; FULL with v scaled by α.

    Two equal clients, two examples, two epochs of two steps; β = 1/2. Round 0, g = 2/5: u = −1/5, and no step has seen
    b move: k = 1 meets u_prev = 0, k = 2 begins an epoch; Δ = 4/5 (0.808 if k = 2 counted). Round 1, g = 1/5: u =
    −1/10, b = 1 + 0.1/2 · 0.08 + 0.08 = 1.084 from k = 2 on: Δ = 2/10 + 2 · 0.1084 = 0.4168.
    FULL: agg = 0.8 · 0.4168 = 0.33344; w = −0.8 − 1.33344 · 0.4168 − 0.9 · 0.33344 · 0.8 = −1.595854592.
    """
    rounds = [[[[gradient]] * 2] * 2 for gradient in (0.4, 0.2)]
    states, _ = play(f"reference_{variant}", rounds, work=local_epochs(2, 1), local_rate=0.5)
    close(states.params[:, 0], [-0.8, second])


def test_sl_of_the_authors_code_is_fedavg_exactly():
    """Mistake: an SL that acts, or weights by examples: there local rates are rebuilt at the top of each round."""
    clients = [[[1, 0]], [[3, 1]] * 3]
    settings = {"loss": quadratic, "work": local_steps(2, 3), "local_rate": 0.1, "w0": (5.0,)}
    states, infos = play("reference_SL", [clients] * 3, **settings)
    expected, _ = play("fedavg", [clients] * 3, weighting="uniform", **settings)
    np.testing.assert_array_equal(states.params, expected.params)
    np.testing.assert_array_equal(infos.local_rate, [0.1] * 3)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

TWO_RULES = "two rules for one thing"
STEP_LENGTH = "step along the gradient"


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("fedexp+G", {}, f"both set the global rate, and {TWO_RULES}"),
        ("decay_global+G", {}, f"both set the global rate, and {TWO_RULES}"),
        ("plateau_global+fedexp", {}, f"both set the global rate, and {TWO_RULES}"),
        ("server_mechanic+G", {}, f"both set the global rate, and {TWO_RULES}"),
        ("decay_local+SL", {}, f"both set the local rate, and {TWO_RULES}"),
        ("fathom+plateau_local", {}, f"both set the local rate, and {TWO_RULES}"),
        ("delta_sgd+CL", {}, f"both set the client rule, and {TWO_RULES}"),
        ("fedsps+fedsls", {}, f"both set the client rule, and {TWO_RULES}"),
        ("fedadam+fedavgm", {}, f"both set the server optimizer, and {TWO_RULES}"),
        ("fedyogi", {"server_optimizer": optax.sgd(1.0)}, f"both set the server optimizer, and {TWO_RULES}"),
        ("fedprox+fedprox", {}, "names one twice"),
        ("fedprox", {"momentum": 0.9}, "takes no momentum; it takes .*proximal_weight"),
        ("server_mechanic", {"global_rate": 0.5}, "takes no global_rate"),
        ("fedexp", {"global_rate": 0.5}, "takes no global_rate"),
        ("scaffold", {}, "a row for each client; give population"),
        ("feddyn", {}, "a row for each client; give population"),
        ("CL", {"client_rates": "per_client"}, "a rate for each client; give population"),
        ("SL+CL", {"client_rates": "per_client", "population": 2}, "with SL: two rules for one rate"),
        ("decay_local+CL", {"client_rates": "warm"}, "needs a number as local_rate: rates go on from the last ones"),
        ("decay_local+CL", {}, "outside CL's local_bounds"),
        ("CL", {"local_bounds": "absolute", "local_rate": 0.01}, "outside the absolute bounds.*'relative'"),
        ("delta_sgd", {"client_optimizer": MOMENTUM}, f"{STEP_LENGTH}: leave client_optimizer out"),
        ("fedsps", {"client_optimizer": MOMENTUM}, f"{STEP_LENGTH}: leave client_optimizer out"),
        ("ngn", {"client_optimizer": MOMENTUM}, f"{STEP_LENGTH}: leave client_optimizer out"),
        ("fedcm+ngn", {}, "lower bound, but client_momentum adds a linear term"),
        ("fedsls", {"client_optimizer": optax.adam(1.0)}, f"{STEP_LENGTH}: leave client_optimizer out"),
        ("mime_lite+delta_sgd", {}, f"{STEP_LENGTH}, but frozen_optimizer changes the direction"),
        ("scaffold+fedsps", {"population": 2}, "lower bound, but control_variates adds a linear term"),
        ("feddyn+fedsps", {"population": 2}, "lower bound, but dynamic_regularization adds a linear term"),
        ("fedcm+fedsps", {}, "lower bound, but client_momentum adds a linear term"),
        ("mime_lite", {"client_optimizer": MOMENTUM}, "MIME-lite's optimizer is the client's"),
        ("scaffold+mime_lite", {"population": 2}, "mean of a client's gradients.*changes the direction"),
        ("mime_lite+fedcm", {}, "mean of the clients' gradients.*changes the direction"),
        ("mime_lite+fednova", {}, "the weight its gradients got.*changes the direction"),
        ("scaffold", {"population": 2, "client_optimizer": optax.adam(1.0)}, "only a linear client optimizer gives"),
        ("fednova", {"client_optimizer": optax.adam(1.0)}, "only a linear client optimizer gives"),
        ("fedcm", {"client_optimizer": optax.sign_sgd(1.0)}, "only a linear client optimizer gives"),
        ("fednova+feddyn", {"population": 2}, "each define the server's step"),
        ("feddyn+fedexp", {"population": 2}, "FedExP extrapolates a mean of client updates, but"),
    ],
)
def test_methods_without_a_meaning_together_are_refused_with_the_reason(name, options, reason):
    """Mistake: one of the two silently without effect, or a formula whose premise does not hold."""
    with pytest.raises(ValueError, match=reason):
        make_method(name, linear, **{"work": ONE_STEP, "local_rate": 0.1, **options})


COMMON = {"work": ONE_STEP, "local_rate": 0.1}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: fedexp(linear, global_rate=2.0, **COMMON), "computes its global rate from the updates"),
        (lambda: server_mechanic(linear, global_rate=2.0, **COMMON), "nothing else may scale its step"),
        (lambda: fedprox(linear, terms=[terms.proximal(0.1)], **COMMON), "'proximal' twice"),
        (lambda: fedavg(linear, terms=["proximal"], **COMMON), "terms must be LocalTerm"),
        (lambda: fedavg(linear, terms=[terms.dynamic_regularization(2)], **COMMON), "FedDyn averages.*uniformly"),
        (lambda: fedhyper(linear, "G", global_rate=optax.constant_schedule(1.0), **COMMON), "two rules for one rate"),
        (lambda: fedhyper(linear, "SL", work=ONE_STEP, local_rate=rates.scheduled(0.1)), "two rules for one rate"),
        (lambda: fedhyper(linear, "G", client_rates="warm", **COMMON), "needs CL, which moves the clients' rates"),
        (lambda: fedhyper(linear, "G", global_weight=0.5, **COMMON), "global term, but .* has no CL"),
        (lambda: fedhyper(linear, "CL", population=2, **COMMON), "belongs to client_rates='per_client'"),
        (lambda: fedhyper(linear, "G", variant="reference", hyper_rate=0.5, **COMMON), "fixes hyper_rate"),
        (
            lambda: fedhyper(
                linear, "GM", variant="reference", server_optimizer=server_optimizers.momentum(), **COMMON
            ),
            "fixes both rates and the server's step",
        ),
        (
            lambda: federated_algorithm(
                linear,
                work=ONE_STEP,
                global_rate=rates.scheduled(1.0),
                local_rate=rates.scheduled(0.1),
                client_rule=client_rules.broadcast_rate(),
                client_rates_of=2,
            ),
            r"need a client rule that moves them \(CL\)",
        ),
    ],
)
def test_parts_without_a_meaning_together_are_refused_with_the_reason(make, reason):
    """Mistake: as above, where the parts are put together by hand."""
    with pytest.raises(ValueError, match=reason):
        make()
