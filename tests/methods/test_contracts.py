"""Contracts that every method keeps, and its independent NumPy transcription, on one compiled round each.

The table is `tests.algorithms`. What a strategy may not change is shown where strategies meet clients
(`tests/engine/test_strategies.py`) and by a few probes run whole (`tests/engine/test_probes.py`); the product of all
methods and all strategies belongs to ``make test-all``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import sweep
from fedhyper_jax.base import RoundInfo, current_params
from fedhyper_jax.data import Cohort
from fedhyper_jax.methods import METHODS, method_options, parse_method
from tests import compare
from tests.algorithms import (
    CHOICES,
    COHORT,
    COMPOSITIONS,
    EPOCHS,
    LINES,
    METHOD_LINES,
    POPULATION,
    ROUNDS,
    STATIC,
    VALUES,
)
from tests.bench import CLASSES, SIZES, Bench, drawn_batches, examples, federation, poisoned, run_key, sampled_cohorts
from tests.compare import assert_identical, cast, differs, same_program, types_of
from tests.duel import flatten
from tests.helpers import cases, logistic_params, mixed_params
from tests.reference import baselines_numpy as oracle
from tests.reference.fedhyper_numpy import softmax_regression

assert_close = functools.partial(compare.assert_close, tolerance=1e-9)  # another order of summation in float64


@pytest.fixture(scope="module", autouse=True)
def wide():
    """All of this module runs in float64, but for what says otherwise."""
    with jax.enable_x64(True):
        yield


SUMS = {
    *("fedprox+G", "fednova+fedprox", "fathom+CL", "feddyn+SL", "delta_sgd+fedprox", "fedcm+fedyogi"),
    *("scaffold+SL, momentum", "fedadam+G", "G+SL+CL", "fedprox+scaffold"),
}
"""Compositions of which each part keeps its contracts in another one: here with ``make test-all``."""
ALIKE = {
    # tables and plateaus are rules of either rate, and 'plateau_global+clipped+median' holds one of their kind
    *("decay_global", "decay_local", "plateau_local"),
    "server_mechanic",  # as `server_dog`; both equal optax's in test_known_mistakes.py
    *("reference_G", "reference_GM", "reference_CL", "reference_SL"),  # each a part of `reference_FULL`
    *("fedavg, uniform, equal steps", "bounds as pairs"),  # test_round.py has them as data; a transcription, uniform
    "fedadam+G, applied",  # transcribed in test_transcriptions.py
    *("fedavgm", "fedadagrad", "fedadam_corrected", "reference_FedAdam"),  # server steps as FedAdam's and FedYogi's
}
"""Lines that a line of the same kind stands for; all of them are transcribed, or compared in closed form, elsewhere."""
HELD = {
    "fedavg": "mime_lite+G",  # and its rates in 'fedprox+fedsps'
    "G": "all of fedhyper",
    "SL": "all of fedhyper",
    "CL": "all of fedhyper",
    "retained_gain": "retained_gain+server_dog",
    "server_dog": "retained_gain+server_dog",
    "plateau_global": "plateau_global+clipped+median",
    "median": "plateau_global+clipped+median",
    "clipped+median": "plateau_global+clipped+median",
    "clipped": "line search that gives up, clipped",
    "fedsls": "line search that gives up, clipped",
    "scaffold": "scaffold+fedexp+CL, momentum",
    "fedexp": "scaffold+fedexp+CL, momentum",
    "scaffold+fedexp": "scaffold+fedexp+CL, momentum",
    "fathom": "fathom+fedadam+ngn",
    "fedadam": "fathom+fedadam+ngn",
    "ngn": "fathom+fedadam+ngn",
    "fedprox": "fedprox+fedsps",
    "fedsps": "fedprox+fedsps",
    "fednova": "fednova+G+delta_sgd",
    "fednova+G": "fednova+G+delta_sgd",  # and with momentum by hand in test_known_mistakes.py
    "delta_sgd": "fednova+G+delta_sgd",
    "feddyn": "feddyn+CL, per client",
    "CL, per client": "feddyn+CL, per client",
    "fedcm": "fedcm+fedyogi+CL, warm",
    "fedyogi": "fedcm+fedyogi+CL, warm",
    "CL, warm": "fedcm+fedyogi+CL, warm",
    "mime_lite": "mime_lite+G",
}
"""Lines, and the line that holds each together with others: with their options, states and transcription, if any.

What a part does wrong in a contract it does wrong beside others too: each keeps its own state, and all are fed alike.
"""
LATER = SUMS | ALIKE | set(HELD)
KINDS = (
    *("fedprox+fedsps", "feddyn+CL, per client", "fathom+fedadam+ngn", "fedcm+fedyogi+CL, warm"),
    *("fednova+G+delta_sgd", "scaffold+fedexp+CL, momentum", "line search that gives up, clipped", "reference_FULL"),
)
"""Lines with every number of a term or client rule, an evaluation elsewhere and rows; test_rules.py has other parts.
"""
TYPED = ("mime_lite+G", "plateau_global+clipped+median", "retained_gain+server_dog")
"""And with what those lack of terms, aggregators and server steps."""


@pytest.fixture(scope="module", params=cases(LINES, later=LATER))
def bench(request):
    """Of the module, so that all tests of a line follow each other and share its compiled round."""
    return Bench(LINES[request.param])


of_every_kind = pytest.mark.parametrize("bench", cases(LINES, later=set(LINES) - set(KINDS)), indirect=True)


def test_every_method_and_option_is_in_the_table():
    """A method or an option that nobody entered would be held to nothing."""
    assert set(METHOD_LINES) == set(METHODS)
    taken = {option for name in METHODS for option in method_options(name)}
    assert taken - set(VALUES) - set(STATIC) - CHOICES == set()
    assert (set(VALUES) - {"local_rate"} | set(STATIC) | CHOICES) - taken == set()
    assert {part for name in COMPOSITIONS if "+" in name for part in parse_method(name.split(",")[0])} <= set(METHODS)
    assert not set(HELD.values()) & LATER
    assert not set(HELD) & (SUMS | ALIKE)


# ------------------------------------------------------------------------------------------------ types and records


def test_a_round_keeps_structure_shapes_dtypes_and_weak_types(bench):
    """So that it can be scanned, and so that the second round does not compile anew."""
    assert types_of(bench.states[1]) == types_of(bench.states[0])
    assert types_of(bench.states[-1]) == types_of(bench.states[0])
    weak = [leaf for leaf in jax.tree.leaves(types_of((bench.states[0], bench.infos[0]))) if leaf.weak_type]
    assert not weak


def test_a_round_records_finite_scalars(bench):
    """Every field, after two rounds."""
    for info in bench.infos[:2]:
        assert isinstance(info, RoundInfo)
        for field, value in info._asdict().items():
            assert jnp.shape(value) == (), field
            assert np.isfinite(value), field
        positive = ("global_rate", "local_rate", "client_rate_min", "client_loss", "bytes_up", "bytes_down", "examples")
        assert all(getattr(info, field) > 0 for field in positive)
        assert (int(info.participants), int(info.left_out)) == (COHORT, 0)
        assert (int(info.not_started), int(info.lost), int(info.taken_back)) == (0, 0, 0)


def types_are_kept(bench, params):
    """Asserts that parameters and state keep their types in a round, and that rates are float32."""
    start = jax.eval_shape(bench.algorithm.init, params)
    cohort = Cohort(data=federation("float32"), client_ids=jnp.arange(COHORT, dtype=jnp.int32))
    state, info = jax.eval_shape(bench.algorithm.round, run_key(), start, cohort)
    assert state == start
    assert jax.tree.map(lambda leaf: leaf.dtype, state.params) == jax.tree.map(lambda leaf: leaf.dtype, params)
    rates_seen = (state.global_rate.rate, state.local_rate.rate, info.client_rate_max, info.global_rate)
    assert {rate.dtype for rate in rates_seen} == {jnp.dtype(jnp.float32)}


# Rules of rates and server steps are held to it one by one in test_rules.py; here every term is.
@pytest.mark.parametrize("bench", cases(LINES, later=set(LINES) - {*KINDS, *TYPED}), indirect=True)
def test_mixed_dtypes_are_kept(bench, request):
    """Finds a leaf that took the type of another."""
    if bench.line.not_mixed:
        request.applymarker(pytest.mark.xfail(strict=True, reason=bench.line.not_mixed))
    with jax.enable_x64(False):
        types_are_kept(bench, mixed_params())


# Rules of rates and server steps are held to it one by one in test_rules.py.
@of_every_kind
@pytest.mark.parametrize("dtype", cases(["bfloat16", "float32"], later=["float32"]))
def test_smaller_dtypes_are_kept(bench, dtype):
    """bfloat16 finds a rate that took the type of the parameters."""
    with jax.enable_x64(False):
        types_are_kept(bench, logistic_params(jnp.dtype(dtype)))


def test_float64_is_float64_throughout(bench):
    """Parameters, rates and all other floating-point state."""
    leaves = jax.tree.leaves((bench.states[-1], bench.infos[-1]))
    kinds = {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert kinds == {jnp.dtype("float64")}


WITH_ROWS = [name for name, line in LINES.items() if line.rows]


@pytest.mark.parametrize("bench", cases([*WITH_ROWS, "mime_lite+G"], later=LATER), indirect=True)
def test_data_of_another_population_are_refused(bench):
    """Where rows are kept; without them any data will do."""
    cohort = Cohort(data=federation("float64", POPULATION - 1), client_ids=jnp.arange(COHORT, dtype=jnp.int32))
    if bench.line.rows:
        with pytest.raises(ValueError, match=f"keeps {POPULATION} clients, but the data set has {POPULATION - 1}"):
            bench.algorithm.round(run_key(), bench.states[0], cohort)
    else:
        jax.eval_shape(bench.algorithm.round, run_key(), bench.states[0], cohort)


# ------------------------------------------------------------------------------------------------ data, not code


# Of the others the test below shows that every option acts by way of the state; not that it does so only.
@of_every_kind
def test_other_values_are_the_same_program(bench):
    """A round made from other, traced numbers is the same text when lowered; nothing is compiled.

    A number that the round used but through its state would be one more argument, one that it used in Python would be
    an error, and one that was written into the program of `bench` would be missing here.
    """
    line, arguments = bench.line, bench.arguments(bench.states[0], [])

    def round_fn(setting, *arguments):
        return line.build(**setting).round(*arguments)

    setting = {name: jnp.asarray(value) for name, value in line.setting(1).items()}
    assert same_program(jax.jit(round_fn).lower(setting, *arguments).as_text(), bench.lowered.as_text())


def test_other_values_are_other_data_for_the_same_program(bench):
    """The compiled round takes the states of all settings, given in whatever type, or traced, and every option acts."""
    line = bench.line
    traced = jax.eval_shape(lambda setting: bench.start(line.build(**setting)), line.setting(1))
    assert traced == types_of(bench.states[0])
    makers = (np.float64, jnp.float32)
    for index, make in enumerate(makers, start=1):
        algorithm = line.build(**{name: make(value) for name, value in line.setting(index).items()})
        assert types_of(bench.start(algorithm)) == types_of(bench.states[0])
    first = bench.algorithm.evaluated_params(bench.states[-1])
    for name, values in line.floats.items():
        changed = line.build(**{**line.setting(0), name: values[1]})
        assert differs(bench.reached(changed), first), f"{name} acts nowhere, or is no data"


@of_every_kind
def test_traced_values_make_the_same_states(bench):
    """So that a sweep, which makes its algorithms from traced numbers, starts where single runs do."""
    line = bench.line
    together = jax.jit(jax.vmap(lambda setting: bench.start(line.build(**setting))))(
        {name: jnp.asarray(values, float) for name, values in line.floats.items()}
    )
    for index in range(3):
        alone = bench.start(line.build(**line.setting(index)))
        assert_close(jax.tree.map(lambda leaf, i=index: leaf[i], together), alone)


# One with rows of clients, and an evaluation elsewhere; test_simulation.py sweeps all schedulers.
@pytest.mark.parametrize("bench", cases(LINES, later=set(LINES) - {"scaffold+fedexp+CL, momentum"}), indirect=True)
def test_a_sweep_equals_its_runs(bench):
    """In one program, with cohorts that are not padded."""
    line = bench.line
    params, history = sweep(
        line.build,
        {option: jnp.asarray(values) for option, values in line.floats.items()},
        run_key()[None],
        jax.tree.map(lambda leaf: leaf[None], bench.params()),
        bench.data,
        rounds=ROUNDS,
        cohort_size=COHORT,
    )
    for i in range(3):
        algorithm = line.build(**line.setting(i))
        states, infos = bench.play(bench.start(algorithm), sampled_cohorts())
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i, 0], params), algorithm.evaluated_params(states[-1]))
        infos = jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i, 0], history.info), infos)


# ------------------------------------------------------------------------------------------------ cohorts


def test_the_order_of_the_cohort_changes_nothing(bench):
    """Padded slots may stand anywhere."""
    state, info = bench.round(bench.states[-2], [POPULATION, *sampled_cohorts()[-1][::-1]])
    assert_close((state, info), (bench.states[-1], bench.infos[-1]))


def test_rows_belong_to_clients_that_took_part(bench):
    """Those of others stay bit for bit. A padded slot reads the last client's row, and must not write it: neither where
    that client is elsewhere nor where it takes part itself.
    """
    state = bench.states[-1]
    assert set(state.clients) == set(bench.line.rows)
    for ids in ([1, 0, 4, 2], [2, 7, 4, 1]):
        after, _ = bench.round(state, ids)
        others = np.setdiff1d(np.arange(POPULATION), ids)
        for name, rows in after.clients.items():
            for leaf, before in zip(jax.tree.leaves(rows), jax.tree.leaves(state.clients[name]), strict=True):
                leaf, before = np.asarray(leaf), np.asarray(before)
                assert_identical(leaf[others], before[others])
                same = np.all(np.reshape(leaf == before, (POPULATION, -1)), axis=1)
                assert not np.any(same[np.asarray(ids)])
        state = after


@pytest.mark.parametrize("poison", [{"offset": np.inf}, {"factor": np.nan}], ids=["loss", "gradient"])
def test_a_client_left_out_is_as_if_it_had_not_been_there(bench, poison):
    """Nor is its row written: it is the third of the cohort of four."""
    state = bench.states[0] if bench.line.counts_left_out else bench.states[-1]
    after, info = bench.round(state, [1, 0, 4, 2], poisoned(bench.data, 4, **poison))
    expected, expected_info = bench.round(state, [1, 0, 2])
    assert int(info.left_out) == 1
    for name, rows in after.clients.items():
        assert_identical(*(jax.tree.map(lambda x: np.asarray(x)[4], tree) for tree in (rows, state.clients[name])))
    assert_close(after, expected)
    # (that a client was there, and what it was sent)
    told = {"left_out": 0, "first_left_out": -1, "left_out_because": 0, "bytes_down": 0}
    assert_close(info._replace(**told), expected_info._replace(**told))


def test_padded_slots_alone_change_nothing_but_the_number_of_the_round(bench):
    """And what a schedule makes of it."""
    state = bench.states[-1]
    after, info = bench.round(state, [])
    assert (int(info.participants), int(info.left_out)) == (0, 0)
    assert np.isnan(info.client_loss) and np.isnan(info.inner_product)
    left = {"round": 0, "global_rate": 0, "local_rate": 0}
    assert_identical({**vars(after), **left}, {**vars(state), **left})
    assert int(after.round) == ROUNDS + 1
    for rate in ("global_rate", "local_rate"):
        if not hasattr(getattr(state, rate), "table"):
            assert_identical(getattr(after, rate), getattr(state, rate))


# ------------------------------------------------------------------------------------------------ transcriptions

_G, _FEDEXP, _FATHOM = (
    {"global_rate": "G", "kappa": "hyper_rate"},
    {"global_rate": "fedexp", "fedexp_eps": "epsilon"},
    {"fathom_step": "cosine_rate", "fathom_smoothing": "smoothing", "fathom_upper": "upper"},
)
_SL, _CL = (
    {"server_local_rate": "SL", "kappa_local": "hyper_rate"},
    {"kappa_client": "hyper_rate", "global_weight": "global_weight"},
)
_WARM, _PER_CLIENT = ({"client_rate": "CL", "rate_start": start, **_CL} for start in ("warm", "per_client"))
_FEDSPS, _NGN = {"sps_c": "polyak_scale", "sps_lstar": "lower_bound"}, {"ngn_lstar": "lower_bound"}
_FEDDYN = {"dyn_alpha": "dynamic_weight", "dyn_scaling": "examples"}
_DELTA_SGD = {"client_rate": "delta_sgd", "delta_gamma": "scale", "delta_delta": "growth"}
_BY_EXAMPLES, _UNIFORM, _MOMENTUM = (
    {"scaffold_weights": "examples"},
    {"weighting": "uniform"},
    {"client_optimizer": "momentum"},
)

TRANSCRIPTIONS = {
    "fedavg": ("fedavg", {}),
    "G": ("fedhyper_g", {"kappa": "hyper_rate"}),
    "SL": ("fedhyper_sl", {"kappa_local": "hyper_rate"}),
    "CL": ("fedhyper_cl", _CL),
    "fedexp": ("fedexp", _FEDEXP),
    "fathom": ("fathom", _FATHOM),
    "fedavgm": ("fedavgm", {}),
    "fedadagrad": ("fedadagrad", {}),
    "fedadam": ("fedadam", {}),
    "fedadam_corrected": ("fedadam_corrected", {}),
    "fedyogi": ("fedyogi", {}),
    "fedprox": ("fedprox", {"mu": "proximal_weight"}),
    "scaffold": ("scaffold", _BY_EXAMPLES),
    "fednova": ("fednova", {}),
    "feddyn": ("feddyn", _FEDDYN),
    "fedcm": ("fedcm", {"cm_a": "gradient_weight"}),
    "mime_lite": ("mimelite", {}),
    "delta_sgd": ("delta_sgd", _DELTA_SGD),
    "fedsps": ("fedsps", _FEDSPS),
    "ngn": ("ngn", _NGN),
    "G+SL+CL": ("fedhyper_cl", {**_G, **_SL, **_CL}),
    "all of fedhyper": (
        "fedhyper_cl",
        {
            **_G,
            **_SL,
            **_CL,
            **{"kappa": "kappa_g", "kappa_local": "kappa_sl", "kappa_client": "kappa_cl"},
            "global_bounds": (1 / 1.3, 1.3),
        },
    ),
    "fedprox+G": ("fedprox", {"mu": "proximal_weight", **_G}),
    "scaffold+fedexp": ("scaffold", {**_FEDEXP, **_UNIFORM}),
    "fednova+G": ("fednova", {**_G, **_MOMENTUM}),
    "fednova+fedprox": ("fednova_prox", {"mu": "proximal_weight"}),
    "fathom+CL": ("fathom", {**_FATHOM, **_CL, "client_rate": "CL"}),
    "feddyn+SL": ("feddyn", {"dyn_alpha": "dynamic_weight", **_SL, **_UNIFORM}),
    "delta_sgd+fedprox": ("fedprox", {"mu": "proximal_weight", **_DELTA_SGD}),
    "scaffold+SL, momentum": ("scaffold", {**_SL, **_MOMENTUM, **_BY_EXAMPLES}),
    "fedcm+fedyogi": ("fedcm", {"cm_a": "gradient_weight", "server": "fedyogi"}),
    "mime_lite+G": ("mimelite", _G),
    "CL, warm": ("fedhyper_cl", _WARM),
    "CL, per client": ("fedhyper_cl", _PER_CLIENT),
    "fedprox+fedsps": ("fedprox", {"mu": "proximal_weight", "client_rate": "sps", **_FEDSPS}),
    "feddyn+CL, per client": ("feddyn", {**_FEDDYN, **_PER_CLIENT}),
    "fednova+G+delta_sgd": ("fednova", {**_G, **_DELTA_SGD}),
    "fathom+fedadam+ngn": ("fathom", {**_FATHOM, "server": "fedadam", "client_rate": "ngn", **_NGN}),
    "fedcm+fedyogi+CL, warm": ("fedcm", {"cm_a": "gradient_weight", "server": "fedyogi", **_WARM}),
    "scaffold+fedexp+CL, momentum": (
        "scaffold",
        {**_FEDEXP, **_MOMENTUM, **_BY_EXAMPLES, "client_rate": "CL", **_CL},
    ),
}
"""Entry: the oracle's method and its settings; a string that names an option of the line stands for its value.
Other lines are transcribed in test_transcriptions.py, or are methods that are transcribed here with other options.
"""
TRANSCRIBED_ROUNDS = 12


@pytest.mark.parametrize("bench", cases(TRANSCRIPTIONS, later=LATER), indirect=True)
def test_equals_the_transcription(bench, request):
    """An independent one in NumPy, fed the same batches: parameters, rates, products and rows, round after round."""
    method, settings = TRANSCRIPTIONS[request.node.callspec.params["bench"]]
    given = bench.line.setting(0)
    settings = {"alpha": "global_rate", "beta": "local_rate", **settings}
    settings = {key: given.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
    if "global_rate" not in given:
        del settings["alpha"]
    arrays, rows = examples()
    problem = softmax_regression(arrays["x"], arrays["y"], CLASSES)
    cohorts = sampled_cohorts(TRANSCRIBED_ROUNDS)
    records = oracle.run(
        problem.gradient,
        problem.loss,
        flatten(bench.params()),
        cohorts,
        drawn_batches(TRANSCRIBED_ROUNDS),
        np.array(SIZES),
        method=method,
        client_rows=dict(enumerate(rows)),
        **settings,
    )
    states, infos = bench.play(bench.states[0], cohorts)
    for before, after, info, record in zip(states[:-1], states[1:], infos, records, strict=True):
        assert_equals_record(bench.algorithm, before, after, info, record)


@pytest.mark.parametrize("bench", ["reference_FULL"], indirect=True)
def test_the_authors_code_equals_its_transcription(bench):
    """CL on the clients, GM on the server, and the momentum that their clients have."""
    arrays, _ = examples()
    problem = softmax_regression(arrays["x"], arrays["y"], CLASSES)
    cohorts = sampled_cohorts(TRANSCRIBED_ROUNDS)
    gradients = [
        {m: [lambda w, rows=rows: problem.gradient(w, rows) for rows in steps] for m, steps in batches.items()}
        for batches in drawn_batches(TRANSCRIBED_ROUNDS)
    ]
    records = oracle.reference_run(
        "FULL",
        flatten(bench.params()),
        gradients,
        bench.line.setting(0)["local_rate"],
        steps_per_epoch={m: -(-size // EPOCHS.batch_size) for m, size in enumerate(SIZES)},
        momentum=0.5,
    )
    states, infos = bench.play(bench.states[0], cohorts)
    for state, info, record in zip(states[1:], infos, records, strict=True):
        assert_close((flatten(state.params), info.global_rate), (record.w, 1 + record.agg))
    assert any(float(info.client_rate_max) > bench.line.setting(0)["local_rate"] for info in infos)
    assert max(abs(record.agg) for record in records) > 1e-3


def assert_equals_record(algorithm, before, after, info, record):
    """A round of the package and of the oracle."""
    finals = np.array(list(record.final_rates.values()))
    scale = np.linalg.norm(flatten(before.pseudo_gradient)) * np.linalg.norm(record.pseudo_gradient)
    pairs = {
        "parameters": (flatten(after.params), record.w),
        "pseudo-gradient": (flatten(after.pseudo_gradient), record.pseudo_gradient),
        "global rate": (info.global_rate, record.alpha),
        "final rates": (
            np.array([info.client_rate_min, info.client_rate_median, info.client_rate_max]),
            np.array([finals.min(), np.median(finals), finals.max()]),
        ),
        "inner product": (np.array([info.inner_product, scale]), np.array([record.inner_product, scale])),
    }
    if algorithm.evaluated_params is not current_params:
        pairs["evaluated"] = (flatten(algorithm.evaluated_params(after)), record.evaluation)
    if "rate" in after.clients:
        pairs["rows of rates"] = (after.clients["rate"], np.array([record.state.rates[m] for m in range(POPULATION)]))
    else:
        pairs["local rate"] = (info.local_rate, record.beta)
    for name, rows in (("control_variates", record.state.c), ("dynamic_regularization", record.state.h)):
        if name in after.clients:
            ours = [flatten(jax.tree.map(lambda x, m=m: x[m], after.clients[name])) for m in range(POPULATION)]
            pairs[name] = (np.array(ours), np.array([rows[m] for m in range(POPULATION)]))
    assert_close({key: a for key, (a, _) in pairs.items()}, {key: b for key, (_, b) in pairs.items()})


# ------------------------------------------------------------------------------------------------ the full product


@pytest.mark.product
@pytest.mark.parametrize("strategy", ["sequential", "chunked(3)"])
def test_strategies_agree(bench, strategy):
    """With the vectorized one whose cohort is padded, over a run and with a client left out."""
    own = Bench(bench.line, strategy=strategy, slots=COHORT)
    assert_close((own.states, own.infos), (bench.states, bench.infos))
    data, ids = poisoned(bench.data, 4, factor=np.nan), [1, 0, 4, 2]
    assert_close(own.round(own.states[-1], ids, data), bench.round(own.states[-1], ids, data))


@pytest.mark.product
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_debug_agrees(bench, dtype):
    """In a round far enough on that every rule and every state plays its part; float32 differs by rounding only."""
    with jax.enable_x64(dtype == "float64"):
        algorithm = bench.line.build(strategy="debug", **bench.line.setting(0))
        state = cast(bench.states[-2], jnp.dtype(dtype))
        ids = jnp.asarray(sampled_cohorts()[-1], jnp.int32)
        state, info = algorithm.round(run_key(), state, Cohort(data=federation(dtype), client_ids=ids))
        assert types_of(state) == types_of(algorithm.init(logistic_params(jnp.dtype(dtype))))
    sizes = {"bytes_up": 0, "bytes_down": 0} if dtype == "float32" else {}
    expected = bench.states[-1], bench.infos[-1]._replace(**sizes)
    compare.assert_close((state, info._replace(**sizes)), expected, 1e-5 if dtype == "float32" else 1e-9)
