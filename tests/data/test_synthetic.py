"""Synthetic(α, β): its moments, its limits, its split."""

import numpy as np
import pytest

from fedhyper_jax.data import from_client_ids, synthetic_logistic
from fedhyper_jax.data.synthetic import _client_law


def test_shapes_and_owners():
    dataset = synthetic_logistic(7, examples_per_client=[10, 20, 30, 2, 11, 50, 100], seed=1)
    train = dataset.train
    assert train["x"].dtype == np.float32 and train["y"].dtype == np.int32
    assert train["x"].shape[1:] == dataset.input_shape == (60,)
    assert np.bincount(dataset.test_client_ids).tolist() == [1, 2, 3, 1, 1, 5, 10]
    assert np.bincount(dataset.train_client_ids).tolist() == [9, 18, 27, 1, 10, 45, 90]
    assert set(np.unique(train["y"])) <= set(range(10))
    data = from_client_ids(train, dataset.train_client_ids)
    assert data.population == 7 and data.client_sizes.tolist() == [9, 18, 27, 1, 10, 45, 90]


def test_sizes_are_log_normal_as_in_fedprox():
    dataset = synthetic_logistic(400, num_features=2, num_classes=2, seed=0)
    sizes = np.bincount(dataset.train_client_ids) + np.bincount(dataset.test_client_ids)
    assert sizes.min() >= 50
    logs = np.log(sizes - 50 + 0.5)
    assert np.median(logs) == pytest.approx(4.0, abs=5 * 1.25 * 2 / 20)
    assert (np.quantile(logs, 0.84) - np.quantile(logs, 0.16)) / 2 == pytest.approx(2.0, abs=0.4)


def test_alpha_and_beta_are_standard_deviations():
    """u_k is the mean of W_k's entries, B_k of v_k's, each up to the noise of the mean of many N(0, 1)."""
    laws = [_client_law(np.random.default_rng(k), 3.0, 0.5, 2000, 5) for k in range(2000)]
    u = np.array([np.append(weights.ravel(), biases).mean() for weights, biases, _ in laws])
    b = np.array([centre.mean() for _, _, centre in laws])
    error = 5 / np.sqrt(2 * 2000)  # five relative standard errors of a standard deviation
    assert u.std() == pytest.approx(3.0, rel=error)
    assert b.std() == pytest.approx(np.hypot(0.5, 1 / np.sqrt(2000)), rel=error)
    assert abs(np.corrcoef(u, b)[0, 1]) < 5 / np.sqrt(2000)
    assert laws[0][0].std() == pytest.approx(1.0, abs=0.05)
    biases_given_u = np.array([biases.mean() for _, biases, _ in laws]) - u
    assert biases_given_u.std() == pytest.approx(1 / np.sqrt(5), rel=error)  # b_k shares u_k with W_k


def test_covariance_of_inputs():
    dataset = synthetic_logistic(1, num_features=8, examples_per_client=40_000, seed=2)
    covariance = np.cov(dataset.train["x"].T)
    expected = np.diag(np.arange(1, 9) ** -1.2)
    np.testing.assert_allclose(covariance, expected, atol=5 * np.sqrt(2 / 36_000))


def spread(dataset, values):
    ids = dataset.train_client_ids
    return np.stack([values[ids == client].mean(axis=0) for client in np.unique(ids)]).std(axis=0).mean()


def test_heterogeneity_grows_with_alpha_and_beta_and_vanishes_when_iid():
    def make(**settings):
        return synthetic_logistic(40, examples_per_client=400, seed=3, **settings)

    labels = {
        name: spread(d, np.eye(10)[d.train["y"]])
        for name, d in (
            ("iid", make(alpha=0.0, beta=0.0, iid=True)),
            ("zero", make(alpha=0.0, beta=0.0)),
        )
    }
    assert labels["iid"] < 0.02 < 0.1 < labels["zero"]  # α = β = 0 is not IID
    inputs = [spread(d, d.train["x"]) for d in (make(alpha=0.0, beta=0.0), make(alpha=0.0, beta=3.0))]
    assert inputs[0] == pytest.approx(1.0, abs=0.15) and inputs[1] > 2.5
    iid = make(alpha=0.0, beta=0.0, iid=True)
    assert spread(iid, iid.train["x"]) < 0.05
    np.testing.assert_allclose(iid.train["x"].mean(axis=0), 0.0, atol=5 / np.sqrt(14_400))


def test_labels_follow_one_linear_model_a_client():
    """A client's labels are linearly separable: the perceptron of its own data reaches zero training errors."""
    dataset = synthetic_logistic(2, num_features=5, num_classes=2, examples_per_client=60, alpha=1.0, beta=0.0, seed=6)
    for client in range(2):
        own = dataset.train_client_ids == client
        x = np.hstack([dataset.train["x"][own], np.ones((own.sum(), 1))])
        y = 2 * dataset.train["y"][own] - 1
        weights = np.zeros(6)
        for _ in range(20_000):
            wrong = np.flatnonzero(y * (x @ weights) <= 0)
            if len(wrong) == 0:
                break
            weights += y[wrong[0]] * x[wrong[0]]
        assert len(wrong) == 0


def test_seeds_and_clients():
    first = synthetic_logistic(5, examples_per_client=20, seed=0)
    again = synthetic_logistic(5, examples_per_client=20, seed=0)
    other = synthetic_logistic(5, examples_per_client=20, seed=1)
    more = synthetic_logistic(9, examples_per_client=20, seed=0)
    np.testing.assert_array_equal(first.train["x"], again.train["x"])
    assert not np.array_equal(first.train["x"], other.train["x"])
    np.testing.assert_array_equal(first.train["x"], more.train["x"][: len(first.train["x"])])
    # no example is both trained on and tested on
    both = np.concatenate([first.train["x"], first.test["x"]])
    assert len(np.unique(both, axis=0)) == len(both) == 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1.0}, "alpha must be finite and ≥ 0, got -1.0; it is a standard deviation"),
        ({"beta": np.nan}, "beta must be finite"),
        ({"iid": True}, "set both to 0"),
        ({"examples_per_client": 1}, "must be one integer ≥ 2 or 30 of them"),
        ({"examples_per_client": [5, 5]}, "must be one integer ≥ 2 or 30 of them"),
        ({"test_fraction": 1.0}, "test_fraction must lie strictly between 0 and 1"),
        ({"num_clients": 0}, "num_clients must be an integer ≥ 1"),
        ({"seed": None}, "seed must be an integer ≥ 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        synthetic_logistic(**settings)
