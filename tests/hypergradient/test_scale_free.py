"""Normalised products and exponential updates of the transforms, against NumPy and by their invariances."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax.hypergradient import (
    global_rate,
    scale_by_hypergradient,
    scale_by_local_hypergradient,
    track_hypergradient,
)

SERVER = (scale_by_hypergradient, track_hypergradient)
LOCAL_WEIGHT = 0.25


def local(*args, **settings):
    return scale_by_local_hypergradient(*args, global_weight=LOCAL_WEIGHT, **settings)


def sequence(number=6, size=5):
    """Gradients that agree and disagree; the fourth is zero."""
    gradients = np.random.default_rng(4).normal(size=(number, size)) + 0.7
    gradients[3] = 0
    return gradients


GLOBAL_UPDATE = np.array([0.3, -0.1, 0.4, 0.0, 0.2])


def path(transform, gradients, global_update=GLOBAL_UPDATE):
    """The rates after each gradient, and the last state."""
    transform = optax.with_extra_args_support(transform)
    gradients = [jnp.asarray(gradient) for gradient in gradients]
    state, rates = transform.init(gradients[0]), []
    for gradient in gradients:
        _, state = transform.update(gradient, state, global_update=jnp.asarray(global_update))
        rates.append(np.asarray(state.rate))
    return np.array(rates), state


def over(product, scale):
    return product / scale if scale else 0.0


def numbers(normalise, gradients, global_update=None):
    """h of each step but the first, in NumPy; with a global update of the rule of a client."""
    norm = np.linalg.norm
    for g, before in zip(gradients[1:], gradients, strict=False):
        length = {"cosine": norm(g), "squared_norm": norm(before)}[normalise]
        h = over(g @ before, length * norm(before))
        if global_update is not None:
            h += LOCAL_WEIGHT * over(g @ global_update, length * norm(global_update))
        yield h


def moved(rate, h, update, kappa, most):
    change = np.clip(kappa * h, -most, most)
    return rate + change if update == "additive" else rate * np.exp(change)


@pytest.mark.parametrize("normalise", ["cosine", "squared_norm"])
@pytest.mark.parametrize("update", ["additive", "exponential"])
@pytest.mark.parametrize("factory", [*SERVER, local])
def test_rates_equal_the_equations(factory, normalise, update, float64):
    """A bound that acts in some steps, and a zero gradient, next to which products are zero."""
    gradients, rate, kappa, most = sequence(), 0.4, 0.3, 0.06
    settings = {"normalise": normalise, "update": update, "max_change": most}
    found, state = path(factory(rate, kappa, (0.1, 0.8), **settings), gradients)
    of_client = GLOBAL_UPDATE if factory is local else None
    expected, products = [rate], list(numbers(normalise, gradients, of_client))
    for h in products:
        expected.append(np.clip(moved(expected[-1], h, update, kappa, most), 0.1, 0.8))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    acts = np.abs(kappa * np.array(products)) > most
    assert acts.any() and not acts.all()
    assert int(state.non_finite_count) == 0


def test_an_exponential_update_is_bounded_by_a_fifth_unless_said(float64):
    """⟨(3, 0), (1, 0)⟩/1 = 3 times κ = 0.2 is 0.6: SPEC.md section 4 keeps it inside ±0.2. An additive one is free."""
    gradients = np.array([[1.0, 0.0], [3.0, 0.0]])
    settings = {"normalise": "squared_norm", "hyper_rate": 0.2}
    rates = [
        path(track_hypergradient(0.5, update="exponential", **settings), gradients)[0][1],
        path(track_hypergradient(0.5, update="exponential", max_change=0.3, **settings), gradients)[0][1],
        path(track_hypergradient(0.5, **settings), gradients)[0][1],
        path(track_hypergradient(0.5, max_change=0.4, **settings), gradients)[0][1],
        path(track_hypergradient(0.5, update="exponential", hyper_rate=0.01), gradients)[0][1],
    ]
    expected = [0.5 * np.exp(0.2), 0.5 * np.exp(0.3), 0.5 + 0.6, 0.5 + 0.4, 0.5 * np.exp(0.03)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


@pytest.mark.parametrize("normalise", ["cosine", "squared_norm"])
@pytest.mark.parametrize("factory", [*SERVER, local])
def test_the_scale_of_the_gradients_does_not_matter(factory, normalise):
    """The path of the rate is the same, bit for bit for powers of two. Of a client Δ keeps its scale, or gets one of
    its own.
    """
    gradients = np.float32(sequence())
    transform = factory(0.4, 0.3, (0.01, 8.0), normalise=normalise, update="exponential")
    expected, _ = path(transform, gradients)
    assert len(set(expected.tolist())) > 3
    for scale, scale_of_update in [(4, 1), (0.25, 1), (2.0**20, 0.5)]:
        np.testing.assert_array_equal(path(transform, scale * gradients, scale_of_update * GLOBAL_UPDATE)[0], expected)
    for scale, scale_of_update in [(10, 1), (0.1, 1), (1000, 7)]:
        found, _ = path(transform, scale * gradients, scale_of_update * GLOBAL_UPDATE)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("factory", [*SERVER, local])
@pytest.mark.parametrize("normalise", ["cosine", "squared_norm"])
def test_norms_that_vanish_or_are_not_finite_move_nothing(factory, normalise):
    """Zeros, numbers whose squares are zero in float32, infinity; only the last is counted, in two products."""
    gradients = np.float32([[0, 0], [1, 2], [0, 0], [1e-30, 1e-30], [1, 2], [np.inf, 0], [1, 2], [1, 2]])
    transform = factory(0.5, 0.1, normalise=normalise, update="exponential")
    rates, state = path(transform, gradients, np.zeros(2))
    np.testing.assert_array_equal(rates[:-1], np.float32(0.5))
    assert rates[-1] == pytest.approx(0.5 * np.exp(0.1), rel=1e-6)
    assert int(state.non_finite_count) == 2


def test_the_bound_is_data_in_the_state(float64):
    """One update serves all bounds; as other numbers of the state it is set by `optax.tree.set`."""
    transform = scale_by_hypergradient(0.5, 0.2, normalise="squared_norm", update="exponential")
    gradients = [jnp.array([1.0, 0.0]), jnp.array([3.0, 0.0])]
    _, state = transform.update(gradients[0], transform.init(gradients[0]))
    for most, moves in [(0.05, 0.05), (0.5, 0.5), (5.0, 0.6)]:
        _, after = transform.update(gradients[1], optax.tree.set(state, max_change=most))
        assert float(global_rate(after)) == pytest.approx(0.5 * np.exp(moves), rel=1e-12)


@pytest.mark.parametrize("factory", [*SERVER, local])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalise": "cosin"}, "unknown normalise 'cosin'; did you mean cosine"),
        ({"normalise": "debiased"}, "needs .* of every client, and .*; use 'squared_norm' or 'cosine'"),
        ({"update": "exponental"}, "unknown update 'exponental'; did you mean exponential"),
        ({"update": None}, "unknown update None; known: additive, exponential"),
        ({"max_change": 0.0}, "max_change must be finite and > 0, got 0.0"),
        ({"max_change": "small"}, "max_change must be a real number, got 'small'"),
    ],
)
def test_bad_arguments_are_refused_in_the_factory(factory, arguments, message):
    with pytest.raises(ValueError, match=message):
        factory(0.1, **arguments)
