"""Every method equals an independent NumPy transcription, fed the same batches, ragged clients, 20 rounds."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedhyper_jax as fh
from fedhyper_jax import client_rules, rates, terms
from fedhyper_jax.data import Cohort, local_epochs, local_steps, pack
from tests.duel import POPULATION, cached_duel, flatten
from tests.helpers import cases, logistic_loss, product
from tests.methods.test_contracts import LATER as LATER_CONTRACTS
from tests.methods.test_contracts import TRANSCRIPTIONS
from tests.reference import baselines_numpy as oracle

MOMENTUM = optax.sgd(1.0, momentum=0.9)
BETA = 0.05


def hyper(schedulers, **settings):
    return lambda work: fh.fedhyper(logistic_loss, schedulers, work=work, **{"local_rate": BETA, **settings})


def made(factory, **settings):
    return lambda work: factory(logistic_loss, work=work, **{"local_rate": BETA, **settings})


# name: (our algorithm, the oracle's method, its settings)
CASES = {
    "fedavg": (made(fh.fedavg), "fedavg", {}),
    "fedavg, uniform": (made(fh.fedavg, weighting="uniform"), "fedavg", {"weighting": "uniform"}),
    "fedavgm": (made(fh.fedavgm, global_rate=0.3), "fedavgm", {"alpha": 0.3}),
    "fedadagrad": (made(fh.fedadagrad), "fedadagrad", {"alpha": 0.1}),
    "fedadam": (made(fh.fedadam, global_rate=0.02), "fedadam", {"alpha": 0.02}),
    "fedadam, corrected": (made(fh.fedadam_corrected, global_rate=0.02), "fedadam_corrected", {"alpha": 0.02}),
    "fedyogi": (made(fh.fedyogi, global_rate=0.02), "fedyogi", {"alpha": 0.02}),
    "fedexp": (made(fh.fedexp, epsilon=1e-3), "fedexp", {"fedexp_eps": 1e-3}),
    "fedexp, uniform": (
        made(fh.fedexp, epsilon=0.0, weighting="uniform"),
        "fedexp",
        {"fedexp_eps": 0.0, "weighting": "uniform"},
    ),
    "fathom": (made(fh.fathom, upper=0.052), "fathom", {"fathom_upper": 0.052}),
    "fedprox": (made(fh.fedprox, proximal_weight=0.7), "fedprox", {"mu": 0.7}),
    "scaffold": (made(fh.scaffold, population=POPULATION), "scaffold", {"scaffold_weights": "examples"}),
    "scaffold, uniform, momentum clients": (
        made(fh.scaffold, population=POPULATION, client_optimizer=MOMENTUM, local_rate=0.01, weighting="uniform"),
        "scaffold",
        {"client_optimizer": "momentum", "beta": 0.01, "weighting": "uniform"},
    ),
    "fednova": (made(fh.fednova), "fednova", {}),
    "fednova, momentum clients": (
        made(fh.fednova, client_optimizer=MOMENTUM, local_rate=0.01),
        "fednova",
        {"client_optimizer": "momentum", "beta": 0.01},
    ),
    "fednova, proximal": (
        made(fh.fednova, terms=[terms.proximal(0.7)]),
        "fednova_prox",
        {"mu": 0.7},
    ),
    "feddyn, by examples": (
        made(fh.feddyn, population=POPULATION, dynamic_weight=0.3),
        "feddyn",
        {"dyn_alpha": 0.3, "dyn_scaling": "examples"},
    ),
    "feddyn, uniform": (
        made(fh.feddyn, population=POPULATION, dynamic_weight=0.3, weighting="uniform"),
        "feddyn",
        {"dyn_alpha": 0.3, "dyn_scaling": "uniform"},
    ),
    "fedcm": (made(fh.fedcm), "fedcm", {"cm_a": 0.1}),
    "mime_lite": (made(fh.mime_lite, local_rate=0.01), "mimelite", {"beta": 0.01}),
    "mime_lite, adam": (
        made(fh.fedavg, local_rate=0.01, terms=[terms.frozen_optimizer(optax.adam(1.0))]),
        "mimelite",
        {"beta": 0.01, "mime_base": "adam"},
    ),
    "delta_sgd": (made(fh.delta_sgd, local_rate=0.2), "delta_sgd", {"beta": 0.2}),
    "fedsps": (made(fh.fedsps, local_rate=1.0), "fedsps", {"beta": 1.0}),
    "fedsls": (
        lambda work: fh.fedavg(logistic_loss, work=work, local_rate=1.0, client_rule=client_rules.armijo(growth=None)),
        "fedsls",
        {"beta": 1.0},
    ),
    "G": (hyper("G", hyper_rate=0.5), "fedhyper_g", {"kappa": 0.5}),
    "κ per scheduler": (
        hyper("G+SL+CL", hyper_rate={"G": 0.4, "SL": 0.01, "CL": 0.1}),
        "fedhyper_cl",
        {
            "global_rate": "G",
            "server_local_rate": "SL",
            "kappa": 0.4,
            "kappa_local": 0.01,
            "kappa_client": 0.1,
        },
    ),
    "CL, warm": (
        hyper("CL", hyper_rate=0.02, client_rates="warm"),
        "fedhyper_cl",
        {"rate_start": "warm", "kappa_client": 0.02},
    ),
    "SL+CL, warm": (
        hyper("SL+CL", hyper_rate=0.02, client_rates="warm"),
        "fedhyper_cl",
        {"rate_start": "warm", "server_local_rate": "SL", "kappa_local": 0.02, "kappa_client": 0.02},
    ),
    "CL, per client": (
        hyper("CL", hyper_rate=0.02, client_rates="per_client", population=POPULATION),
        "fedhyper_cl",
        {"rate_start": "per_client", "kappa_client": 0.02},
    ),
    "CL, global weight 0": (
        hyper("CL", hyper_rate=0.1, global_weight=0.0),
        "fedhyper_cl",
        {"global_weight": 0.0, "kappa_client": 0.1},
    ),
    "CL, global weight 2": (
        hyper("CL", hyper_rate=0.1, global_weight=2.0),
        "fedhyper_cl",
        {"global_weight": 2.0, "kappa_client": 0.1},
    ),
    # compositions
    "fedprox + G": (
        hyper("G", hyper_rate=0.5, terms=[terms.proximal(0.7)]),
        "fedprox",
        {"mu": 0.7, "global_rate": "G", "kappa": 0.5},
    ),
    "scaffold + fedexp": (
        made(fh.scaffold, population=POPULATION, global_rate=rates.extrapolation(1e-3)),
        "scaffold",
        {"global_rate": "fedexp", "fedexp_eps": 1e-3, "scaffold_weights": "examples"},
    ),
    "scaffold + CL": (
        hyper("CL", hyper_rate=0.05, terms=[terms.control_variates(POPULATION)]),
        "scaffold",
        {"client_rate": "CL", "kappa_client": 0.05, "scaffold_weights": "examples"},
    ),
    "fedcm + CL": (
        hyper("CL", hyper_rate=0.05, terms=[terms.client_momentum(0.3)]),
        "fedcm",
        {"client_rate": "CL", "kappa_client": 0.05, "cm_a": 0.3},
    ),
    "fednova + CL": (
        hyper("CL", hyper_rate=0.05, terms=[terms.normalized_averaging()]),
        "fednova",
        {"client_rate": "CL", "kappa_client": 0.05},
    ),
    "feddyn + SL": (
        hyper("SL", hyper_rate=0.05, terms=[terms.dynamic_regularization(POPULATION, 0.3)], weighting="uniform"),
        "feddyn",
        {"dyn_alpha": 0.3, "dyn_scaling": "examples", "server_local_rate": "SL", "kappa_local": 0.05},
    ),
    "momentum clients + SL": (
        hyper("SL", hyper_rate=0.01, client_optimizer=MOMENTUM, local_rate=0.01),
        "fedhyper_sl",
        {"client_optimizer": "momentum", "beta": 0.01, "kappa_local": 0.01},
    ),
    "fedprox + Δ-SGD": (
        made(fh.delta_sgd, local_rate=0.2, terms=[terms.proximal(0.7)]),
        "fedprox",
        {"client_rate": "delta_sgd", "mu": 0.7, "beta": 0.2},
    ),
    "scaffold + Δ-SGD": (
        made(fh.delta_sgd, local_rate=0.2, terms=[terms.control_variates(POPULATION)]),
        "scaffold",
        {"client_rate": "delta_sgd", "beta": 0.2, "scaffold_weights": "examples"},
    ),
    "fedprox + FedSPS": (
        made(fh.fedsps, local_rate=1.0, terms=[terms.proximal(0.7)]),
        "fedprox",
        {"client_rate": "sps", "mu": 0.7, "beta": 1.0},
    ),
    "fedadam + fedprox": (
        made(fh.fedadam, global_rate=0.02, terms=[terms.proximal(0.7)]),
        "fedadam",
        {"corrections": ("prox",), "mu": 0.7, "alpha": 0.02},
    ),
    "fathom + fedexp": (
        made(fh.fathom, cosine_rate=0.1, global_rate=rates.extrapolation(1e-3)),
        "fathom",
        {"fathom_step": 0.1, "global_rate": "fedexp", "fedexp_eps": 1e-3},
    ),
}
WORKS = {"epochs": local_epochs(2, batch_size=8), "steps": local_steps(5, batch_size=6)}


def assert_same_run(states, infos, records, algorithm, tolerance):
    def close(ours, theirs, what, scale=None):
        scale = np.linalg.norm(theirs) if scale is None else scale
        assert np.linalg.norm(np.asarray(ours) - theirs) <= tolerance * scale + 1e-30, what

    for before, after, info, record in zip(states[:-1], states[1:], infos, records, strict=True):
        where = f"round {record.round}"
        close(flatten(after.params), record.w, f"{where}: parameters")
        close(flatten(after.pseudo_gradient), record.pseudo_gradient, f"{where}: pseudo-gradient")
        close(info.global_rate, record.alpha, f"{where}: global rate")
        if "rate" not in after.clients:
            close(info.local_rate, record.beta, f"{where}: local rate")
        finals = np.array(list(record.final_rates.values()))
        close(
            [info.client_rate_min, info.client_rate_median, info.client_rate_max],
            np.array([finals.min(), np.median(finals), finals.max()]),
            f"{where}: final rates",
        )
        scale = np.linalg.norm(flatten(before.pseudo_gradient)) * np.linalg.norm(record.pseudo_gradient)
        close(info.inner_product, record.inner_product, f"{where}: inner product", scale)
        if algorithm.evaluated_params is not fh.base.current_params:
            close(flatten(algorithm.evaluated_params(after)), record.evaluation, f"{where}: evaluated parameters")
        for name, rows in (("control_variates", record.state.c), ("dynamic_regularization", record.state.h)):
            if name in after.clients:
                expected = np.array([rows[m] for m in range(POPULATION)])
                ours = np.array([flatten(jax.tree.map(lambda x, m=m: x[m], after.clients[name])) for m in rows])
                close(ours, expected, f"{where}: rows of {name}")
        if "rate" in after.clients:
            close(after.clients["rate"], np.array([record.state.rates[m] for m in range(POPULATION)]), f"{where}: rows")


LATER = ("scaffold", "fednova, momentum clients", "fedexp", "feddyn, by examples", "mime_lite", "delta_sgd", "fedsls")
"""With equal numbers of steps, as test_paper_mode.py has them in `make test`."""


AGAIN = {
    **{name: name for name in TRANSCRIPTIONS if name in CASES and name not in LATER_CONTRACTS},
    "G": "all of fedhyper",
    "κ per scheduler": "all of fedhyper",
    "CL, global weight 2": "all of fedhyper",
    "CL, warm": "fedcm+fedyogi+CL, warm",
    "fedcm": "fedcm+fedyogi+CL, warm",
    "fedcm + CL": "fedcm+fedyogi+CL, warm",
    "fedyogi": "fedcm+fedyogi+CL, warm",
    "CL, per client": "feddyn+CL, per client",
    "feddyn, by examples": "feddyn+CL, per client",
    "fathom": "fathom+fedadam+ngn",
    "fedadam": "fathom+fedadam+ngn",
    "fednova": "fednova+G+delta_sgd",
    "fednova + CL": "fednova+G+delta_sgd",  # another rule that moves the rate
    "delta_sgd": "fednova+G+delta_sgd",
    "fedprox": "fedprox+fedsps",
    "fedsps": "fedprox+fedsps",
    "fedprox + FedSPS": "fedprox+fedsps",
    "mime_lite": "mime_lite+G",
    "fedexp": "scaffold+fedexp+CL, momentum",
    "scaffold": "scaffold+fedexp+CL, momentum",
    "scaffold + fedexp": "scaffold+fedexp+CL, momentum",
    "scaffold + CL": "scaffold+fedexp+CL, momentum",
}
"""Cases that `test_contracts.py` transcribes too, with its lines, on another federation: here with `make test-all`."""
BY_HAND = {
    *("fedavgm", "fedadagrad", "fedadam, corrected", "fednova, momentum clients", "fednova, proximal"),
    *("fedexp, uniform", "feddyn, uniform", "scaffold, uniform, momentum clients"),
}
"""What test_known_mistakes.py works out by hand: server steps, FedNova's divisors, what weights change elsewhere."""
STOOD_FOR = {
    "fedavg": "fedprox",
    "fedavg, uniform": "fedprox",  # uniformly, and with momentum, in test_paper_mode.py
    "mime_lite, adam": "mime_lite",  # and FedJAX's, below
    "CL, global weight 0": "CL, global weight 2",  # and test_known_mistakes.py computes both weights by hand
    "SL+CL, warm": "CL, warm",
    "momentum clients + SL": "scaffold",  # with momentum and CL
    "fedprox + G": "fedprox + FedSPS",
    "fedprox + Δ-SGD": "fedprox + FedSPS",
    "scaffold + Δ-SGD": "scaffold + CL",
    "fathom + fedexp": "fathom",
    "feddyn + SL": "feddyn, by examples",
    "fedadam + fedprox": "fedprox + FedSPS",
}
"""Compositions of parts that are transcribed one by one, and the case nearest to each: they wait as well."""


def test_what_is_left_to_the_contracts_is_done_there():
    """And not left by them, in turn, to the full product."""
    assert set(AGAIN) <= set(CASES)
    assert set(AGAIN.values()) <= set(TRANSCRIPTIONS) - LATER_CONTRACTS
    assert BY_HAND | {*STOOD_FOR, *STOOD_FOR.values()} <= set(CASES)
    assert not set(STOOD_FOR.values()) & {*BY_HAND, *STOOD_FOR}
    assert not set(STOOD_FOR) & {*AGAIN, *BY_HAND}


@pytest.mark.parametrize(
    ("case", "work"),
    [
        *(product(case, "epochs") if case in {*AGAIN, *BY_HAND, *STOOD_FOR} else (case, "epochs") for case in CASES),
        *(product(case, "steps") for case in LATER),
    ],
)
def test_equals_the_transcription(ragged, float64, case, work):
    make, method, settings = CASES[case]
    duel = cached_duel(jnp.float64, WORKS[work], ragged)
    algorithm = make(WORKS[work])
    states, infos = duel.package(algorithm)
    records = duel.baseline(method, **{"beta": BETA, **settings})
    assert_same_run(states, infos, records, algorithm, 1e-9)
    assert np.linalg.norm(records[-1].w - duel.start) > 1e-3  # it went somewhere


@pytest.mark.parametrize(
    "case",
    # (in make test test_paper_mode.py compares in float32)
    [
        product(case)
        for case in (
            *("fedadam", "scaffold", "fedexp", "fednova, momentum clients"),
            *("feddyn, by examples", "delta_sgd", "fedcm"),
        )
    ],
)
def test_equals_the_transcription_in_float32(ragged, case):
    make, method, settings = CASES[case]
    duel = cached_duel(jnp.float32, WORKS["epochs"], ragged)
    states, _ = duel.package(make(WORKS["epochs"]))
    settings = {name: float(np.float32(v)) if name in ("alpha", "beta") else v for name, v in settings.items()}
    records = duel.baseline(method, **{"beta": float(np.float32(BETA)), **settings})
    for state, record in zip(states[1:], records, strict=True):
        assert np.linalg.norm(flatten(state.params) - record.w) <= 3e-5 * np.linalg.norm(record.w), record.round


# With momentum, and CL, test_paper_mode.py transcribes it; with Adam test_known_mistakes.py works it out by hand.
@pytest.mark.product
@pytest.mark.parametrize("server", ["adam", "momentum"])
def test_the_applied_inner_product_equals_the_transcription(ragged, float64, server):
    """⟨Δ^t, u^{t-1}⟩ with the direction of the server's optimizer, for G and SL."""
    work = WORKS["epochs"]
    duel = cached_duel(jnp.float64, work, ragged)
    optimizer = {"adam": optax.adam(1e-2), "momentum": MOMENTUM}[server]
    algorithm = hyper("G+SL", hyper_rate=0.1, local_rate=0.02, inner_product="applied", server_optimizer=optimizer)(
        work
    )
    states, infos = duel.package(algorithm)
    records = duel.reference(
        schedulers=frozenset({"G", "SL"}),
        alpha=1.0,
        beta=0.02,
        kappa_global=0.1,
        kappa_server_local=0.1,
        server_optimizer=server,
        inner_product="applied",
    )
    for state, info, record in zip(states[1:], infos, records, strict=True):
        np.testing.assert_allclose(flatten(state.params), record.w, rtol=1e-8)
        np.testing.assert_allclose(info.global_rate, record.alpha, rtol=1e-9)
        np.testing.assert_allclose(info.local_rate, record.beta, rtol=1e-9)
    assert abs(records[-1].alpha - 1) > 1e-3


REFERENCE_VARIANTS = {
    "G": "G",
    "GM": "GM",
    "CL": "CL",
    "FULL": "FULL",
    "FedAdam+FedHyper": "FedAdam",
    "SL": "FedAvg",
    "Decay-SL": "FedAvg",
}


# All of it at once, FULL with momentum, test_contracts.py transcribes; its parts follow the hand traces in
# test_known_mistakes.py.
@pytest.mark.product
@pytest.mark.parametrize("momentum", [0.5, 0.0])
@pytest.mark.parametrize("variant", REFERENCE_VARIANTS)
def test_reference_variants_equal_the_transcription(ragged, float64, variant, momentum):
    """The authors' code, with its momentum of 0.5 and without; its SL and Decay-SL are FedAvg."""
    work = local_epochs(2, batch_size=8)
    duel = cached_duel(jnp.float64, work, ragged)
    optimizer = optax.sgd(1.0, momentum=momentum) if momentum else None
    algorithm = fh.fedhyper(
        logistic_loss, variant, variant="reference", work=work, local_rate=0.1, client_optimizer=optimizer
    )
    states, infos = duel.package(algorithm)
    gradients = [
        {m: [lambda w, rows=rows: duel.problem.gradient(w, rows) for rows in steps] for m, steps in batches.items()}
        for batches in duel.batches
    ]
    records = oracle.reference_run(
        REFERENCE_VARIANTS[variant],
        duel.start,
        gradients,
        0.1,
        steps_per_epoch={m: -(-n // 8) for m, n in enumerate(duel.sizes)},
        momentum=momentum,
    )
    for state, info, record in zip(states[1:], infos, records, strict=True):
        np.testing.assert_allclose(flatten(state.params), record.w, rtol=1e-8, atol=1e-10)
        if variant in ("G", "GM", "FULL", "FedAdam+FedHyper"):
            np.testing.assert_allclose(info.global_rate, 1 + record.agg, rtol=1e-9)
    if variant in ("CL", "FULL"):
        assert any(float(info.client_rate_max) > 0.1 for info in infos)


# ----------------------------------------------------------------------------------------------------------------------
# FedJAX 0.0.17, run once in an environment of its own: tests/reference/fedjax_traces.py
# ----------------------------------------------------------------------------------------------------------------------

TRACES = json.loads((pathlib.Path(__file__).parents[1] / "reference" / "fedjax_traces.json").read_text())


def fedjax_optimizer(name):
    """FedJAX's server optimizers are optax's, with constants of their own."""
    return {
        "fed_avg_sgd": optax.sgd(1.0),
        "fed_avg_sgd_momentum": optax.sgd(0.5, momentum=0.9),
        "fed_avg_adam": optax.adam(0.05, b1=0.9, b2=0.99, eps=1e-3),
        "fed_avg_adagrad": optax.adagrad(0.3, initial_accumulator_value=0.1, eps=1e-6),
        "fed_avg_yogi": optax.yogi(0.05, b1=0.9, b2=0.99, eps=1e-3),
        "fed_avg_client_momentum": optax.sgd(1.0),
    }[name]


def fedjax_twin(name, work):
    common = {"work": work, "local_rate": 0.1}
    if name == "fed_prox":
        return fh.fedprox(logistic_loss, proximal_weight=1.0, **common)
    if name.startswith("mime_lite"):
        if name == "mime_lite_adam":
            frozen = terms.frozen_optimizer(optax.adam(1.0, 0.9, 0.99, 1e-3))
            return fh.fedavg(logistic_loss, work=work, local_rate=0.05, terms=[frozen])
        return fh.mime_lite(logistic_loss, global_rate=0.5 if "half" in name else 1.0, **common)
    client = MOMENTUM if name == "fed_avg_client_momentum" else None
    return fh.fedavg(logistic_loss, server_optimizer=fedjax_optimizer(name), client_optimizer=client, **common)


FEDJAX = [name for name in TRACES["traces"] if name != "mime_sgd_momentum"]
FEW = ("mime_lite_adam",)


@pytest.mark.parametrize("name", cases(FEDJAX, later=set(FEDJAX) - set(FEW)))
def test_equals_fedjax(float64, name):
    """Full batches, so that nobody's shuffling matters; MIME itself is not ours."""
    clients = TRACES["clients"]
    sizes = [len(client["labels"]) for client in clients.values()]
    rows = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    examples = {
        "x": np.concatenate([np.array(client["features"], float) for client in clients.values()]),
        "y": np.concatenate([np.array(client["labels"], np.int32) for client in clients.values()]),
    }
    data = pack(examples, rows)
    numbers = {client: index for index, client in enumerate(clients)}
    algorithm = fedjax_twin(name, local_epochs(TRACES["local_steps"], batch_size=max(sizes)))
    state = algorithm.init({k: jnp.asarray(v, float) for k, v in TRACES["initial_parameters"].items()})
    round_fn = jax.jit(algorithm.round)
    for cohort, expected in zip(TRACES["cohorts"], TRACES["traces"][name]["parameters"], strict=True):
        ids = jnp.array([numbers[client] for client in cohort])
        state, _ = round_fn(jax.random.key(0), state, Cohort(data=data, client_ids=ids))
        for leaf, values in expected.items():
            np.testing.assert_allclose(state.params[leaf], values, rtol=0, atol=1e-12)
