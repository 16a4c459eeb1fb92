"""`scale_by_retained_gain` against its transcription, closed forms, and what must not matter to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedhyper_jax as fh
from fedhyper_jax.hypergradient import RetainedGainState, scale_by_retained_gain, window_starts
from tests.compare import assert_close, assert_identical


@pytest.fixture(scope="module", autouse=True)
def wide():
    """All of this module runs in float64."""
    with jax.enable_x64(True):
        yield


RNG = np.random.default_rng(3)
X = RNG.normal(size=(240, 6)) * np.array([3.0, 1.0, 1.0, 0.5, 0.3, 0.1])
Y = X @ RNG.normal(size=6) + 0.3 * RNG.normal(size=240)
STEPS = 90


def loss_fn(w, batch, factor=1.0, offset=0.0):
    return factor * jnp.mean((batch["x"] @ w["a"] + w["b"] - batch["y"]) ** 2) / 2 + offset


def start():
    return {"a": jnp.zeros(6), "b": jnp.zeros(())}


def batches(steps=STEPS, size=8):
    rows = np.random.default_rng(4).integers(0, len(X), (steps, size))
    return {"x": jnp.asarray(X[rows]), "y": jnp.asarray(Y[rows])}


def train(optimizer, *, loss=loss_fn, data=None, **handed_on):
    """The parameters after each step, and the states, of one compiled scan with the first minibatch of windows held."""
    data = batches() if data is None else data

    def step(carry, batch):
        params, state, held = carry
        held = jax.tree.map(lambda new, old: jnp.where(window_starts(state), new, old), batch, held)
        gradient = jax.grad(loss)(params, batch)
        extra = {name: gradient for name in handed_on.get("gradient", ())}
        updates, state = optimizer.update(gradient, state, params, value_fn=loss, batch=held, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state, held), (params, state)

    first = jax.tree.map(lambda x: jnp.zeros_like(x[0]), data)
    return jax.jit(lambda: jax.lax.scan(step, (start(), optimizer.init(start()), first), data)[1])()


def sgd(initial_rate=None, **settings):
    return optax.chain(scale_by_retained_gain(initial_rate, **settings), optax.scale(-1.0))


# ------------------------------------------------------------------------------------------------ the transcription


def transcription(rate, *, window, target_share=0.45, hyper_rate=0.5, memory=0.9, tolerance=1.0):
    """All steps in plain NumPy, written from the docstrings: rates used, shares, verdicts of windows, parameters."""
    data = {name: np.asarray(column) for name, column in batches().items()}
    w, ceiling, slopes, found, path, verdicts = np.zeros(7), np.inf, None, False, [], []

    def value(w, k):
        return np.mean((data["x"][k] @ w[:6] + w[6] - data["y"][k]) ** 2) / 2

    def gradient(w, k):
        residual = data["x"][k] @ w[:6] + w[6] - data["y"][k]
        return np.append(residual @ data["x"][k], residual.sum()) / len(residual)

    if rate is None:
        g = gradient(w, 0)
        length = 1e-3 * (1 + np.linalg.norm(w)) / np.linalg.norm(g)
        rate = 0.25 * (g @ g) / abs((g - gradient(w - length * g, 0)) @ g / length)
    for first in range(0, STEPS, window):
        origin, g_0, descent = w, gradient(w, first), 0.0
        for k in range(first, first + window):
            g = gradient(w, k)
            w = w - rate * g
            descent += rate * g @ g / window
            path.append((rate, w))
        gain, predicted = value(origin, first) - value(w, first), g_0 @ (origin - w)
        new = np.array([predicted, descent]) / rate
        smooth = new if slopes is None else memory * slopes + (1 - memory) * new
        target = min(max(target_share * min(max(smooth[0], 1e-300) / smooth[1], 5.0) ** -0.2, 0.02), 0.9)
        expected = rate * smooth[0]
        tolerated = tolerance * (abs(expected) + 2 * max(-predicted, 0)) if found else 0.0
        bent = predicted - gain
        back = bent >= (1 - target / 6) * predicted + tolerated
        strict = not (found and tolerance)
        if back or (gain <= 0.05 * descent and (strict or bent >= 0.05 * descent + tolerated)):
            ceiling, rate, w = rate / 2, rate * (0.5 if found else 0.1), origin
            path[-1] = (path[-1][0], w)
            verdicts.append(True)
            continue
        fastest = 1.69 if gain > 0.85 * predicted else 1.3
        slopes, found, ceiling = smooth, found or gain > target * predicted, ceiling * 1.03
        rate = min(rate * min(max(np.exp(hyper_rate * (gain - target * predicted) / expected), 0.5), fastest), ceiling)
        verdicts.append(False)
    return np.array([used for used, _ in path]), np.array([w for _, w in path]), np.array(verdicts)


@pytest.mark.parametrize(
    ("rate", "settings", "taken_back"),
    [
        (None, {"window": 5}, 0),
        (30.0, {"window": 5}, 3),
        (0.4, {"window": 3, "tolerance": 0.0, "hyper_rate": 2.0, "memory": 0.5, "target_share": 0.35}, 5),
        (1e-3, {"window": 1}, 1),
    ],
    ids=["measured", "far too large", "no tolerance", "windows of one step"],
)
def test_equals_the_transcription(rate, settings, taken_back):
    """Step after step: parameters, and the rate before each."""
    rates, path, verdicts = transcription(rate, **settings)
    assert verdicts.sum() == taken_back
    params, state = train(sgd(rate, **settings))
    (state, _) = state
    np.testing.assert_allclose(np.column_stack([params["a"], params["b"]]), path, rtol=1e-8, atol=1e-11)
    used = np.append(rates[0], np.asarray(state.rate)[:-1])
    np.testing.assert_allclose(used, rates, rtol=1e-8)
    assert int(state.taken_back_count[-1]) == taken_back


def test_one_step_on_a_parabola():
    """A/P = 1 − rλ/2, so that the rate comes to 2 (1 − ρ*)/λ, from the measured quarter of 1/λ."""
    curvature = 3.0

    def parabola(w, batch):
        return curvature * (w["a"][0] - batch) ** 2 / 2

    _, (state, _) = train(sgd(window=1, hyper_rate=1.0), loss=parabola, data=jnp.asarray([1.0, -1.0] * 150))
    assert float(state.rate[-1]) == pytest.approx(2 * (1 - 0.45) / curvature, rel=1e-3)
    before = np.append(0.25 / curvature, state.rate[:-1])
    np.testing.assert_allclose(state.share, 1 - before * curvature / 2, rtol=1e-9)


# ------------------------------------------------------------------------------------------------ what must not matter


@jax.jit
def run_of(factor, offset):
    """Of the loss times and plus a number: one program, in which both are data."""
    return train(sgd(), loss=functools.partial(loss_fn, factor=factor, offset=offset))


def test_a_constant_added_to_the_loss_changes_nothing():
    (params, _), (expected, _) = run_of(1.0, 5.0), run_of(1.0, 0.0)
    assert_close(params, expected, 1e-9)


@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_the_scale_of_the_loss_divides_the_rate_and_changes_nothing_else(factor):
    params, (state, _) = run_of(factor, 0.0)
    expected, (expected_state, _) = run_of(1.0, 0.0)
    assert_identical((params, factor * state.rate, state.share), (expected, expected_state.rate, expected_state.share))


def test_any_start_comes_near_the_least_squares():
    """Eight decades of given rates, and the measured one; the average of the second half of the run."""
    design = np.column_stack([X, np.ones(240)])
    residual = Y - design @ np.linalg.lstsq(design, Y, rcond=None)[0]
    data, rates = batches(2000), np.array([1e-5, 1e-2, 1.0, 1e3])
    paths = {"measured": train(sgd(), data=data)[0]}
    given = jax.jit(jax.vmap(lambda rate: train(sgd(rate), data=data)[0]))(rates)
    paths |= {rate: jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], given) for i, rate in enumerate(rates)}
    for rate, params in paths.items():
        tail = np.append(np.asarray(params["a"])[1000:].mean(axis=0), np.asarray(params["b"])[1000:].mean())
        excess = np.mean((design @ tail - Y) ** 2) / np.mean(residual**2)
        assert excess < 1.1, (rate, excess)


# ------------------------------------------------------------------------------------------------ in chains


def test_a_window_that_is_not_finite_leads_back_at_once():
    """To where it began, whatever the step; the rate falls, and the next update begins another."""
    optimizer = scale_by_retained_gain(1.0, window=4)
    params = {"w": jnp.array([1.0, 2.0])}
    state = optimizer.init(params)

    @jax.jit
    def take(gradient, state, params):
        updates, state = optimizer.update(gradient, state, params, value_fn=lambda p: jnp.sum(p["w"] ** 2))
        return jax.tree.map(lambda p, u: p - u, params, updates), state

    for bad, step in ((False, 1), (True, 0)):
        params, state = take({"w": np.full(2, np.inf if bad else 0.1)}, state, params)
        assert int(state.step) == step
    np.testing.assert_allclose(params["w"], [1.0, 2.0], rtol=1e-15)
    assert (float(state.rate), float(state.ceiling), int(state.taken_back_count)) == (0.1, 0.5, 1)


def test_behind_a_preconditioner_the_gradient_is_handed_over():
    """Adam's directions, the products with gradients; the loss falls, and the first rate is along the direction."""
    optimizer = optax.chain(optax.scale_by_adam(), scale_by_retained_gain(window=5), optax.scale(-1.0))
    params, (_, state, _) = train(optimizer, gradient=("gradient",))
    design = np.column_stack([X, np.ones(240)])
    last = np.append(np.asarray(params["a"])[-1], np.asarray(params["b"])[-1])
    assert np.mean((design @ last - Y) ** 2) < 0.2 * np.mean(Y**2)
    batch = jax.tree.map(lambda x: np.asarray(x[0]), batches())
    design = np.column_stack([batch["x"], np.ones(8)])
    gradient = -design.T @ batch["y"] / 8  # at zero
    along = gradient / (np.abs(gradient) + 1e-8)
    curvature = along @ (design.T @ design / 8) @ along
    assert float(state.rate[0]) == pytest.approx(0.25 * (along @ gradient) / curvature, rel=1e-5)


def test_extra_arguments_reach_value_fn_and_a_value_saves_a_call():
    calls = []

    def loss(params, batch):
        calls.append(batch)
        return jnp.sum((params - batch) ** 2)

    optimizer = scale_by_retained_gain(0.1, window=2)
    params = jnp.ones(2)
    state = optimizer.init(params)
    gradient = 2 * (params - 3.0)
    with jax.disable_jit():
        plain, _ = optimizer.update(gradient, state, params, value_fn=loss, batch=3.0, another=None)
        assert calls == [3.0]
        given, with_value = optimizer.update(gradient, state, params, value_fn=loss, batch=3.0, value=8.0)
    assert calls == [3.0]
    assert float(with_value.first_value) == 8.0
    assert_identical(given, plain)


def test_rates_and_windows_are_found_in_chains_and_dtypes_follow_the_parameters():
    optimizer = optax.named_chain(("rate", scale_by_retained_gain(0.25)), ("sign", optax.scale(-1.0)))
    state = optimizer.init(jnp.zeros(2, jnp.float32))
    assert (float(fh.global_rate(state)), bool(window_starts(state))) == (0.25, True)
    assert isinstance(state["rate"], RetainedGainState) and state["rate"].rate.dtype == jnp.float32
    update = jax.jit(functools.partial(optimizer.update, value_fn=jnp.sum))
    new = update(np.ones(2, np.float32), state, np.zeros(2, np.float32))[1]
    chex_types = [jax.tree.map(lambda x: (x.dtype, x.shape, x.weak_type), tree) for tree in (state, new)]
    assert chex_types[0] == chex_types[1]
    assert not window_starts(new)
    with pytest.raises(ValueError, match="expected a state of scale_by_retained_gain in the optax state, found 0"):
        window_starts(optax.sgd(0.1).init(jnp.zeros(2)))


def test_where_the_loss_is_straight_the_first_step_is_a_thousandth_of_the_parameters():
    optimizer = scale_by_retained_gain()
    params = jnp.array([3.0, 4.0])
    gradient, state = jnp.array([2.0, 0.0]), optimizer.init(params)
    update = jax.jit(functools.partial(optimizer.update, value_fn=lambda w: 2 * w[0]))
    updates, _ = update(gradient, state, params)
    np.testing.assert_allclose(updates, [1e-3 * 6, 0], rtol=1e-6)


def test_what_has_no_meaning_is_refused():
    for settings, message in (
        ({"initial_rate": 0.0}, "initial_rate must be"),
        ({"window": 0}, "window must be"),
        ({"target_share": 1.0}, "target_share must lie strictly between 0 and 1, got 1.0"),
        ({"growth": 0.5}, "growth must be at least 1, got 0.5"),
        ({"tolerance": -1.0}, "tolerance must be"),
    ):
        with pytest.raises(ValueError, match=message):
            scale_by_retained_gain(**settings)
    optimizer, params = scale_by_retained_gain(), {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    state = optimizer.init(params)
    with pytest.raises(TypeError, match="value_fn"):
        optimizer.update(params, state, params)
    with pytest.raises(ValueError, match=r"update\(updates, state, params"):
        optimizer.update(params, state, value_fn=lambda p: 0.0)
    with pytest.raises(ValueError, match="value_fn must be a function of the parameters, got float"):
        optimizer.update(params, state, params, value_fn=1.0)
    with pytest.raises(ValueError, match="gradient must be a tree like the updates"):
        optimizer.update(params, state, params, value_fn=lambda p: 0.0, gradient={"a": jnp.zeros(2)})
    inside = optax.masked(scale_by_retained_gain(), {"a": True, "b": False})
    with pytest.raises(ValueError, match=r"put it around optax.masked or optax.partition, not inside"):
        inside.update(params, inside.init(params), params, value_fn=lambda p: 0.0)


def test_a_gain_beyond_the_digits_of_the_loss_counts_as_predicted():
    """In float32, at a rate so small that losses near 10^4 are equal: it is not taken back as nothing kept."""
    params = jnp.zeros(2, jnp.float32)
    optimizer = scale_by_retained_gain(1e-6, window=1)
    state = optimizer.init(params)
    loss = lambda w: jnp.float32(1e4) + w[0]  # noqa: E731
    assert loss(params) == loss(params - 1e-6)
    _, state = jax.jit(functools.partial(optimizer.update, value_fn=loss))(np.array([1, 0], np.float32), state, params)
    assert (float(state.share), bool(state.counts)) == (1.0, True)
    assert float(state.rate) == pytest.approx(1e-6 * np.exp(0.5 * 0.55), rel=1e-6)
