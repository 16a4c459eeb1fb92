"""Scale-free schedulers in whole rounds: a transcription in NumPy, and what their paths do not depend on.

One small federation and one compiled round serve all but the wide model: linear regression on two features, every
batch all of a client's examples, so that nothing is drawn.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import CL, SL, G, fedhyper, local_epochs, median
from fedhyper_jax.data import Cohort, pack

SIZES = (2, 2, 2, 2, 6)
POPULATION, SLOTS, STEPS = len(SIZES), 4, 3
LOCAL_RATE = 0.125
KAPPA = {"G": 0.2, "SL": 0.3, "CL": 0.1}
WAYS = {"normalise": {"G": "debiased", "SL": "squared_norm", "CL": "cosine"}, "update": "exponential"}
COHORTS = ([0, 1, 4], [2, 4, 3, 1], [0], [1, 2], [3, 4, 0, 2], [1, 3, 4, 0], [2, 0, 1, 4], [4, 3])


def examples():
    rng = np.random.default_rng(8)
    x = rng.normal([1.0, 0.5], size=(sum(SIZES), 2))
    return x, x @ [2.0, -1.0] + rng.normal(size=len(x))


def loss_fn(params, batch):
    return batch["factor"] * (batch["x"] @ params - batch["y"]) ** 2 / 2


@functools.cache
def algorithm(local_rate=LOCAL_RATE):
    rates = {"local_rate": local_rate, "hyper_rate": KAPPA, "local_gamma": 2.0, "global_gamma": 1.25}
    return fedhyper(loss_fn, "G+SL+CL", work=local_epochs(STEPS, batch_size=8), **rates, **WAYS)


one_round = jax.jit(lambda *arguments: algorithm().round(*arguments))


class Run(NamedTuple):
    """Of each round."""

    params: np.ndarray
    global_rate: np.ndarray
    local_rate: np.ndarray
    client_rate: np.ndarray  # the largest at the end


def play(factor=1.0, local_rate=LOCAL_RATE, copies=1, round_fn=one_round):
    x, y = examples()
    arrays = {"x": np.float32(np.tile(x, copies)), "y": np.float32(y), "factor": np.full(len(y), factor, np.float32)}
    data = pack(arrays, np.split(np.arange(len(y)), np.cumsum(SIZES)[:-1]))
    state, rows = algorithm(local_rate).init(jnp.zeros(2 * copies)), []
    for cohort in COHORTS:
        ids = np.int32(cohort + [POPULATION] * (SLOTS - len(cohort)))
        state, info = round_fn(jax.random.key(0), state, Cohort(data=data, client_ids=ids))
        rows.append((state.params, info.global_rate, info.local_rate, info.client_rate_max))
    return Run(*(np.stack(values) for values in zip(*rows, strict=True)))


def exp_clipped(rate, kappa, h, bounds):
    return np.clip(rate * np.exp(np.clip(kappa * h, -0.2, 0.2)), *bounds)


def over(product, scale):
    return product / scale if scale else 0.0


def cosine(a, b):
    return over(a @ b, np.linalg.norm(a) * np.linalg.norm(b))


def client(w, beta, x, y, pseudo_gradient, bounds):
    """Parameters and rate at the end of a client's round."""
    rate, before = beta, None
    for _ in range(STEPS):
        g = x.T @ (x @ w - y) / len(y)
        if before is not None:
            h = cosine(g, before) + cosine(g, pseudo_gradient) / STEPS
            rate = exp_clipped(rate, KAPPA["CL"], h, bounds)
        w, before = w - rate * g, g
    return w, rate


def debiased(weights, updates):
    """The mean inner product of two different clients' updates, at least a tenth of ‖Δ‖²; 0 of one client."""
    pairs = list(itertools.permutations(range(len(weights)), 2))
    if not pairs:
        return 0.0
    products = sum(weights[i] * weights[j] * updates[i] @ updates[j] for i, j in pairs)
    mean = weights @ updates
    return max(products / sum(weights[i] * weights[j] for i, j in pairs), 0.1 * mean @ mean)


def transcribed() -> Run:
    """The equations in NumPy, float64."""
    x, y = examples()
    rows = np.split(np.arange(len(y)), np.cumsum(SIZES)[:-1])
    w, alpha, beta, before, scale, out = np.zeros(2), 1.0, LOCAL_RATE, np.zeros(2), 0.0, []
    of_alpha, of_beta = (1 / 1.25, 1.25), (LOCAL_RATE / 2, LOCAL_RATE * 2)
    for cohort in COHORTS:
        ends = [client(w, beta, x[rows[m]], y[rows[m]], before, of_beta) for m in cohort]
        weights = np.array([SIZES[m] for m in cohort]) / sum(SIZES[m] for m in cohort)
        updates = np.array([w - end for end, _ in ends])
        mean = weights @ updates
        alpha = exp_clipped(alpha, KAPPA["G"], over(mean @ before, scale), of_alpha)
        w = w - alpha * mean
        out.append((w, alpha, beta, max(rate for _, rate in ends)))
        beta = exp_clipped(beta, KAPPA["SL"], over(mean @ before, before @ before), of_beta)
        before, scale = mean, debiased(weights, updates)
    return Run(*(np.stack(values) for values in zip(*out, strict=True)))


@pytest.fixture(scope="module")
def run():
    return play()


def test_equals_the_transcription(run):
    """With unequal weights and a cohort of one, after which G stands still. All three rates move, up and down."""
    expected = transcribed()
    for found, wanted in zip(run, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5)
    for rates in expected[1:]:
        assert {-1, 1} <= set(np.sign(np.diff(rates)))
    assert run.global_rate[3] == run.global_rate[2]


@pytest.mark.parametrize("factor", [4.0, 0.25, 10.0, 0.1])
def test_a_loss_in_other_units_divides_the_local_rates_and_changes_nothing_else(run, factor):
    """Parameters and so accuracies, and α; bit for bit for powers of two."""
    other = play(factor, LOCAL_RATE / factor)
    exact = factor in (4.0, 0.25)
    for name, divisor in [("params", 1), ("global_rate", 1), ("local_rate", factor), ("client_rate", factor)]:
        found, expected = getattr(other, name), getattr(run, name) / divisor
        np.testing.assert_allclose(found, expected, rtol=0 if exact else 1e-5, err_msg=name)


def test_the_width_of_a_model_does_not_matter(run):
    """Each feature twice: w is a sum of two copies, each with the same gradient, and goes as far at half the rate.

    The raw product of two updates halves. (Two copies, so that all but sums is exact.)
    """
    wide = play(1.0, LOCAL_RATE / 2, copies=2, round_fn=jax.jit(algorithm(LOCAL_RATE / 2).round))
    np.testing.assert_allclose(wide.params[:, :2] + wide.params[:, 2:], run.params, rtol=1e-5)
    np.testing.assert_allclose(wide.global_rate, run.global_rate, rtol=1e-5)
    np.testing.assert_allclose(2 * wide.local_rate, run.local_rate, rtol=1e-5)
    np.testing.assert_allclose(2 * wide.client_rate, run.client_rate, rtol=1e-5)


def test_the_debiased_squared_norm_is_the_same_for_all_sizes_of_cohorts():
    """In expectation: the mean over all cohorts of 2, 3 and 4 of four clients of the same size. ‖Δ‖² is not."""
    x, y = examples()
    arrays = {"x": np.float32(x), "y": np.float32(y), "factor": np.ones(len(y), np.float32)}
    data = pack(arrays, np.split(np.arange(len(y)), np.cumsum(SIZES)[:-1]))
    start, means, biased = algorithm().init(jnp.array([5.0, 5.0])), [], []  # far away, where updates agree
    for size in (2, 3, 4):
        found = []
        for cohort in itertools.combinations(range(4), size):
            ids = np.int32([*cohort, *[POPULATION] * (SLOTS - size)])
            state, info = one_round(jax.random.key(0), start, Cohort(data=data, client_ids=ids))
            found.append((float(state.global_rate.squared_norm), float(info.pseudo_gradient_norm) ** 2))
            assert float(info.bytes_up) == size * 4 * (2 + 1)  # parameters, and ‖Δ_m‖²
        assert all(kept > 0.11 * biased_one for kept, biased_one in found)  # no floor
        means.append(np.mean([kept for kept, _ in found]))
        biased.append(np.mean([one for _, one in found]))
    np.testing.assert_allclose(means, means[0], rtol=1e-5)
    assert biased[0] > 1.02 * biased[1] > 1.02 * biased[2]


def test_refusals_say_why_and_what_to_do():
    settings = {"work": local_epochs(1, batch_size=8), "local_rate": 0.1}
    with pytest.raises(ValueError, match=r"CL sees the gradients of one client; use 'squared_norm' or 'cosine' there"):
        CL(normalise="debiased")
    with pytest.raises(ValueError, match="unknown normalise 'cosin'; did you mean cosine"):
        G(normalise="cosin")
    with pytest.raises(ValueError, match="unknown update 'multiply'; known: additive, exponential"):
        SL(update="multiply")
    with pytest.raises(ValueError, match=r"max_change must be finite and > 0, got -0\.1"):
        G(max_change=-0.1)
    with pytest.raises(ValueError, match=r"'applied' takes products with another direction; use normalise='squared_n"):
        G(normalise="debiased")(loss_fn, inner_product="applied", **settings)
    with pytest.raises(ValueError, match="estimates the length of a mean of client updates, but the median"):
        (median() + SL(normalise="debiased"))(loss_fn, **settings)
    own, narrow = SL(normalise="debiased", local_bounds=(0.01, 1.0)), CL(local_bounds=(0.05, 0.5))
    with pytest.raises(ValueError, match=r"the server may move the local rate to .* outside CL's local_bounds"):
        (own + narrow)(loss_fn, **settings)
    with pytest.raises(ValueError, match="unknown scheduler in normalise 'GG'; did you mean G"):
        fedhyper(loss_fn, "G+CL", normalise={"GG": "cosine"}, **settings)

