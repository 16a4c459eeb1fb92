"""`retained_gain` against its transcription, closed forms, and what must not matter to it: offset, scale and start.

One compiled round of softmax regression, whose data carry the scale and the offset of the loss, serves most tests:
other settings, starts and losses are other data for it. The rule by itself: tests/parts/test_retained_gain.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedhyper_jax as fh
from fedhyper_jax.data import Cohort, local_steps, pack
from fedhyper_jax.methods import make_method
from fedhyper_jax.parts import rates
from tests.algorithms import EPOCHS, loss_fn
from tests.bench import CLASSES, SIZES, drawn_batches, examples, federation, poisoned, run_key, sampled_cohorts
from tests.compare import assert_close, assert_identical, cast
from tests.duel import flatten
from tests.helpers import product
from tests.reference import retained_gain_numpy as oracle
from tests.reference.fedhyper_numpy import softmax_regression

ROUNDS = 24


@pytest.fixture(scope="module", autouse=True)
def wide():
    """All of this module runs in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def round_fn():
    """Compiled once."""
    return jax.jit(fh.retained_gain(loss_fn, work=EPOCHS).round)


def params():
    """A bias of zeros, which even the smallest rate moves, and small weights."""
    weights = 0.1 * np.random.default_rng(5).normal(size=(5, CLASSES))
    return {"weights": jnp.asarray(weights), "bias": jnp.zeros(CLASSES)}


def begin(**settings):
    return fh.retained_gain(loss_fn, work=EPOCHS, **settings).init(params())


def play(round_fn, state, rounds=ROUNDS, data=None):
    """States and records, the records as one."""
    data, states, infos = federation("float64") if data is None else data, [state], []
    for ids in sampled_cohorts(rounds):
        state, info = round_fn(run_key(), state, Cohort(data=data, client_ids=jnp.asarray(ids, jnp.int32)))
        states.append(state)
        infos.append(info)
    return states, jax.tree.map(lambda *leaves: np.array(leaves), *infos)


def of_loss(*, factor=1.0, offset=0.0):
    """The federation whose losses are ``factor`` times as large, and by ``offset`` larger."""
    data = federation("float64")
    column = jnp.ones_like(data.examples["factor"])
    return dataclasses.replace(
        data, examples={**data.examples, "factor": factor * column, "offset": offset * column}
    )


def problem():
    arrays, _ = examples()
    return softmax_regression(arrays["x"], arrays["y"], CLASSES)


# ------------------------------------------------------------------------------------------------ the transcription

FAR_TOO_LARGE = {"start": "given", "local_rate": 300.0}


@pytest.mark.parametrize(
    ("settings", "taken_back"),
    [
        ({}, [16, 21]),
        (FAR_TOO_LARGE, [0, 1, 2, 16, 21]),
        ({"target_share": 0.5, "coherence_power": 0.4, "share_rate": 1.0, "global_hyper_rate": 0.7}, None),
    ],
    ids=["measured", "far too large", "other settings"],
)
def test_equals_the_transcription(round_fn, settings, taken_back):
    """Round after round: rates, share, target, verdict, ceiling and parameters."""
    states, infos = play(round_fn, begin(**settings))
    records = oracle.run(
        problem(),
        flatten(params()),
        sampled_cohorts(ROUNDS),
        drawn_batches(ROUNDS),
        np.array(SIZES),
        **{"local_rate": 0.1, **settings},
    )
    expected = oracle.Record(*(np.array(column) for column in zip(*records, strict=True)))
    if taken_back is not None:
        assert np.flatnonzero(expected.taken_back).tolist() == taken_back
    after = states[1:]
    measured = settings.get("start") != "given"
    actual = oracle.Record(
        global_rate=np.array([float(state.global_rate.rate) for state in after]),
        # (as good as none)
        local_rate=np.where((np.arange(ROUNDS) == 0) & measured, 0.0, infos.local_rate),
        share=infos.retained_share,
        target=expected.target,
        taken_back=infos.taken_back,
        w=np.array([flatten(state.params) for state in after]),
        next_rate=np.array([float(state.local_rate.rate) for state in after]),
        ceiling=np.array([float(state.local_rate.ceiling) for state in after]),
    )
    for name, value in actual._asdict().items():
        np.testing.assert_allclose(value, getattr(expected, name), rtol=1e-9, atol=1e-12, err_msg=name)


def test_the_round_that_measures_moves_nothing(round_fn):
    """In no norm: Δ^0, which a bias of zeros gives, is no direction for the global rate to compare with."""
    for dtype in (jnp.float64, jnp.float32):
        rate = fh.retained_gain(loss_fn, work=EPOCHS).init(cast(params(), dtype)).local_rate.rate
        assert rate.dtype == dtype and rate > 0 and (1e3 * rate) ** 2 == 0
    states, infos = play(round_fn, begin(), rounds=3)
    assert np.sum(flatten(states[1].pseudo_gradient) ** 2) == 0
    assert infos.global_rate[:2].tolist() == [1, 1] and infos.global_rate[2] != 1
    assert infos.taken_back[0] == 0 and infos.participants[0] == len(sampled_cohorts(1)[0])


# ------------------------------------------------------------------------------------------------ what must not matter


def test_a_constant_added_to_the_loss_changes_nothing(round_fn):
    """The first rate bit for bit, as gradients alone make it; all else to the rounding of losses near 3."""
    states, infos = play(round_fn, begin(), data=of_loss(offset=2.0))
    expected_states, expected = play(round_fn, begin())
    assert infos.local_rate[1] == expected.local_rate[1]
    for name in ("local_rate", "global_rate", "retained_share"):
        np.testing.assert_allclose(getattr(infos, name), getattr(expected, name), rtol=1e-11, err_msg=name)
    assert_close(states[-1].params, expected_states[-1].params, 1e-11)


@pytest.mark.parametrize("factor", [4.0, 0.25, 10.0])
@pytest.mark.parametrize("start", ["measured", "given"])
def test_the_scale_of_the_loss_divides_the_local_rate_and_changes_nothing_else(round_fn, factor, start):
    """By a power of 2 bit for bit: parameters, α, shares, verdicts; by 10 to rounding."""
    states, infos = play(round_fn, begin(start=start, local_rate=8.0 / factor), data=of_loss(factor=factor))
    expected_states, expected = play(round_fn, begin(start=start, local_rate=8.0))
    assert expected.taken_back.sum() >= 1
    first = 1 if start == "measured" else 0
    actual = (
        factor * infos.local_rate[first:],
        infos.global_rate,
        infos.retained_share,
        infos.taken_back,
        [state.params for state in states[first + 1 :]],
    )
    expected = (
        expected.local_rate[first:],
        expected.global_rate,
        expected.retained_share,
        expected.taken_back,
        [state.params for state in expected_states[first + 1 :]],
    )
    if factor == 10:
        assert_close(actual, expected, 1e-9)
    else:
        assert_identical(actual, expected)


def test_any_start_ends_alike(round_fn):
    """Given rates of six decades, and the measured one: the losses end within 15 % of each other."""
    every = np.arange(sum(SIZES))
    losses = []
    for settings in ({}, *({"start": "given", "local_rate": 10.0**power} for power in (-4, -2, 0, 2))):
        states, infos = play(round_fn, begin(**settings), rounds=60)
        assert np.isfinite(flatten(states[-1].params)).all() and infos.taken_back.sum() < 15
        losses.append(problem().loss(flatten(states[-1].params), every))
    assert max(losses) < 1.15 * min(losses)
    assert max(losses) < 0.75 * problem().loss(flatten(params()), every)


# ------------------------------------------------------------------------------------------------ clients that fail


def test_a_round_in_which_nobody_is_finite_moves_the_rate_alone(round_fn):
    """To a tenth; one client of four whose weight is below a half is left out."""
    state = begin(start="given", local_rate=1.0)
    ids = [3, 6, 2, 4]  # 5, 4, 2 and 3 examples
    data = federation("float64")

    def one_round(broken):
        bad = data
        for client in broken:
            bad = poisoned(bad, client, factor=np.nan)
        return round_fn(run_key(), state, Cohort(data=bad, client_ids=jnp.asarray(ids, jnp.int32)))

    after, info = one_round(ids)
    assert float(after.local_rate.rate) == pytest.approx(0.1, rel=1e-12)
    assert float(after.local_rate.ceiling) == 0.5
    assert (int(info.participants), int(info.left_out), int(after.round)) == (0, 4, 1)
    for name in ("params", "pseudo_gradient", "global_rate", "server_optimizer", "evaluation"):
        assert_identical(getattr(after, name), getattr(state, name))

    after, info = one_round([3])  # 5/14 of the weight
    assert (int(info.participants), int(info.left_out), int(info.taken_back)) == (3, 1, 0)
    assert float(after.local_rate.rate) != 1 and np.any(flatten(after.params) != flatten(state.params))

    after, info = one_round([3, 6])  # 9/14
    assert (int(info.participants), int(info.left_out), int(info.taken_back)) == (2, 2, 1)
    assert float(after.local_rate.rate) == pytest.approx(0.1, rel=1e-12)
    assert_identical(after.params, state.params)


# ------------------------------------------------------------------------------------------------ closed forms


def parabola(w, batch):
    """λ/2 (w − x)²."""
    return batch["curvature"] * (w - batch["x"]) ** 2 / 2


def parabolas(x, curvature=3.0):
    """A client a row of x; all its examples have the minima in that row."""
    x = np.asarray(x, float)
    rows = np.split(np.arange(x.size), len(x))
    return pack({"x": x.ravel(), "curvature": np.full(x.size, curvature)}, rows)


@pytest.fixture(scope="module")
def one_step():
    """The compiled round of two clients that take one step."""
    algorithm = fh.retained_gain(parabola, work=local_steps(1, batch_size=1))
    return algorithm, jax.jit(algorithm.round)


@pytest.mark.parametrize("curvature", [3.0, 0.01])
def test_one_step_on_a_parabola(one_step, curvature):
    """β^1 = c/λ; ρ = 1 − βλ/2 in each round; and the rate comes to 2 (1 − ρ*)/λ, since n = 1."""
    algorithm, round_fn = one_step
    data = parabolas([[1.0], [4.0]], curvature)
    state, infos = algorithm.init(2.0), []
    for _ in range(60):
        state, info = round_fn(run_key(), state, Cohort(data=data, client_ids=jnp.arange(2, dtype=jnp.int32)))
        infos.append(info)
    rates_used = np.array([float(info.local_rate) for info in infos])
    shares = np.array([float(info.retained_share) for info in infos])
    assert rates_used[1] == pytest.approx(0.25 / curvature, rel=1e-9)
    np.testing.assert_allclose(shares[1:], 1 - rates_used[1:] * curvature / 2, rtol=1e-11)
    assert float(state.local_rate.rate) == pytest.approx(2 * (1 - 0.35) / curvature, rel=1e-6)
    assert not any(int(info.taken_back) for info in infos)


@pytest.mark.product  # of the page, not of the rule, which its transcription above holds
def test_several_steps_with_noise_on_a_parabola():
    """The formula of docs/retained_gain.md: a client at the distance e, minibatches that shift its minimum by noise."""
    curvature, rate, steps, distance, noise, population = 3.0, 0.15, 3, 0.7, 1.0, 3000
    x = noise * np.random.default_rng(0).normal(size=(population, steps))
    algorithm = fh.retained_gain(
        parabola, work=local_steps(steps, batch_size=1), start="given", local_rate=rate, coherence_power=0.0
    )
    cohort = Cohort(data=parabolas(x, curvature), client_ids=jnp.arange(population, dtype=jnp.int32))
    state, info = jax.jit(algorithm.round)(run_key(), algorithm.init(distance), cohort)
    a = rate * curvature
    q, c = (1 - a) ** steps, a * (1 - a) ** (steps - 1)
    variance = noise**2 * a * (1 - q**2) / (2 - a)
    gain = curvature / 2 * ((1 - q**2) * distance**2 - variance + 2 * c * noise**2)
    predicted = curvature * ((1 - q) * distance**2 + c * noise**2)
    assert float(info.retained_share) == pytest.approx(gain / predicted, rel=0.05)  # so many clients, so much noise
    assert float(rate * state.local_rate.predicted) == pytest.approx(predicted, rel=0.05)


# ------------------------------------------------------------------------------------------------ with others

MOMENTUM = optax.sgd(1.0, momentum=0.5)
TINY = local_steps(2, batch_size=1)
CURVATURE = 3.0


def plain(a):
    """What two steps of a = βλ leave of the way to a client's minimum."""
    return (1 - a) ** 2


COMPOSITIONS = {
    "fedadam+fedprox": ({"proximal_weight": 0.6}, lambda a: plain(a) + 0.6 / CURVATURE * a**2),
    "scaffold+fedexp": ({"population": 4}, None),
    "fednova+G": ({"client_optimizer": MOMENTUM}, lambda a: plain(a) - a / 2),
}
SINGLY = {
    "fedadam": ({}, plain),
    "fedavgm": ({}, plain),
    "fedprox": ({"proximal_weight": 0.6}, COMPOSITIONS["fedadam+fedprox"][1]),
    "scaffold": ({"population": 4}, None),
    "fednova": ({}, plain),
    "fedexp": ({}, plain),
    "G": ({}, plain),
    "feddyn": ({"population": 4, "weighting": "uniform"}, None),
    "fedcm": ({}, None),
    "median": ({}, plain),
}


@pytest.mark.parametrize(
    ("name", "settings", "left"),
    [
        *((name, *case) for name, case in COMPOSITIONS.items() if case[1]),
        # Of the others test_probes.py plays FedDyn and FedCM with it.
        *(product(name, *case) for name, case in COMPOSITIONS.items() if not case[1]),
        *(product(name, *case, id=name) for name, case in SINGLY.items()),
    ],
)
def test_compositions_run_and_move_the_rate(name, settings, left):
    """From the measured start to a smaller loss; ρ = (1 + q)/2 where clients come to q times their distance."""
    algorithm = make_method(f"retained_gain+{name}", parabola, work=TINY, **settings)
    round_fn, state, infos = jax.jit(algorithm.round), algorithm.init(9.0), []
    data = parabolas(np.repeat([[1.0], [2.0], [3.0], [2.5]], 2, axis=1), CURVATURE)
    cohort = Cohort(data=data, client_ids=jnp.arange(4, dtype=jnp.int32))
    for _ in range(6):
        state, info = round_fn(run_key(), state, cohort)
        infos.append(info)
    used = np.array([float(info.local_rate) for info in infos])
    assert used[1] == pytest.approx(0.25 / CURVATURE, rel=1e-6)
    assert np.all(np.isfinite(used)) and np.all(np.diff(used[1:]) != 0)
    shares = np.array([float(info.retained_share) for info in infos])
    assert np.isfinite(shares[1:]).all()
    if left:
        np.testing.assert_allclose(shares[1:], (1 + left(used[1:] * CURVATURE)) / 2, rtol=1e-9)
    assert float(infos[-1].client_loss) < float(infos[0].client_loss)
    assert all(int(info.participants) == 4 and not int(info.not_started) for info in infos)


def owner_of_the_global_rate(name, **settings):
    """The state of α's rule."""
    return make_method(name, parabola, work=TINY, **settings).init(1.0).global_rate


def test_whoever_else_moves_the_global_rate_does():
    """Its own rule is the one for where nobody does: raw G, FedExP and schedules go before it."""
    own = owner_of_the_global_rate("retained_gain")
    assert (float(own.hyper_rate), float(own.rate)) == (0.2, 1.0)
    np.testing.assert_allclose([own.lower, own.upper], [1 / 3, 3])
    of_g = owner_of_the_global_rate("retained_gain+G")
    assert type(of_g) is type(own) and float(of_g.hyper_rate) == 1.0 and of_g.max_change is None
    assert hasattr(owner_of_the_global_rate("retained_gain+fedexp"), "epsilon")
    assert hasattr(owner_of_the_global_rate("retained_gain", global_rate=lambda t: 0.9**t), "table")
    of_adam = owner_of_the_global_rate("retained_gain+fedadam")
    usual = float(owner_of_the_global_rate("fedadam", local_rate=0.1).rate)
    np.testing.assert_allclose([of_adam.rate, of_adam.lower, of_adam.upper], [usual, usual / 3, usual * 3])
    assert hasattr(owner_of_the_global_rate("fedavg", local_rate=0.1), "table")


def test_a_given_start_is_kept_within_the_range():
    """Of a measured one nothing is kept."""
    for given, expected in ((0.5, 0.5), (7.0, 3.0), (0.01, 1 / 3)):
        rate = owner_of_the_global_rate("retained_gain", start="given", global_rate=given).rate
        assert float(rate) == pytest.approx(expected, rel=1e-12)
        assert float(owner_of_the_global_rate("retained_gain", global_rate=given).rate) == 1.0


# ------------------------------------------------------------------------------------------------ refusals

CLIPPED = optax.chain(optax.clip(1.0), optax.sgd(1.0))
ALONG = "use start='given' with a local_rate: 'measured' finds the rate of steps along the gradient, but "


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("CL", {}, "retained_gain and CL both set the client rule, and two rules"),
        ("SL", {}, "retained_gain and SL both set the local rate, and two rules"),
        ("fathom", {}, "retained_gain and fathom both set the"),
        ("fedsps", {}, "retained_gain and fedsps both set the client rule, and two rules"),
        ("delta_sgd", {}, "retained_gain and delta_sgd both set the client rule, and two rules"),
        ("", {"local_rate": optax.exponential_decay(0.1, 1, 0.9)}, "local_rate is a schedule, but retained_gain moves"),
        ("", {"local_rate": rates.hypergradient(0.1)}, "local_rate is a rule, but retained_gain moves it already"),
        ("", {"client_optimizer": optax.adam(1.0)}, ALONG + "client_optimizer takes others"),
        ("", {"client_optimizer": CLIPPED}, ALONG + "client_optimizer takes others"),
        ("mime_lite", {}, ALONG + "frozen_optimizer takes others"),
    ],
)
def test_what_has_no_meaning_beside_it_is_refused(name, settings, message):
    """Before any tracing, with the reason."""
    with pytest.raises(ValueError, match=message):
        make_method("+".join(["retained_gain", *filter(None, [name])]), parabola, work=TINY, **settings)


def test_an_optimizer_that_tells_parameters_apart_is_refused_when_they_are_known():
    """Frozen parameters are not: the step is along the gradient of the rest."""

    def labelled(rest):
        optimizer = optax.partition({"a": optax.sgd(1.0), "b": rest}, {"weights": "a", "bias": "b"})
        return fh.retained_gain(loss_fn, work=EPOCHS, client_optimizer=optimizer)

    with pytest.raises(ValueError, match=ALONG + "client_optimizer takes others"):
        labelled(optax.adam(1.0)).init(params())
    labelled(optax.set_to_zero()).init(params())


@pytest.mark.parametrize(
    ("name", "settings"),
    [("retained_gain", {"client_optimizer": optax.adam(1.0)}), ("retained_gain+mime_lite", {})],
)
def test_a_given_start_takes_any_steps(name, settings):
    make_method(name, parabola, work=TINY, start="given", local_rate=0.01, **settings).init(1.0)
