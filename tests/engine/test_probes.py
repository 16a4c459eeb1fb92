"""A few algorithms that together turn on every flag of every contract, run whole by every strategy.

Strategies see clients through one function only, so what they must get right is shown on it with toy clients
(`test_strategies.py`). These probes show that rounds hand it everything: each kind of state, row, sum and report,
clients that fail, updates side by side, rounds taken back. A new field of a contract must be used by a probe.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax.data import Cohort, local_epochs, local_steps
from fedhyper_jax.engine import algorithm as algorithms
from fedhyper_jax.engine import federated_algorithm
from fedhyper_jax.parts import (
    Aggregator,
    ClientRule,
    FailureModel,
    Guard,
    LocalTerm,
    Parts,
    RateRule,
    aggregators,
    client_rules,
    failures,
    guards,
    rates,
    terms,
)
from fedhyper_jax.parts.contract import no_state
from tests.algorithms import COHORT, EPOCHS, POPULATION, loss_fn
from tests.bench import Bench, federation, poisoned, run_key, sampled_cohorts
from tests.compare import assert_close, cast, types_of
from tests.helpers import cases, logistic_params

MOMENTUM = optax.sgd(1.0, momentum=0.9)
STEPS = local_steps(3, batch_size=4)
CL = client_rules.local_hypergradient(0.05, 0.1, (0.005, 0.5))

PLAIN = {"global_rate": rates.hypergradient(1.0), "local_rate": rates.hypergradient(0.05), "client_rule": CL}
"""Every flag at its default; a probe turns on what it names."""

PROBES = {
    "robust, unreliable, guarded": {
        "work": local_epochs(2, batch_size=4),
        "global_rate": rates.hypergradient(1.0, 0.5, (1 / 3, 3.0)),
        "local_rate": rates.hypergradient(0.05, 0.01, (0.005, 0.5), warm=True),
        "client_rule": CL,
        "server_optimizer": MOMENTUM,
        "inner_product": "applied",
        "aggregator": aggregators.clipped(aggregators.median(), 0.3),
        "failure_model": failures.dropout(0.1, 0.2),
        "guard": guards.rollback(1.02),
    },
    "SCAFFOLD, FedProx and FedExP with a rate a client": {
        "work": EPOCHS,
        "global_rate": rates.extrapolation(0.01),
        "local_rate": rates.scheduled(0.05),
        "client_rule": CL,
        "client_rates_of": POPULATION,
        "terms": [terms.control_variates(POPULATION), terms.proximal(0.3)],
        "client_optimizer": MOMENTUM,
        "evaluate_at": "mean_of_last_two",
        "failure_model": failures.dropout(after=0.3),
    },
    "FedDyn and FedCM": {
        "work": STEPS,
        "global_rate": rates.scheduled(1.0),
        "local_rate": rates.retained_gain(0.05),
        "client_rule": client_rules.counted_descent(),
        "terms": [terms.dynamic_regularization(POPULATION, 0.3), terms.client_momentum(0.3)],
        "weighting": "uniform",
        "failure_model": failures.dropout(before=0.3),
    },
    "MIME-lite with G": {
        "work": STEPS,
        "global_rate": rates.hypergradient(1.0, 0.5, (1 / 3, 3.0), normalise="debiased", update="exponential"),
        "local_rate": rates.scheduled(lambda t: 0.05 * 0.9**t, rounds=8),
        "terms": [terms.frozen_optimizer(MOMENTUM)],
    },
    "FedNova with Polyak's steps": {
        "work": STEPS,
        "global_rate": rates.scheduled(1.0),
        "local_rate": rates.scheduled(1.5),
        "client_rule": client_rules.polyak(0.5, 0.0),
        "terms": [terms.normalized_averaging()],
        "weighting": "uniform",
    },
}


@dataclasses.dataclass(frozen=True)
class Probe:
    """A probe as a line that a `Bench` plays; it has no options."""

    settings: dict

    def setting(self, index):
        del index
        return {}

    def build(self, *, strategy="vectorized"):
        return federated_algorithm(loss_fn, strategy=strategy, **self.settings)


@pytest.fixture(scope="module", autouse=True)
def wide():
    """All of this module runs in float64, but for what says otherwise."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", params=PROBES)
def bench(request):
    """Each probe's own round of a padded cohort, side by side, and a run of it."""
    return Bench(Probe(PROBES[request.param]))


def parts_of(monkeypatch, settings) -> Parts:
    """The parts that a round is made of."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(algorithms, "make_round", lambda parts, *rest: seen.append(parts))
        federated_algorithm(loss_fn, **{"work": EPOCHS, **settings})
    return seen[0]


def contracts_of(parts: Parts):
    """Each contract that the parts fill."""
    yield from (parts.global_rate, parts.local_rate, parts.client_rule, *parts.terms)
    yield from (parts.aggregator, parts.failures, parts.guard)


def test_the_probes_together_turn_on_every_flag_of_every_contract(monkeypatch):
    """A field that has a default has another value in some probe; a required one is none."""
    contracts = (RateRule, ClientRule, LocalTerm, Aggregator, FailureModel, Guard)
    probes = [parts_of(monkeypatch, settings) for settings in PROBES.values()]
    plain = parts_of(monkeypatch, PLAIN)
    turned_on = {contract: set() for contract in contracts}
    for part in (part for parts in probes for part in contracts_of(parts)):
        defaults = type(part)._field_defaults
        turned_on[type(part)] |= {name for name, default in defaults.items() if getattr(part, name) != default}
    missing = {c.__name__: set(c._field_defaults) - turned_on[c] for c in contracts}
    assert missing == {c.__name__: set() for c in contracts}, "no probe uses these fields"
    assert any(parts.guard.init is not no_state for parts in probes)
    kinds = {field.name: {_kind(getattr(parts, field.name)) for parts in probes} for field in dataclasses.fields(Parts)}
    for name, values in kinds.items():
        assert values - {_kind(getattr(plain, name))}, f"no probe has another {name}"


def _kind(value):
    """The key that tells two settings of `Parts` apart: a name or number itself, a part's name, or what it keeps."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(term.name for term in value)
    if isinstance(value, str | int | None):
        return value
    return getattr(value, "name", None) or str(jax.tree.structure(value.init(jnp.zeros(1))))


LATER = ("FedDyn and FedCM", "MIME-lite with G", "FedNova with Polyak's steps")


@pytest.mark.parametrize("bench", cases(PROBES, later=LATER), indirect=True)
def test_what_can_go_wrong_does(bench):
    """Where a probe names it: clients that do not start, updates that are lost, rounds that are taken back."""
    model = bench.line.settings.get("failure_model", failures.none())
    expected = {
        "not_started": model.before is not None,
        "lost": model.after is not None,
        "taken_back": "guard" in bench.line.settings,
    }
    happened = {name: sum(int(getattr(info, name)) for info in bench.infos) > 0 for name in expected}
    assert happened == expected
    assert any(int(info.participants) > 1 and not int(info.taken_back) for info in bench.infos)


# How terms are handed out SCAFFOLD tells; and chunked sorts, pads, and runs clients side by side and one by one.
@pytest.mark.parametrize("bench", cases(PROBES, later=LATER), indirect=True)
@pytest.mark.parametrize(
    "strategy",
    cases(["sequential", "chunked(3)", "sharded(vectorized)"], later=["sequential", "sharded(vectorized)"]),
)
def test_strategies_agree(bench, strategy):
    """With the vectorized one whose cohort is padded: states and records of a run, and a client left out."""
    own = Bench(bench.line, strategy=strategy, slots=COHORT)
    assert_close((own.states, own.infos), (bench.states, bench.infos), 1e-9)
    data, ids = poisoned(bench.data, 4, factor=np.nan), [1, 0, 4, 2]
    state = bench.states[-1]
    assert_close(own.round(state, ids, data), bench.round(state, ids, data), 1e-9)


@pytest.mark.product  # it has toys on the seam, as all have, and test_cli.py and test_round.py play rounds of it
def test_debug_agrees(bench):
    """In a round far enough on that every rule and every state plays its part.

    In float32, which differs by rounding only; but chances of failure are other draws there.
    """
    dtype = "float64" if "failure_model" in bench.line.settings else "float32"
    with jax.enable_x64(dtype == "float64"):
        algorithm = bench.line.build(strategy="debug")
        state = cast(bench.states[-2], jnp.dtype(dtype))
        ids = jnp.asarray(sampled_cohorts()[-1], jnp.int32)
        state, info = algorithm.round(run_key(), state, Cohort(data=federation(dtype), client_ids=ids))
        assert types_of(state) == types_of(algorithm.init(logistic_params(jnp.dtype(dtype))))
    told = {"bytes_up": 0, "bytes_down": 0}
    expected = bench.states[-1], bench.infos[-1]._replace(**told)
    assert_close((state, info._replace(**told)), expected, 1e-9 if dtype == "float64" else 1e-5)
