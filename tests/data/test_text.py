import numpy as np
import pytest

from fedhyper_jax.data import synthetic_text


def followed_by_likeliest(dataset, rows):
    """Share of pairs whose second symbol is the one that follows the first most often in the whole training text."""
    pairs = np.zeros((dataset.num_classes, dataset.num_classes))
    np.add.at(pairs, (dataset.train["x"].ravel(), dataset.train["y"].ravel()), 1)
    return np.mean(pairs.argmax(axis=1)[rows["x"]] == rows["y"])


def test_texts_can_be_predicted_as_well_as_said():
    alike = synthetic_text(30, heterogeneity=0.0, seed=3)
    assert followed_by_likeliest(alike, alike.test) == pytest.approx(0.71, abs=0.03)
    apart = synthetic_text(30, heterogeneity=1.0, seed=3)
    assert followed_by_likeliest(apart, apart.test) < 0.25
    for dataset in (alike, apart):
        assert np.array_equal(dataset.train["x"][:, 1:], dataset.train["y"][:, :-1])
        assert 0 <= dataset.train["x"].min() and dataset.train["y"].max() < dataset.num_classes


def test_a_client_does_not_depend_on_the_number_of_clients():
    few, many = (synthetic_text(number, seed=1) for number in (2, 5))
    for split in ("train", "test"):
        ids = getattr(many, f"{split}_client_ids")
        for name in ("x", "y"):
            assert np.array_equal(getattr(few, split)[name], getattr(many, split)[name][ids < 2])
    other = synthetic_text(2, seed=2)
    assert not np.array_equal(few.train["x"], other.train["x"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 1}, "vocabulary must be ≥ 2"),
        ({"examples_per_client": 1}, "examples_per_client must be ≥ 2"),
        ({"heterogeneity": 1.5}, "heterogeneity must lie in"),
        ({"length": 0}, "length must be an integer ≥ 1"),
        ({"test_fraction": 1.0}, "test_fraction must lie strictly"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        synthetic_text(3, **settings)
