"""Quadratics: everything they claim to know, found again from the packed examples alone."""

import jax
import numpy as np
import pytest

from fedhyper_jax.data import quadratic_clients, quadratic_loss

CASES = {
    "plain": {},
    "many": {"num_clients": 30, "dimension": 25, "smoothness": 100.0, "strong_convexity": 0.1, "dissimilarity": 50.0},
    "noisy": {"noise": 0.7, "examples_per_client": 31},
    "ragged": {"num_clients": 4, "dimension": 3, "examples_per_client": [4, 50, 9, 17], "noise": 0.1},
    "shared": {"shared_hessian": True, "dissimilarity": 0.25},
    "same_optimum": {"dissimilarity": 0.0},
    "one_client": {"num_clients": 1, "dissimilarity": 0.0},
    "one_dimension": {"dimension": 1, "smoothness": 2.0, "strong_convexity": 2.0},
    "two_dimensions": {"dimension": 2},
    "round": {"smoothness": 3.0, "strong_convexity": 3.0},
}


@pytest.fixture(params=CASES, scope="module")
def problem(request):
    return quadratic_clients(**CASES[request.param], seed=5)


@pytest.fixture(scope="module")
def measured(problem):
    """Function of points: objective, its gradient, and suboptimality at each; compiled for 20 of them."""

    @jax.jit
    def at(points):
        of_one = jax.value_and_grad(problem.objective)
        return jax.vmap(of_one)(points), jax.vmap(problem.suboptimality)(points)

    def of_few(points):
        (value, gradient), suboptimality = jax.device_get(at(np.resize(points, (20, points.shape[1]))))
        return value[: len(points)], gradient[: len(points)], suboptimality[: len(points)]

    return of_few


def client_arrays(problem, client):
    """Rows and targets of a client, from the packed data, in float64."""
    data = problem.data
    own = np.asarray(data.order)[int(data.offsets[client]) : int(data.offsets[client + 1])]
    return np.asarray(data.examples["x"], np.float64)[own], np.asarray(data.examples["y"], np.float64)[own]


def client_loss(problem, client, w):
    x, y = client_arrays(problem, client)
    return 0.5 * ((x @ w - y) ** 2).mean()


def client_gradient(problem, client, w):
    x, y = client_arrays(problem, client)
    return x.T @ (x @ w - y) / len(y)


def rounding(problem):
    """The pool is float32: relative errors of 6e-8 in entries of size √(L d) times (‖w‖ + ‖c‖)."""
    size = np.abs(np.asarray(problem.data.examples["y"])).max() + 1
    return 1e-5 * size * np.sqrt(problem.smoothness * len(problem.optimum))


def test_curvature(problem):
    hessians = []
    for client in range(problem.data.population):
        x, _ = client_arrays(problem, client)
        hessians.append(x.T @ x / len(x))
        eigenvalues = np.linalg.eigvalsh(hessians[-1])
        assert eigenvalues[0] == pytest.approx(problem.strong_convexity, rel=1e-4, abs=1e-6 * problem.smoothness)
        assert eigenvalues[-1] == pytest.approx(problem.smoothness, rel=1e-5)
    np.testing.assert_allclose(hessians, problem.hessians, atol=1e-5 * problem.smoothness)
    mean = np.einsum("m,mij->ij", problem.weights, problem.hessians)
    eigenvalues = np.linalg.eigvalsh(mean)
    assert eigenvalues[0] == pytest.approx(problem.strong_convexity, rel=1e-9)
    assert eigenvalues[-1] == pytest.approx(problem.smoothness, rel=1e-12)


def test_optimum_and_dissimilarity(problem):
    sizes = np.asarray(problem.data.client_sizes)
    np.testing.assert_allclose(problem.weights, sizes / sizes.sum(), rtol=1e-6)
    gradients = np.stack([client_gradient(problem, m, problem.optimum) for m in range(len(sizes))])
    np.testing.assert_allclose(problem.weights @ gradients, 0.0, atol=rounding(problem))
    measured = problem.weights @ (gradients**2).sum(axis=1)
    assert measured == pytest.approx(problem.dissimilarity, rel=1e-4, abs=rounding(problem) ** 2)
    # and exactly, from the float64 description
    exact = np.einsum("mij,mj->mi", problem.hessians, problem.optimum - problem.centers)
    np.testing.assert_allclose(problem.weights @ exact, 0.0, atol=1e-11 * problem.smoothness)
    assert problem.weights @ (exact**2).sum(axis=1) == pytest.approx(problem.dissimilarity, rel=1e-9, abs=1e-20)


def test_optimum_is_the_least_squares_solution_of_the_pool(problem):
    """The mean over all examples weights clients by n_m, as p_m does; lstsq knows nothing of how they were made."""
    x = np.asarray(problem.data.examples["x"], np.float64)
    y = np.asarray(problem.data.examples["y"], np.float64)
    solution = np.linalg.lstsq(x, y)[0]
    np.testing.assert_allclose(solution, problem.optimum, atol=rounding(problem) / problem.strong_convexity)


def test_each_clients_mean_loss_is_its_quadratic(problem):
    rng = np.random.default_rng(0)
    for client in range(min(problem.data.population, 5)):
        for _ in range(3):
            w = problem.optimum + rng.standard_normal(len(problem.optimum))
            offset = w - problem.centers[client]
            expected = 0.5 * offset @ problem.hessians[client] @ offset + problem.noise**2 / 2
            assert client_loss(problem, client, w) == pytest.approx(expected, rel=1e-4, abs=rounding(problem) ** 2)


def test_objective_by_finite_differences(problem, measured):
    rng = np.random.default_rng(1)
    w = problem.optimum + rng.standard_normal(len(problem.optimum))
    direction = rng.standard_normal(len(w))
    direction /= np.linalg.norm(direction)

    def total(w):
        return sum(p * client_loss(problem, m, w) for m, p in enumerate(problem.weights)) - problem.noise**2 / 2

    step = 1e-3
    slope = (total(w + step * direction) - total(w - step * direction)) / (2 * step)
    value, gradient, suboptimality = measured(np.stack([w, problem.optimum]))
    assert gradient[0] @ direction == pytest.approx(slope, rel=1e-3, abs=1e-3)
    assert value[0] == pytest.approx(total(w), rel=1e-4)
    assert suboptimality[0] == pytest.approx(total(w) - total(problem.optimum), rel=1e-3)
    assert problem.optimal_value == pytest.approx(total(problem.optimum), rel=1e-3, abs=rounding(problem) ** 2)
    assert suboptimality[1] == 0.0


def test_smoothness_and_strong_convexity_bound_the_growth(problem, measured):
    w = problem.optimum + np.random.default_rng(2).standard_normal((20, len(problem.optimum)))
    growth = measured(w)[2]
    distance = ((w - problem.optimum) ** 2).sum(axis=1)
    assert (growth <= problem.smoothness / 2 * distance * (1 + 1e-5)).all()
    assert (growth >= problem.strong_convexity / 2 * distance * (1 - 1e-5)).all()


def test_loss_is_one_number_an_example_and_differentiable():
    problem = quadratic_clients(seed=0)
    batch = {name: np.asarray(array)[:7] for name, array in problem.data.examples.items()}

    @jax.jit
    def both(w):
        return problem.loss_fn(w, batch), jax.grad(lambda w: quadratic_loss(w, batch).mean())(w)

    losses, gradient = both(problem.initial_params)
    assert problem.loss_fn is quadratic_loss and losses.shape == (7,)
    np.testing.assert_allclose(losses, 0.5 * batch["y"] ** 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, -(batch["y"] @ batch["x"]) / 7, rtol=1e-4, atol=1e-4)


def test_gradient_descent_reaches_the_optimum():
    problem = quadratic_clients(5, dimension=4, smoothness=4.0, strong_convexity=1.0, dissimilarity=3.0, seed=1)
    examples = problem.data.examples
    step = jax.jit(lambda w: w - jax.grad(lambda w: quadratic_loss(w, examples).mean())(w) / problem.smoothness)
    w = problem.initial_params
    for _ in range(60):
        w = step(w)
    np.testing.assert_allclose(w, problem.optimum, atol=1e-5)


def test_noise_and_heterogeneous_hessians():
    quiet, noisy = quadratic_clients(seed=0), quadratic_clients(noise=2.0, seed=0)
    for problem in (quiet, noisy):
        x, y = client_arrays(problem, 0)
        residual = x @ problem.centers[0] - y
        assert np.sqrt((residual**2).mean()) == pytest.approx(problem.noise, rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(x.T @ residual, 0.0, atol=1e-3)
    assert np.abs(quiet.hessians[0] - quiet.hessians[1]).max() > 0.1
    shared = quadratic_clients(shared_hessian=True, seed=0)
    assert np.abs(shared.hessians - shared.hessians[0]).max() == 0.0


def test_seeds():
    first, again, other = (quadratic_clients(seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.data.examples["x"], again.data.examples["x"])
    np.testing.assert_array_equal(first.optimum, again.optimum)
    assert not np.array_equal(first.optimum, other.optimum)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smoothness": 0.5}, "smoothness must be ≥ strong_convexity"),
        ({"dimension": 1}, "equal to it in one dimension"),
        ({"strong_convexity": 0.0}, "strong_convexity must be finite and > 0"),
        ({"dissimilarity": -1.0}, "dissimilarity must be finite and ≥ 0, got -1.0"),
        ({"noise": np.inf}, "noise must be finite"),
        ({"num_clients": 1}, "dissimilarity must be 0 with one client"),
        ({"examples_per_client": 9}, "must be one integer ≥ 10 or 10 of them"),
        ({"examples_per_client": 10, "noise": 1.0}, "must be one integer ≥ 11 or 10 of them"),
        ({"seed": -1}, "seed must be an integer ≥ 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        quadratic_clients(**settings)
