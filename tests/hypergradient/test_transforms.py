"""The optax transforms: hand-computed rates, closed forms, and the contracts of optax."""

import chex
import flax.serialization
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

    @jax.jit
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

    end, updates = jax.eval_shape(lambda start: jax.lax.scan(step, start, None, length=3), start)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, end)
    chex.assert_trees_all_equal_dtypes(updates, params)
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
    extra = {"global_update": params, "value": 1.0, "unknown": "ignored"}
    _, state = jax.jit(lambda state: transform.update(params, state, params, **extra))(state)
    doubled = optax.tree.map_params(transform, lambda p: 2 * p, state)
    chex.assert_trees_all_close(doubled[1].previous_gradient["w"], 2 * params["w"])
    if name == "scale_by_local_hypergradient":
        with pytest.raises(TypeError, match="global_update"):
            transform.update(params, state, params)
    else:
        several = optax.MultiSteps(transform, every_k_schedule=2)
        several_state = several.init(params)
        _, end = jax.eval_shape(several.update, params, several_state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(several_state, end)


GROUPS = [{"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}, {"a": jnp.array([0.5, 0.25]), "b": jnp.array([1.0])}]
"""Two gradients: ⟨g1, g0⟩ = 1 over a and 3 over b."""

GLOBAL_UPDATE = {"a": jnp.array([2.0, 0.0]), "b": jnp.array([-1.0])}
"""⟨g1, Δ⟩ = 1 over a and −1 over b; of the local rule half of it counts."""


def rate_of(name, state, label=None):
    return float((global_rate if name == "scale_by_hypergradient" else local_rate)(state, label))


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("compatible", [False, True])
def test_masked_products_are_taken_over_the_leaves_that_are_there(name, compatible):
    """`gradient` and `global_update` arrive whole, or masked by optax too; 7 g stands for a preconditioner."""
    masked = optax.masked(FACTORIES[name](1.0, 0.1), {"a": True, "b": False}, mask_compatible_extra_args=compatible)
    transform = optax.chain(optax.scale(7.0), masked)
    state = transform.init(GROUPS[0])
    for gradient in GROUPS:
        updates, state = transform.update(gradient, state, gradient=gradient, global_update=GLOBAL_UPDATE)
    rate = {"scale_by_local_hypergradient": 1.15}.get(name, 1.1)
    assert rate_of(name, state) == pytest.approx(rate, rel=1e-6)
    used = 1.0 if name == "track_hypergradient" else rate
    np.testing.assert_allclose(updates["a"], used * 7.0 * GROUPS[1]["a"], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 7.0 * GROUPS[1]["b"])


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("labels", [{"a": "x", "b": "y"}, lambda tree: {"a": "x", "b": "y"}], ids=["dict", "function"])
def test_groups_have_rates_of_their_own_read_by_label(name, labels):
    """Also a group without parameters, under jit; the state survives flax's bytes."""
    groups = {label: FACTORIES[name](rate, 0.1) for label, rate in {"x": 1.0, "y": 2.0, "empty": 3.0}.items()}
    transform = optax.chain(optax.clip_by_global_norm(1e6), optax.partition(groups, labels))
    state = transform.init(GROUPS[0])
    update = jax.jit(transform.update)
    for gradient in GROUPS:
        _, state = update(gradient, state, gradient=gradient, global_update=GLOBAL_UPDATE)
    state = flax.serialization.from_bytes(transform.init(GROUPS[0]), flax.serialization.to_bytes(state))
    rates = [rate_of(name, state, label) for label in groups]
    expected = [1.15, 2.25, 3.0] if name == "scale_by_local_hypergradient" else [1.1, 2.3, 3.0]
    assert rates == pytest.approx(expected, rel=1e-6)
    doubled = optax.tree.map_params(transform, lambda p: 2 * p, state)[1].inner_states["y"].inner_state
    np.testing.assert_array_equal(doubled.previous_gradient["b"], 2 * GROUPS[1]["b"])
    for label, message in [
        (None, "name one by its label: 'empty', 'x', 'y'"),
        ("z", "label 'z' .* known: 'empty', 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            rate_of(name, state, label)


def test_names_of_a_chain_are_labels_and_what_has_none_is_pointed_at():
    start = scale_by_hypergradient(0.5)
    named = optax.named_chain(("slow", start), ("fast", scale_by_hypergradient(2.0))).init(jnp.ones(2))
    assert float(global_rate(named, "fast")) == 2.0
    assert float(global_rate({"run": optax.adam(1.0).init(jnp.ones(2)), "own": start.init(jnp.ones(2))})) == 0.5
    with pytest.raises(ValueError, match=r"unknown label 'fast'.*known: none"):
        global_rate(start.init(jnp.ones(2)), "fast")
    with pytest.raises(ValueError, match=r"found 2; hand over the part .* such as state\[0\]"):
        global_rate(optax.chain(start, start).init(jnp.ones(2)))
    with pytest.raises(ValueError, match=r"at the label 'slow', found 2; hand over"):
        global_rate(optax.named_chain(("slow", optax.chain(start, start))).init(jnp.ones(2)), "slow")


NOT_FINITE = {"a": jnp.array([jnp.nan, 0.0]), "b": jnp.zeros(1)}
WRAPPERS = {
    "chain": (lambda t: optax.chain(t, optax.scale_by_adam(), optax.scale(-1.0)), GROUPS, 1.4),
    "named_chain": (lambda t: optax.named_chain(("scale", optax.scale(2.0)), ("rate", t)), GROUPS, 1.0 + 0.1 * 16),
    "scale_by_schedule": (
        lambda t: optax.chain(optax.scale_by_schedule(lambda step: 1.0 + step), t),  # g0, 2 g1
        GROUPS,
        1.8,
    ),
    # means of two: (0.75, 1.125) and 2, of squared norm 5.828125
    "MultiSteps": (lambda t: optax.MultiSteps(t, every_k_schedule=2), [*GROUPS, *GROUPS], 1.5828125),
    "apply_if_finite": (
        lambda t: optax.apply_if_finite(t, max_consecutive_errors=3),
        [GROUPS[0], NOT_FINITE, GROUPS[1]],
        1.4,
    ),
    # the first gradient is passed by: the second meets a zero, the third itself
    "conditionally_transform": (
        lambda t: optax.conditionally_transform(t, lambda step: step > 0),
        [GROUPS[0], GROUPS[1], GROUPS[1]],
        1.0 + 0.1 * 1.3125,
    ),
    "flatten": (optax.flatten, GROUPS, 1.4),
    "lookahead": (lambda t: optax.lookahead(t, sync_period=2, slow_step_size=0.5), GROUPS, 1.4),
    "inject_hyperparams": (lambda t: optax.inject_hyperparams(lambda: t)(), GROUPS, 1.4),
    "a transform in a transform": (lambda t: optax.partition({"all": optax.masked(t, True)}, "all"), GROUPS, 1.4),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_of_optax(name):
    wrap, gradients, rate = WRAPPERS[name]
    transform = wrap(scale_by_hypergradient(1.0, 0.1))
    params = optax.LookaheadParams.init_synced(GROUPS[0]) if name == "lookahead" else GROUPS[0]
    state = transform.init(params)
    for gradient in gradients:
        _, state = transform.update(gradient, state, params)
    assert float(global_rate(state)) == pytest.approx(rate, rel=1e-6)


def test_states_of_groups_under_vmap():
    def start(hyper_rate):
        return optax.partition({"x": scale_by_hypergradient(1.0, hyper_rate)}, "x").init(GROUPS[0])

    @jax.jit
    def states_after(hyper_rates):
        states = jax.vmap(start)(hyper_rates)
        update = jax.vmap(optax.partition({"x": scale_by_hypergradient(9.0)}, "x").update, in_axes=(None, 0))
        for gradient in GROUPS:
            _, states = update(gradient, states)
        return states

    states = states_after(np.array([0.0, 0.1, 0.5], np.float32))
    np.testing.assert_allclose(global_rate(states, "x"), [1.0, 1.4, 3.0], rtol=1e-6)


def test_a_gradient_of_another_shape_is_refused():
    """It would broadcast; optax.flatten flattens updates and no extra arguments."""
    transform = scale_by_local_hypergradient(1.0, global_weight=0.5)
    state = transform.init(GROUPS[0])
    wider = {"a": jnp.ones(2), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"gradient must be .* array of shape \(3,\) at \['b'\].* shape \(1,\)"):
        transform.update(GROUPS[0], state, gradient=wider, global_update=GLOBAL_UPDATE)
    with pytest.raises(ValueError, match=r"global_update must be .* got no array at \['a'\]"):
        transform.update(GROUPS[0], state, global_update=jnp.zeros(()))
    with pytest.raises(ValueError, match=r"got PyTreeDef\(.*\) beside PyTreeDef"):
        transform.update(GROUPS[0], state, global_update=GLOBAL_UPDATE | {"c": jnp.ones(1)})
    flat = optax.flatten(transform)
    state = flat.init(GROUPS[0])
    with pytest.raises(ValueError, match=r"no array at the root, .* shape \(3,\).*ravel_pytree"):
        flat.update(GROUPS[0], state, global_update=GLOBAL_UPDATE)
    for gradient in GROUPS:
        _, state = flat.update(gradient, state, global_update=jax.flatten_util.ravel_pytree(GLOBAL_UPDATE)[0])
    assert float(local_rate(state)) == pytest.approx(1.0 + 4.0 + 0.5 * (1.0 - 1.0))


def test_python_numbers_are_parameters_as_they_are_for_optax():
    transform = scale_by_local_hypergradient(1.0, 0.1, global_weight=0.5)
    state = transform.init(0.5)
    for gradient in (2.0, 3.0):
        updates, state = transform.update(gradient, state, gradient=gradient, global_update=4.0)
    assert float(updates) == pytest.approx(3.0 * (1.0 + 0.1 * (6.0 + 0.5 * 12.0)))


def test_a_hyper_rate_that_changes_is_set_in_the_state():
    """As the docstring says: inject_hyperparams does nothing, by a schedule or by hand, and optax.tree.set does."""
    scheduled = optax.inject_hyperparams(scale_by_hypergradient)(1.0, hyper_rate=lambda step: 0.1 * (step == 0))
    assert [float(global_rate(s)) for _, s in feed(scheduled, GROUPS)] == pytest.approx([1.0, 1.4])
    transform = optax.inject_hyperparams(scale_by_hypergradient)(1.0, 0.1)
    _, state = transform.update(GROUPS[0], transform.init(GROUPS[0]))
    state.hyperparams["hyper_rate"] = 0
    update = jax.jit(transform.update)
    _, state = update(GROUPS[1], state)
    assert float(global_rate(state)) == pytest.approx(1.4)
    for hyper_rate, rate in [(0.0, 1.4), (jnp.float32(0.5), 1.4 + 0.5 * 1.3125)]:  # ‖g1‖² = 1.3125
        _, state = update(GROUPS[1], optax.tree.set(state, hyper_rate=hyper_rate))
        assert float(global_rate(state)) == pytest.approx(rate)
        assert not global_rate(state).weak_type


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
