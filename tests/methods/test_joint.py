"""Methods that share a program: which do, and that each of them is the method alone, to the last bit and count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedhyper_jax as fh
from fedhyper_jax.data import Cohort, local_steps, pack
from fedhyper_jax.methods import make_method, method_families
from fedhyper_jax.parts import Feedback, client_rules
from tests.helpers import product

ALL = ("fedavg", "G", "SL", "CL", "G+SL", "G+CL", "SL+CL", "G+SL+CL")
SETTINGS = {"work": local_steps(3, batch_size=2), "local_rate": 0.1, "weighting": "uniform"}
DATA = pack({"x": np.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0], [-2.0, 1.0]], np.float32)}, [[0, 1], [2, 3]])


def loss_fn(w, batch):
    return 0.5 * ((w - batch["x"]) ** 2).sum(axis=1)


def names(methods, **options):
    return {family.name: list(family.hyper_rates) for family in method_families(methods, **options)}


def test_families_are_methods_that_differ_in_hyper_rates():
    four = {"G+SL": ["fedavg", "G", "SL", "G+SL"], "CL+G+SL": ["CL", "G+CL", "SL+CL", "G+SL+CL"]}
    assert names(ALL) == names(ALL, hyper_rate=0.1, local_bounds=(0.01, 1.0), global_weight=0.0) == four
    assert names(["fedprox+SL", "fedavg", "fedprox", "G+fedprox", "scaffold", "fedexp", "fedexp+SL"]) == {
        "fedprox+G+SL": ["fedprox+SL", "fedprox", "G+fedprox"],
        "fedavg": ["fedavg"],
        "scaffold": ["scaffold"],
        "fedexp+SL": ["fedexp", "fedexp+SL"],
    }
    (family,) = method_families(["fedavg", "SL+G", "G"], hyper_rate=0.3)
    assert family.hyper_rates == {
        "fedavg": {"G": 0.0, "SL": 0.0},
        "SL+G": {"G": 0.3, "SL": 0.3},
        "G": {"G": 0.3, "SL": 0.0},
    }


def test_what_changes_more_than_its_rates_stays_alone():
    """The product that is recorded; a warm start, which SL takes part in."""
    assert names(["fedavg", "G", "SL"], inner_product="applied") == {"fedavg": ["fedavg"], "G": ["G"], "SL": ["SL"]}
    assert names(ALL[3:], client_rates="warm") == {
        "CL+G": ["CL", "G+CL"],
        "G+SL": ["G+SL"],
        "SL+CL+G": ["SL+CL", "G+SL+CL"],
    }
    assert names(["CL", "G+CL"], client_rates="per_client") == {"CL+G": ["CL", "G+CL"]}


def rounds(algorithm, state, round_fn=None):
    round_fn, infos = round_fn or jax.jit(algorithm.round), []
    for _ in range(4):
        state, info = round_fn(jax.random.key(0), state, Cohort(data=DATA, client_ids=jnp.arange(2)))
        infos.append(info)
    return state.params, jax.tree.map(lambda *numbers: np.stack(numbers), *infos)


@pytest.mark.parametrize(
    ("methods", "alone"),
    [
        (ALL[:3], ("G", "SL")),
        (("CL", "G+CL"), ("CL",)),
        product(ALL[:3], ("fedavg",)),  # each scheduler stands still above, and both in test_round.py
        product(("CL", "G+CL"), ("G+CL",)),  # nobody stands still
    ],
)
def test_a_method_of_a_family_is_the_method_alone(methods, alone):
    """Numbers, counts and bytes: with κ = 0 nothing moves, nothing is counted, and nothing more is sent."""
    (family,) = method_families(methods, hyper_rate=0.05)
    start, joint = jnp.array([1.0, -2.0]), None
    for name in alone:
        own = family.hyper_rates[name]
        together = make_method(family.name, loss_fn, hyper_rate=own, **SETTINGS)
        joint = joint or jax.jit(together.round)
        given = {} if name == "fedavg" else {"hyper_rate": 0.05}
        by_itself = make_method(name, loss_fn, **given, **SETTINGS)
        jax.tree.map(
            np.testing.assert_array_equal,
            rounds(together, together.init(start), joint),
            rounds(by_itself, by_itself.init(start)),
        )
    assert joint._cache_size() == 1


def test_a_rule_without_a_hyper_rate_counts_nothing():
    """Not even a product that is not finite."""
    rule = fh.rates.hypergradient(0.1, 0.0, (0.01, 1.0))
    for inner_product in (3.0, jnp.inf, jnp.nan):
        state, report = rule.update(rule.init(jnp.zeros(1)), Feedback(jnp.int32(1), jnp.float32(inner_product)))
        assert (float(state.rate), [int(number) for number in report]) == (np.float32(0.1), [0, 0, 0])
    rule = client_rules.local_hypergradient(0.1, 0.0, (0.01, 1.0), global_weight=1.0)
    transform = rule.transform(rule.init(jnp.zeros(1)), jnp.float32(0.1), None)
    state = transform.init(jnp.zeros(1))
    for gradient in (1.0, jnp.inf):
        _, state = transform.update(jnp.array([gradient]), state, global_update=jnp.ones(1))
    assert [int(number) for number in rule.report(state)] == [0, 0, 0]
