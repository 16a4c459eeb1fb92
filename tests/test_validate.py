import pytest

from fedhyper_jax import _validate
from fedhyper_jax.methods import METHODS


@pytest.mark.parametrize(
    ("given", "meant"),
    [("fedxep", "fedexp"), ("scafold", "scaffold"), ("FedProx", "fedprox"), ("cl", "CL"), ("fedadm", "fedadam")],
)
def test_the_nearest_name_comes_first(given, meant):
    with pytest.raises(ValueError, match=rf"unknown method '{given}'; did you mean {meant}\? known: fedavg, G, "):
        _validate.one_of(METHODS, method=given)


@pytest.mark.parametrize("given", ["paint", "", None, 3, "?"])
def test_what_is_far_from_all_is_answered_with_all(given):
    with pytest.raises(ValueError, match=r"unknown weighting .*; known: examples, uniform$"):
        _validate.one_of(("examples", "uniform"), weighting=given)
