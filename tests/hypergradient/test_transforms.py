"""The optax transforms: hand-computed rates, closed forms, and the contracts of optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax.hypergradient import (
    HypergradientState,
    TrackedHypergradientState,
    global_rate,
    local_rate,
    scale_by_hypergradient,
    scale_by_local_hypergradient,
    track_hypergradient,
)

FACTORIES = {
    "scale_by_hypergradient": scale_by_hypergradient,
    "track_hypergradient": track_hypergradient,
    "scale_by_local_hypergradient": lambda *args, **kw: scale_by_local_hypergradient(*args, global_weight=0.5, **kw),
}


def feed(transform, gradients, **extra):
    """States and updates after each gradient."""
    state = transform.init(gradients[0])
    for gradient in gradients:
        updates, state = transform.update(gradient, state, **extra)
        yield updates, state


def test_rates_computed_by_hand():
    gradients = [jnp.array([1.0, 2.0]), jnp.array([0.5, 0.25]), jnp.array([-1.0, 0.0])]
    # <g1, g0> = 0.5 + 0.5 = 1; <g2, g1> = -0.5
    scaled = list(feed(scale_by_hypergradient(1.0, hyper_rate=0.1), gradients))
    assert [round(float(s.rate), 6) for _, s in scaled] == [1.0, 1.1, 1.05]
    np.testing.assert_allclose(scaled[1][0], 1.1 * gradients[1], rtol=1e-6)
    tracked = list(feed(track_hypergradient(1.0, hyper_rate=0.1), gradients))
    assert [float(s.rate) for _, s in tracked] == [float(s.rate) for _, s in scaled]
    np.testing.assert_array_equal(tracked[2][0], gradients[2])


def test_local_rate_computed_by_hand_pins_the_sign_of_the_global_term():
    """g and Δ agree, so the rate grows by κ(⟨g1,g0⟩ + ½⟨g1,Δ⟩) = 0.1(0.2 + ½·0.4·3) = 0.08; step 0 adds nothing."""
    gradients = [jnp.array([0.5]), jnp.array([0.4])]
    transform = scale_by_local_hypergradient(0.1, hyper_rate=0.1, global_weight=0.5)
    first, second = feed(transform, gradients, global_update=jnp.array([3.0]))
    assert float(first[1].rate) == np.float32(0.1)
    assert float(second[1].rate) == pytest.approx(0.18, rel=1e-6)
    against = list(feed(transform, gradients, global_update=jnp.array([-3.0])))
    assert float(against[1][1].rate) == pytest.approx(0.1 + 0.1 * (0.2 - 0.6), rel=1e-5)


def test_bounds_clip_and_are_counted():
    gradients = [jnp.array([10.0]), jnp.array([10.0]), jnp.array([-10.0]), jnp.array([-0.001])]
    states = [s for _, s in feed(scale_by_hypergradient(1.0, bounds=(0.5, 3.0)), gradients)]
    assert [float(s.rate) for s in states] == [1.0, 3.0, 0.5, pytest.approx(0.51)]
    assert [int(s.clipped_count) for s in states] == [0, 1, 2, 2]


@pytest.mark.parametrize("name", FACTORIES)
def test_a_product_that_is_not_finite_moves_nothing_and_is_counted(name):
    gradients = [jnp.array([1.0]), jnp.array([jnp.inf]), jnp.array([1.0]), jnp.array([1.0])]
    transform = FACTORIES[name](0.5, hyper_rate=0.1)
    states = [s for _, s in feed(transform, gradients, global_update=jnp.zeros(1))]
    assert [float(s.rate) for s in states] == [0.5, 0.5, 0.5, pytest.approx(0.6)]
    assert int(states[-1].non_finite_count) == 2


def test_the_product_of_gradients_before_a_preconditioner():
    """Behind Adam the rate follows the gradients handed over as `gradient`, not Adam's directions."""
    gradients = [jnp.array([1.0, 2.0]), jnp.array([0.5, 0.25])]
    transform = optax.chain(optax.scale_by_adam(), scale_by_hypergradient(1.0, 0.1), optax.scale(-1.0))
    state = transform.init(gradients[0])
    for gradient in gradients:
        updates, state = transform.update(gradient, state, gradient=gradient)
    assert float(global_rate(state)) == pytest.approx(1.1)
    adam = optax.adam(1.1)
    adam_state = adam.init(gradients[0])
    for gradient in gradients:
        expected, adam_state = adam.update(gradient, adam_state)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_hypergradient_descent_on_a_quadratic_in_closed_form(float64):
    """f(w) = ½aw²: g_t = a w_t, w_{t+1} = (1 − r_t a) w_t, r_t = r_{t−1} + κ a² w_t w_{t−1}."""
    a, kappa, w, rate, previous = 0.7, 0.05, 2.0, 0.1, 0.0
    optimizer = optax.chain(scale_by_hypergradient(rate, kappa), optax.scale(-1.0))
    params = jnp.array(w)
    state = optimizer.init(params)
    for _ in range(30):
        updates, state = optimizer.update(a * params, state)
        params = optax.apply_updates(params, updates)
        rate += kappa * a**2 * w * previous
        w, previous = (1 - rate * a) * w, w
        assert float(params) == pytest.approx(w, rel=1e-12)
        assert float(global_rate(state)) == pytest.approx(rate, rel=1e-12)


def test_the_increment_is_the_derivative_of_the_next_loss(float64):
    """⟨g_t, g_{t−1}⟩ = −d f(w_{t−1} − r g_{t−1})/dr, by a central difference."""

    def f(w):
        return jnp.sum(jnp.cos(w) + 0.1 * w**4)

    before = jnp.array([0.3, -1.2, 0.8])
    step, rate, h = jax.grad(f)(before), 0.2, 1e-5
    derivative = (f(before - (rate + h) * step) - f(before - (rate - h) * step)) / (2 * h)
    states = [s for _, s in feed(track_hypergradient(rate), [step, jax.grad(f)(before - rate * step)])]
    assert float(states[1].rate - states[0].rate) == pytest.approx(float(-derivative), rel=1e-8)


def test_the_s_squared_law_of_the_raw_rule(float64):
    """A sequence of Δ multiplied by s multiplies every increment of the rate by s²."""
    gradients = [jnp.asarray(g) for g in np.random.default_rng(0).normal(size=(6, 4))]

    def increments(s):
        rates = [float(state.rate) for _, state in feed(track_hypergradient(1e6), [s * g for g in gradients])]
        return np.diff(rates)

    np.testing.assert_allclose(increments(7.0), 49 * increments(1.0), rtol=1e-6)


@pytest.mark.parametrize("name", FACTORIES)
def test_one_jitted_update_serves_all_rates_hyper_rates_and_bounds(name):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(gradient, state):
        return FACTORIES[name](0.1).update(gradient, state, global_update=gradient)

    gradient = jnp.array([1.0, -2.0])
    rates = []
    for rate, hyper_rate, bounds in [(0.1, 0.5, (0.01, 9.0)), (0.3, 0.0, (0.0, np.inf)), (jnp.array(0.2), 1, (0, 0.4))]:
        state = FACTORIES[name](rate, hyper_rate=hyper_rate, bounds=bounds).init(gradient)
        for _ in range(2):
            _, state = update(gradient, state)
        rates.append(float(state.rate))
    global_term = 0.5 * 5 if name == "scale_by_local_hypergradient" else 0.0
    assert rates == pytest.approx([0.1 + 0.5 * (5 + global_term), 0.3, 0.4], rel=1e-6)


@pytest.mark.parametrize("name", FACTORIES)
def test_factories_accept_traced_values_and_vmap(name):
    gradient = jnp.array([1.0, -2.0])

    def rate_after_two(rate, hyper_rate):
        transform = FACTORIES[name](rate, hyper_rate=hyper_rate, bounds=(rate / 10, rate * 10))
        return list(feed(transform, [gradient, gradient], global_update=jnp.zeros(2)))[1][1].rate

    rates = jax.jit(jax.vmap(rate_after_two))(jnp.array([0.1, 0.2, 1.0]), jnp.array([0.0, 1.0, 1.0]))
    np.testing.assert_allclose(rates, [0.1, 2.0, 6.0], rtol=1e-6)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_updates_keep_their_dtype_and_states_their_types(name, dtype):
    params = {"a": jnp.ones(3, dtype), "b": [jnp.ones((2, 2), dtype)]}
    transform = FACTORIES[name](0.1)
    start = transform.init(params)

    def step(state, _):
        updates, state = transform.update(params, state, params, global_update=params)
        return state, updates

    end, updates = jax.lax.scan(step, start, None, length=3)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, end)
    chex.assert_trees_all_equal_dtypes(jax.tree.map(lambda u: u[0], updates), params)
    assert end.rate.dtype == jnp.float32


def test_products_accumulate_in_float32_for_small_dtypes():
    """300 products of 1 in bfloat16 would stop at 256."""
    gradient = jnp.ones(300, jnp.bfloat16)
    states = [s for _, s in feed(track_hypergradient(1.0), [gradient, gradient])]
    assert float(states[1].rate) == 301.0


def test_rates_are_float64_for_float64_parameters(float64):
    state = scale_by_hypergradient(0.1).init({"a": jnp.ones(2, jnp.float64), "b": jnp.ones(2, jnp.float32)})
    assert state.rate.dtype == jnp.float64


@pytest.mark.parametrize("name", FACTORIES)
def test_neighbours_in_optax(name):
    """Chains, unknown extra arguments, MultiSteps and tree.map_params; a required argument that is missing."""
    params = {"w": jnp.ones(2)}
    transform = optax.chain(optax.clip_by_global_norm(1e6), FACTORIES[name](0.1), optax.scale(-1.0))
    state = transform.init(params)
    _, state = transform.update(params, state, params, global_update=params, value=1.0, unknown="ignored")
    doubled = optax.tree.map_params(transform, lambda p: 2 * p, state)
    chex.assert_trees_all_close(doubled[1].previous_gradient["w"], 2 * params["w"])
    if name == "scale_by_local_hypergradient":
        with pytest.raises(TypeError, match="global_update"):
            transform.update(params, state, params)
    else:
        several = optax.MultiSteps(transform, every_k_schedule=2)
        several_state = several.init(params)
        for _ in range(4):
            _, several_state = several.update(params, several_state, params)


def test_two_transforms_in_one_chain_are_read_by_their_accessors():
    transform = optax.chain(track_hypergradient(0.01), scale_by_hypergradient(1.0), optax.scale(-1.0))
    state = transform.init(jnp.ones(3))
    assert isinstance(state[0], TrackedHypergradientState)
    assert isinstance(state[1], HypergradientState)
    assert float(local_rate(state)) == np.float32(0.01)
    assert float(global_rate(state)) == 1.0
    with pytest.raises(KeyError):
        optax.tree.get(state, "rate")
    with pytest.raises(ValueError, match="found 0"):
        global_rate(optax.adam(1.0).init(jnp.ones(3)))


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial_rate": 0.0}, "initial_rate must be finite and > 0, got 0.0"),
        ({"initial_rate": -1.0}, "initial_rate must be finite and > 0, got -1.0"),
        ({"initial_rate": float("nan")}, "initial_rate must be finite and > 0, got nan"),
        ({"initial_rate": float("inf")}, "initial_rate must be finite"),
        ({"initial_rate": jnp.ones(3)}, "vmap over them"),
        ({"initial_rate": "fast"}, "must be a real number"),
        ({"initial_rate": 0.1, "hyper_rate": -0.1}, "hyper_rate must be finite and ≥ 0, got -0.1"),
        ({"initial_rate": 0.1, "hyper_rate": float("nan")}, "hyper_rate must be finite"),
        ({"initial_rate": 0.1, "bounds": (0.2, 1.0)}, "initial_rate must lie inside bounds"),
        ({"initial_rate": 2.0, "bounds": (0.2, 1.0)}, "initial_rate must lie inside bounds"),
        ({"initial_rate": 0.1, "bounds": (-1.0, 1.0)}, "0 ≤ lower ≤ upper"),
        ({"initial_rate": 0.1, "bounds": (0.0, float("nan"))}, "0 ≤ lower ≤ upper"),
        ({"initial_rate": 0.1, "bounds": 3.0}, "pair"),
    ],
)
def test_bad_arguments_are_refused_in_the_factory(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        FACTORIES[name](**arguments)
