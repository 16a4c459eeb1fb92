"""The rule of the retained gain: what it makes of sums, and how a round hears a rule that judges it."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedhyper_jax as fh
from fedhyper_jax.data import Cohort, local_steps, pack
from fedhyper_jax.engine import federated_algorithm
from fedhyper_jax.parts import Feedback, RateReport, RateRule, failures, guards, rates, terms
from fedhyper_jax.parts.rates._retained import Look
from tests.compare import assert_identical


@pytest.fixture(scope="module", autouse=True)
def wide():
    """All of this module runs in float64."""
    with jax.enable_x64(True):
        yield


def feedback(gain, predicted, descent, squared_norm=0.0, curvature=0.0, failed=0.0):
    look = Look(*(jnp.asarray(x, float) for x in (gain, predicted, descent, squared_norm, curvature)))
    return Feedback(jnp.int32(1), jnp.zeros(()), reported=look, failed=jnp.asarray(failed, float))


def moved(told, state=None, **settings):
    """The state of a rule that began with the rate 1, after a round."""
    rule = rates.retained_gain(1.0, **{"start": "given", **settings})
    return rule.update(rule.init(jnp.zeros(2)) if state is None else state, told)[0]


# ------------------------------------------------------------------------------------------------ sums


def test_only_weighted_sums_reach_the_server():
    """Of numbers that clients masked before they sent them, as secure aggregation has it, it makes the same state; and
    of those of quite other clients, as long as their sums are the same.
    """
    rng = np.random.default_rng(0)
    weights = np.array([0.1, 0.2, 0.3, 0.4])[:, None]
    looks = rng.uniform(0.5, 1.5, (4, 5)) * [0.4, 1.0, 0.6, 1.0, 1.0]
    masks = rng.normal(size=(4, 5)) * 100
    masks -= masks.mean(axis=0)
    others = rng.uniform(0.5, 1.5, (4, 5))
    others[3] += (np.sum(weights * (looks - others), axis=0)) / weights[3]
    plain, masked, of_others = (
        np.sum(sent, axis=0) for sent in (weights * looks, weights * looks + masks, weights * others)
    )
    for start in ("given", "measured"):
        expected = moved(feedback(*plain), start=start)
        assert expected.rate != 1.0
        for sums in (masked, of_others):
            state = moved(feedback(*sums), start=start)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), state, expected)


def test_where_nothing_is_known_of_the_curvature_the_given_rate_is_used():
    """A loss that is straight along its gradient, one without gradient, and one whose curvature has no number."""
    for squared_norm, curvature in ((2.0, 0.0), (0.0, 0.0), (2.0, np.nan), (np.inf, 1.0)):
        state = moved(feedback(0, 0, 0, squared_norm, curvature), start="measured")
        assert float(state.rate) == 1.0 and bool(state.measured) and bool(state.counts)
    assert float(moved(feedback(0, 0, 0, 2.0, -4.0), start="measured").rate) == 0.25 * 2 / 4  # a concave direction


# A = 0.4 P and n = 1, unless said otherwise: ρ = 0.4, above ρ* = 0.35.
@pytest.mark.parametrize(
    ("sent", "failed", "factor"),
    [
        ((0.4, 1.0, 1.0), 0.0, np.exp(2 * 0.05)),
        ((0.9, 1.0, 1.0), 0.0, 1.69),  # ρ > 0.85
        ((0.8, 1.0, 1.0), 0.0, 1.3),
        ((0.06, 1.0, 1.0), 0.0, np.exp(-2 * 0.29)),  # just above ρ*/6
        ((0.05, 1.0, 0.5), 0.0, 0.1),  # taken back: ρ ≤ ρ*/6
        ((0.4, 1.0, 8.5), 0.0, 0.1),  # taken back: A ≤ E/20; the share itself is good
        ((0.4, -1.0, 1.0), 0.0, 1.0),  # a gain that was not predicted tells nothing
        ((0.0, 0.0, 1.0), 0.0, 1.69),  # nothing moved, in the parameters' digits
        ((np.nan, 1.0, 1.0), 0.0, 0.1),
        ((0.4, 1.0, 1.0), 0.5, 0.1),
        ((0.4, 1.0, 1.0), 0.49, np.exp(2 * 0.05)),
    ],
)
def test_one_round_by_hand(sent, failed, factor):
    """From the rate 1: the next rate, and what else a round that is taken back leaves behind."""
    state = moved(feedback(*sent, failed=failed), coherence_power=0.0)
    assert float(state.rate) == pytest.approx(factor, rel=1e-12)
    taken_back = factor == 0.1
    assert bool(state.counts) != taken_back
    assert bool(state.found) == (factor > 1)  # ρ > ρ*
    assert float(state.ceiling) == (0.5 if taken_back else np.inf)
    assert float(state.predicted) == (0.0 if taken_back else sent[1])


@pytest.mark.parametrize(
    ("sent", "failed", "tolerance", "factor", "taken_back"),
    [
        ((0.05, 1.0, 0.5), 0.0, 0.0, 0.5, True),  # P − A = 0.95 is beyond 1 − ρ*/6 = 0.94
        ((0.06, 1.0, 0.5), 0.0, 0.0, np.exp(-2 * 0.29), False),
        ((0.05, 1.0, 0.5), 0.0, 0.1, np.exp(-2 * 0.3), False),
        ((0.3, 1.0, 6.5), 0.0, 0.0, 0.5, True),  # A ≤ E/20 ≤ P − A
        ((0.3, 1.0, 6.5), 0.0, 0.4, np.exp(-2 * 0.05), False),  # 0.7 < 0.325 + 0.4
        ((0.96, 1.0, 19.3), 0.0, 0.0, 0.5, True),
        ((0.96, 1.0, 19.3), 0.0, 0.1, 1.69, False),  # P − A is less
        ((0.0, 0.1, 1.0), 0.0, 0.0, 0.5, True),
        ((-0.1, 0.1, 1.0), 0.0, 0.3, np.exp(-2 * 0.135 / 0.64), False),  # 0.2 < 0.094 + 0.3 P̄, P̄ = 0.6 + 0.04
        ((-0.2, 0.1, 1.0), 0.0, 0.3, 0.5, True),
        ((-0.22, -0.2, 1.0), 0.0, 0.0, 0.5, True),
        ((-0.22, -0.2, 1.0), 0.0, 0.3, np.exp(2 * (-0.22 + 0.07) / 0.52), False),  # nearly as was predicted
        ((np.nan, 1.0, 1.0), 0.0, 9.0, 0.5, True),
        ((0.4, 1.0, 1.0), 0.5, 9.0, 0.5, True),
        ((0.2, -0.2, 0.2), 0.0, 0.0, 1.3, False),  # P̄ = 0.6 − 0.4 · 0.2
    ],
)
def test_one_round_of_a_rate_that_is_found(sent, failed, tolerance, factor, taken_back):
    """After a round of A = 0.4, P = E = 1 at the rate 1, from the rate 1 again."""
    settings = {"coherence_power": 0.0, "tolerance": tolerance}
    found = moved(feedback(0.4, 1.0, 1.0), **settings)._replace(rate=jnp.asarray(1.0))
    state = moved(feedback(*sent, failed=failed), found, **settings)
    assert float(state.rate) == pytest.approx(factor, rel=1e-12)
    assert bool(state.counts) != taken_back and bool(state.found)
    assert float(state.ceiling) == (0.5 if taken_back else np.inf)


def test_the_target_falls_with_the_coherence_up_to_its_limit():
    """With ρ at ρ* the rate stays: ρ* = 0.35 · min(n, 5)^−0.2."""
    for steps, target in ((4.0, 0.35 * 4**-0.2), (20.0, 0.35 * 5**-0.2), (0.5, 0.35 * 2**0.2)):
        assert float(moved(feedback(target, 1.0, 1 / steps)).rate) == pytest.approx(1.0, rel=1e-12)
    assert float(moved(feedback(0.35, 1.0, -1.0)).rate) == pytest.approx(1.0, rel=1e-12)  # n = 1 where E ≤ 0


def test_averages_and_ceiling_over_rounds_by_hand():
    """Averages are of P over the rate; the ceiling is half the rate that failed, and grows. Above ρ* = 0.35."""
    settings = {"coherence_power": 0.0}
    one = moved(feedback(0.4, 1.0, 1.0), **settings)
    rate = float(one.rate)
    two = moved(feedback(0.9, 3.0, 3.0), one, **settings)
    slope = 0.6 * 1.0 + 0.4 * 3.0 / rate
    assert float(two.predicted) == pytest.approx(slope, rel=1e-12)
    assert float(two.rate / one.rate) == pytest.approx(np.exp(2 * (0.9 - 0.35 * 3) / (rate * slope)), rel=1e-12)
    failed = moved(feedback(-9.0, 1.0, 1.0), two, **settings)
    assert float(failed.rate) == pytest.approx(0.5 * float(two.rate), rel=1e-12)
    assert float(failed.ceiling) == pytest.approx(0.5 * float(two.rate), rel=1e-12)
    assert (failed.predicted, failed.descent) == (two.predicted, two.descent)
    state = failed
    for number in range(1, 9):
        state = moved(feedback(0.9, 1.0, 1.0), state, **settings)
        assert float(state.rate) == pytest.approx(float(two.rate) * 0.5 * 1.03**number, rel=1e-12)


def test_the_rate_rests_where_the_mean_gain_is_its_share_of_the_mean_prediction():
    """Of rounds that scatter the ratio of means counts; the mean of ratios would put the rate at 1.08, not 0.80.

    Parabolas, P = s β and A = P (1 − λβ/2): one round in ten has λ = 3 and s = 4, the others λ = 1 and s about 1.
    """
    rule = rates.retained_gain(
        0.01, start="given", hyper_rate=0.02, memory=0.99, coherence_power=0.0, tolerance=9.0
    )
    rng = np.random.default_rng(0)
    sharp = rng.random(6000) < 0.1
    scale, curvature = np.where(sharp, 4.0, rng.uniform(0.5, 1.5, 6000)), np.where(sharp, 3.0, 1.0)

    def one_round(state, parabola):
        scale, curvature = parabola
        predicted = scale * state.rate
        told = feedback(predicted * (1 - state.rate * curvature / 2), predicted, predicted)
        return rule.update(state, told)[0], state.rate

    path = np.asarray(jax.jit(lambda *of: jax.lax.scan(one_round, rule.init(jnp.zeros(2)), of)[1])(scale, curvature))
    assert np.mean(path[3000:]) == pytest.approx(2 * (1 - 0.35) * (0.9 + 0.4) / (0.9 + 0.4 * 3), rel=0.05)


def test_a_guard_that_takes_a_round_back_halves_the_rate():
    """And sets the ceiling; of a round that measured it takes nothing, and a rule that does not act stays."""
    rule = rates.retained_gain(1.0, start="given")
    before = rule.init(jnp.zeros(2))
    after = rule.refused(before, rule.update(before, feedback(0.9, 1.0, 1.0))[0])
    assert (float(after.rate), float(after.ceiling), bool(after.found)) == (0.5, 0.5, False)
    failed = rule.update(before, feedback(0.0, 1.0, 1.0))[0]
    assert_identical(rule.refused(before, failed), failed)  # what it refused itself has its factor already

    rule = rates.retained_gain(1.0)
    measured = rule.update(rule.init(jnp.zeros(2)), feedback(0, 0, 0, 2.0, 4.0))[0]
    assert_identical(rule.refused(rule.init(jnp.zeros(2)), measured), measured)

    rule = rates.retained_gain(1.0, start="given", hyper_rate=0.0)
    assert rule.refused(rule.init(jnp.zeros(2)), rule.update(before, feedback(0.9, 1.0, 1.0))[0]).rate == 1.0


def test_values_without_meaning_are_refused():
    for settings, message in (
        ({"target_share": 1.0}, "target_share must lie strictly between 0 and 1, got 1.0"),
        ({"memory": 1.0}, "memory must be below 1, got 1.0"),
        ({"growth": 0.9}, "growth must be at least 1, got 0.9"),
        ({"ceiling_growth": 0.5}, "ceiling_growth must be at least 1, got 0.5"),
        ({"first_step": 0.0}, "first_step must be"),
        ({"start": "guessed"}, "unknown start .guessed.; known: measured, given"),
    ):
        with pytest.raises(ValueError, match=message):
            rates.retained_gain(1.0, **settings)
    with pytest.raises(ValueError, match="local_rate must be"):
        rates.retained_gain(-1.0, name="local_rate")


# ------------------------------------------------------------------------------------------------ rounds


SIZES = (1, 2, 3, 4)


def loss_fn(w, batch):
    """(w − x)² / 2, times and plus what the data say."""
    return (w - batch["x"]) ** 2 / 2 * batch["factor"] + batch["offset"]


def clients(*, broken=(), offset=0.0):
    """Client m has m + 1 examples, all of them m; the losses of ``broken`` have no number."""
    owner = np.repeat(np.arange(4), SIZES)
    columns = {"x": owner.astype(float), "factor": np.ones(10), "offset": np.full(10, offset)}
    data = pack(columns, [np.flatnonzero(owner == m) for m in range(4)])
    factor = jnp.where(np.isin(owner, broken), jnp.nan, data.examples["factor"])
    return dataclasses.replace(data, examples={**data.examples, "factor": factor})


def cohort(data):
    return Cohort(data=data, client_ids=jnp.arange(4, dtype=jnp.int32))


class SpyState(NamedTuple):
    rate: jax.Array
    counts: jax.Array  # whether it accepts rounds
    told: jax.Array  # rounds that were taken back
    failed: jax.Array
    reported: tuple


def spy(rate):
    """A rule of the local rate that keeps what it is told, and accepts rounds or not, as its state says."""

    def init(params):
        zero = jnp.zeros(())
        return SpyState(jnp.asarray(rate), jnp.array(True), jnp.int32(0), zero, (zero, zero, zero))

    def report(state, params, result):
        return optax.tree.sum(result.update), optax.tree.sum(result.displacement), state.rate * params

    def update(state, feedback):
        reported = tuple(x.astype(float) for x in feedback.reported)
        return state._replace(failed=feedback.failed, reported=reported), RateReport.none()

    return RateRule(
        init=init,
        update=update,
        initial_rate=rate,
        report=report,
        refused=lambda before, moved: moved._replace(told=before.told + 1),
        accepts=lambda moved: moved.counts,
        observed=lambda state: 7 * state.rate,
    )


@pytest.fixture(scope="module")
def spied():
    """The state before round 0, and the compiled round, of FedNova with a spy, a guard and updates that may be lost."""
    algorithm = federated_algorithm(
        loss_fn,
        work=local_steps(2, batch_size=1),
        global_rate=rates.hypergradient(1.0),
        local_rate=spy(0.5),
        terms=[terms.normalized_averaging()],
        guard=guards.rollback(2.0),
        failure_model=failures.dropout(after=1e-9),
    )
    round_fn = jax.jit(algorithm.round)
    return algorithm.init(jnp.asarray(1.0)), lambda state, data: round_fn(jax.random.key(0), state, cohort(data))


def with_rate(state, **fields):
    """A state whose rule of the local rate has other fields."""
    return dataclasses.replace(state, local_rate=state.local_rate._replace(**fields))


def test_a_rule_is_told_of_displacements_and_of_its_own_state(spied):
    """By hand: two steps of rate β from w = 1 leave (1 − β)² of the way to m. FedNova averages Δ_m / a_m, a_m = 2β."""
    start, play = spied
    away = np.dot([0.1, 0.2, 0.3, 0.4], 1 - np.arange(4.0))
    for rate in (0.5, 0.25):
        after, info = play(with_rate(start, rate=jnp.asarray(rate)), clients())
        update, displacement, own = (float(x) for x in after.local_rate.reported)
        assert displacement == pytest.approx((1 - (1 - rate) ** 2) * away, rel=1e-12)
        assert update == pytest.approx(displacement / (2 * rate), rel=1e-12)
        assert own == rate
        assert float(info.retained_share) == 7 * rate  # `observed`


def test_a_rule_is_told_the_share_of_weight_that_failed(spied):
    """Of rounds without a usable client too, but of none whose results were all lost: they say nothing of the rate."""
    start, play = spied
    for broken, failed, told in (((), 0.0, 0), ((1, 3), 0.6, 0), ((0, 1, 2, 3), 1.0, 1)):
        after, info = play(start, clients(broken=broken))
        assert float(after.local_rate.failed) == pytest.approx(failed, rel=1e-12)
        assert (int(after.local_rate.told), int(info.participants)) == (told, 4 - len(broken))
    lost = dataclasses.replace(start, failures=jax.tree.map(lambda x: jnp.ones_like(x), start.failures))
    after, info = play(lost, clients())
    assert int(info.lost) == 4 and int(after.local_rate.told) == 0
    assert_identical(after.local_rate, start.local_rate)


def test_a_round_that_a_rule_does_not_accept_is_taken_back(spied):
    """Parameters and Δ^{t-1} stay, the other rate's rule is told, the guard has not seen the round."""
    start, play = spied
    before, _ = play(start, clients())
    after, info = play(with_rate(before, counts=jnp.array(False)), clients(offset=0.5))
    assert (int(info.taken_back), int(info.participants)) == (1, 4)
    for name in ("params", "pseudo_gradient", "server_optimizer", "terms", "guard"):
        assert_identical(getattr(after, name), getattr(before, name))
    assert float(after.global_rate.rate) == float(before.global_rate.rate) / 2  # as G does when it is told
    assert (int(after.local_rate.told), int(after.round)) == (1, 2)
    guarded, info = play(before, clients(offset=50.0))  # one that the guard takes back, and the rule would have
    assert int(info.taken_back) == 1 and int(guarded.local_rate.told) == 1
    assert int(guarded.guard.refusals) == 1


def test_clients_that_do_not_count_their_descent_are_refused():
    algorithm = fh.fedavg(loss_fn, work=local_steps(1, batch_size=1), local_rate=rates.retained_gain(0.1))
    with pytest.raises(ValueError, match=r"give client_rules.counted_descent\(\) as client_rule"):
        jax.eval_shape(algorithm.round, jax.random.key(0), algorithm.init(0.5), cohort(clients()))
