"""One table of contracts: every method, transform and rule of a rate enters by a line, and each line is held to all.

A new method is a line in METHOD_LINES or COMPOSITIONS; a new float option is a line in VALUES, or in STATIC with the
reason why another value of it needs another program.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax import _random, exponential_decay, fedavg, fedhyper, hypergradient, rates, server_optimizers, sweep
from fedhyper_jax.base import FederatedAlgorithm, RoundInfo
from fedhyper_jax.data import Cohort, local_epochs, local_steps, pack
from fedhyper_jax.data.cohorts import sample_cohort
from fedhyper_jax.methods import METHODS, make_method, method_options, parse_method
from fedhyper_jax.parts.client_rules import armijo
from fedhyper_jax.parts.rates import Feedback, RateRule
from tests.helpers import logistic_loss, logistic_params

POPULATION, COHORT, SLOTS, ROUNDS = 8, 4, 6, 4
EPOCHS = local_epochs(2, batch_size=4)
MOMENTUM = optax.sgd(1.0, momentum=0.9)
TOLERANCE = 1e-5
"""Of the norm of what is compared: another order of summation in float32."""
ACTS = 10 * TOLERANCE
"""How much an option must change, lest it could be ignored within the tolerance."""


def assert_close(actual, expected, tolerance=TOLERANCE):
    """Leaf by leaf, relative to the leaf's norm (or to 0.1, where cancellation leaves less)."""

    def check(path, a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        error = np.linalg.norm(np.subtract(a, b, out=np.zeros_like(a), where=a != b))
        allowed = tolerance * max(np.linalg.norm(b[np.isfinite(b)]), 0.1)
        assert error <= allowed, f"{jax.tree_util.keystr(path)} is off by {error:.2g}, allowed are {allowed:.2g}"

    jax.tree_util.tree_map_with_path(check, actual, expected)


def assert_identical(actual, expected):
    """Bit for bit."""
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), actual, expected)


def types_of(tree):
    """Structure, shapes, dtypes and weak types."""
    return jax.eval_shape(lambda tree: tree, tree)


def differs(a, b) -> bool:
    """Whether two trees differ by more than what a tolerance might hide."""
    distance, size = (np.sqrt(sum(np.sum(np.square(x)) for x in t)) for t in (differences(a, b), jax.tree.leaves(b)))
    return bool(distance > ACTS * size)


def differences(a, b) -> list[np.ndarray]:
    return [np.subtract(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]


def cast(tree, dtype):
    """All floating-point leaves in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def mixed_params():
    """Weights in bfloat16 and a bias in float32, as where a model keeps its norms in float32."""
    params = logistic_params()
    return {**params, "weights": params["weights"].astype(jnp.bfloat16)}


# ---------------------------------------------------------------------------------------------- the table of algorithms

VALUES: dict[str, tuple[float, float, float]] = {
    "local_rate": (0.05, 0.03, 0.08),
    "global_rate": (1.0, 0.7, 1.4),
    "hyper_rate": (0.5, 0.2, 1.0),
    "cosine_rate": (0.2, 0.5, 0.1),
    "global_weight": (0.5, 0.1, 2.0),
    "decay_factor": (0.9, 0.7, 0.95),
    "initial_distance": (0.1, 0.2, 0.05),
    "epsilon": (0.01, 0.1, 0.001),
    "smoothing": (0.5, 0.2, 0.8),
    "upper": (0.2, 0.0505, 0.1),
    "scale": (0.3, 0.2, 0.4),
    "growth": (0.1, 0.3, 0.02),
    "polyak_scale": (0.5, 0.7, 0.3),
    "lower_bound": (0.0, 0.1, -0.2),
    "decrease": (0.5, 0.3, 0.7),
    "shrink": (0.7, 0.8, 0.5),
    "proximal_weight": (0.1, 0.5, 1.0),
    "dynamic_weight": (0.1, 0.5, 1.0),
    "gradient_weight": (0.3, 0.6, 0.9),
    "clip_norm": (0.1, 0.05, 0.2),
}
"""Three values of each float option; other values are other data for the same program."""

_OPTAX = "a Python number in the update of an optax transform"
STATIC = {
    "b1": "a constant of the server optimizer",
    "b2": "a constant of the server optimizer",
    "adaptivity": "a constant of the server optimizer",
    "momentum": f"{_OPTAX} (sgd)",
    "initial_scale": f"{_OPTAX} (mechanize)",
    "weight_decay": f"{_OPTAX} (mechanize)",
    "plateau_factor": f"{_OPTAX} (reduce_on_plateau)",
    "patience": f"{_OPTAX} (reduce_on_plateau)",
    "average_rounds": f"{_OPTAX} (reduce_on_plateau)",
}
"""Number options whose other values are other programs, as documented, and why."""

CHOICES = {"global_bounds", "local_bounds", "global_gamma", "local_gamma", "inner_product", "client_rates"}
"""Options that are names; bounds as numbers and their γ are the business of the line 'all of fedhyper'."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """An algorithm of the table.

    Attributes:
      build: ``build(strategy=…, population=…, **floats)``.
      floats: three values of each float option, `local_rate` among them.
      rows: keys of `ServerState.clients`.
      not_mixed: why parameters of mixed dtypes do not keep their types, or fail; None where they keep them.
      counts_left_out: why a client that was left out still matters; None where it does not.
    """

    build: Callable[..., FederatedAlgorithm]
    floats: dict[str, tuple[float, float, float]]
    rows: tuple[str, ...] = ()
    not_mixed: str | None = None
    counts_left_out: str | None = None

    def setting(self, index: int) -> dict[str, float]:
        return {name: values[index] for name, values in self.floats.items()}


def loss_fn(params, batch):
    """Softmax regression; the data can make an example's loss infinite, or NaN with its gradient."""
    return logistic_loss(params, batch) * batch["factor"] + batch["offset"]


def line(name, *, floats=None, rows=(), not_mixed=None, counts_left_out=None, work=EPOCHS, **fixed) -> Line:
    """A method by name; ``floats`` where `VALUES` do not suit it, ``fixed`` for what is no number or static."""
    options = [option for option in method_options(name) if option in VALUES and option not in fixed]
    values = {option: VALUES[option] for option in ("local_rate", *options)}

    def build(*, strategy="vectorized", population=POPULATION, **given):
        if rows:
            given["population"] = population
        return make_method(name, loss_fn, work=work, strategy=strategy, schedule_rounds=ROUNDS + 2, **fixed, **given)

    return Line(
        build=build, floats=values | (floats or {}), rows=rows, not_mixed=not_mixed, counts_left_out=counts_left_out
    )


_SMALL = {"global_rate": (0.1, 0.07, 0.14)}
_SEARCHED = {"local_rate": (4.0, 6.0, 3.0)}
_POLYAK = {"local_rate": (1.5, 2.0, 1.0)}
_MECHANIZE = "optax.contrib.mechanize clips a sum in the tree's widest dtype by bounds in the dtype of the first leaf"
_DOG = "optax.contrib.dog scales every leaf by a distance in the tree's widest dtype (the server casts back)"
_COHORT_SIZE = "the authors' rule divides by the size of the cohort, as sent out"

METHOD_LINES = {
    "fedavg": line("fedavg"),
    "G": line("G"),
    "SL": line("SL"),
    "CL": line("CL"),
    "decay_global": line("decay_global"),
    "decay_local": line("decay_local"),
    "plateau_global": line("plateau_global", patience=1, plateau_factor=0.5),
    "plateau_local": line("plateau_local", patience=1, plateau_factor=0.5),
    "fedexp": line("fedexp"),
    "fathom": line("fathom"),
    "fedavgm": line("fedavgm"),
    "fedadagrad": line("fedadagrad", floats=_SMALL),
    "fedadam": line("fedadam", floats=_SMALL),
    "fedadam_corrected": line("fedadam_corrected", floats=_SMALL),
    "fedyogi": line("fedyogi", floats=_SMALL),
    "server_dog": line("server_dog"),
    "server_mechanic": line("server_mechanic", initial_scale=0.1, not_mixed=_MECHANIZE),
    "fedprox": line("fedprox"),
    "scaffold": line("scaffold", rows=("control_variates",)),
    "fednova": line("fednova"),
    "feddyn": line("feddyn", rows=("dynamic_regularization",)),
    "fedcm": line("fedcm"),
    "mime_lite": line("mime_lite"),
    "delta_sgd": line("delta_sgd"),
    "fedsps": line("fedsps", floats=_POLYAK),
    "fedsls": line("fedsls", floats=_SEARCHED),
    "median": line("median"),
    "clipped": line("clipped"),
    "reference_G": line("reference_G"),
    "reference_GM": line("reference_GM"),
    "reference_CL": line("reference_CL", counts_left_out=_COHORT_SIZE),
    "reference_FULL": line("reference_FULL", counts_left_out=_COHORT_SIZE),
    "reference_FedAdam": line("reference_FedAdam"),
    "reference_SL": line("reference_SL"),
}
"""The methods one by one."""


def all_of_fedhyper(*, strategy="vectorized", population=POPULATION, kappa_g, kappa_sl, kappa_cl, **floats):
    del population
    hyper_rate = {"G": kappa_g, "SL": kappa_sl, "CL": kappa_cl}
    return fedhyper(loss_fn, "G+SL+CL", work=EPOCHS, strategy=strategy, hyper_rate=hyper_rate, **floats)


def bounds_as_pairs(*, strategy="vectorized", population=POPULATION, lower, upper, local_lower, local_upper, **floats):
    del population
    pairs = {"global_bounds": (lower, upper), "local_bounds": (local_lower, local_upper)}
    return fedhyper(loss_fn, "G+CL", work=EPOCHS, strategy=strategy, hyper_rate=30.0, **pairs, **floats)


def line_search(*, strategy="vectorized", population=POPULATION, local_rate, growth, fallback):
    del population
    rule = armijo(decrease=0.7, shrink=0.5, growth=growth, max_trials=3, fallback=fallback)
    return fedavg(loss_fn, work=EPOCHS, strategy=strategy, local_rate=local_rate, client_rule=rule)


COMPOSITIONS = {
    "G+SL+CL": line("G+SL+CL"),
    "all of fedhyper": Line(
        build=all_of_fedhyper,
        floats={
            "local_rate": VALUES["local_rate"],
            "global_rate": (1.0, 0.9, 1.1),
            "kappa_g": (20.0, 10.0, 5.0),
            "kappa_sl": (0.2, 0.5, 0.1),
            "kappa_cl": (0.3, 0.1, 0.7),
            "global_weight": VALUES["global_weight"],
            "global_gamma": (1.3, 2.0, 1.5),
            "local_gamma": (10.0, 1.1, 1.2),
        },
    ),
    "bounds as pairs": Line(
        build=bounds_as_pairs,
        floats={
            "local_rate": VALUES["local_rate"],
            "lower": (0.96, 0.5, 0.7),
            "upper": (1.1, 2.0, 1.5),
            "local_lower": (0.02, 0.01, 0.025),
            "local_upper": (0.1, 0.2, 0.15),
        },
    ),
    "line search that gives up": Line(
        build=line_search,
        floats={"local_rate": (1.0, 0.7, 1.4), "growth": (1.5, 1.2, 1.1), "fallback": (0.05, 0.1, 0.02)},
    ),
    "fedavg, uniform, equal steps": line("fedavg", work=local_steps(3, batch_size=4), weighting="uniform"),
    "fedprox+G": line("fedprox+G"),
    "scaffold+fedexp": line("scaffold+fedexp", rows=("control_variates",), weighting="uniform"),
    "fedprox+scaffold": line("fedprox+scaffold", rows=("control_variates",)),
    "fednova+G": line("fednova+G", client_optimizer=MOMENTUM),
    "fednova+fedprox": line("fednova+fedprox"),
    "fedadam+G": line("fedadam+G", floats=_SMALL, global_bounds="relative"),
    "fedadam+G, applied": line("fedadam+G", floats=_SMALL, global_bounds="relative", inner_product="applied"),
    "fathom+CL": line("fathom+CL"),
    "feddyn+SL": line("feddyn+SL", rows=("dynamic_regularization",), weighting="uniform"),
    "delta_sgd+fedprox": line("delta_sgd+fedprox"),
    "scaffold+SL, momentum": line("scaffold+SL", rows=("control_variates",), client_optimizer=MOMENTUM),
    "fedcm+fedyogi": line("fedcm+fedyogi", floats=_SMALL),
    "mime_lite+G": line("mime_lite+G"),
    "clipped+median": line("clipped+median"),
    "CL, warm": line("CL", client_rates="warm"),
    "CL, per client": line("CL", floats={"hyper_rate": (0.01, 0.02, 0.005)}, client_rates="per_client", rows=("rate",)),
}
"""Methods joined, and settings that change what is kept or computed."""

LINES = METHOD_LINES | COMPOSITIONS


def test_every_method_and_option_is_in_the_table():
    """A method or an option that nobody entered would be held to nothing."""
    assert set(METHOD_LINES) == set(METHODS)
    taken = {option for name in METHODS for option in method_options(name)}
    assert taken - set(VALUES) - set(STATIC) - CHOICES == set()
    assert (set(VALUES) - {"local_rate"} | set(STATIC) | CHOICES) - taken == set()
    assert {part for name in COMPOSITIONS if "+" in name for part in parse_method(name.split(",")[0])} <= set(METHODS)


# ---------------------------------------------------------------------------------------- what the lines are played on


@functools.cache
def federation(population=POPULATION):
    """Clients of 1 to 9 examples; every example may be poisoned by its factor or offset."""
    sizes = [1, 9, 2, 5, 3, 7, 4, 6][:population]
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, sum(sizes))
    examples = {
        "x": np.float32(rng.normal(size=(sum(sizes), 5)) + np.eye(5)[labels]),
        "y": np.int32(labels),
        "factor": np.ones(sum(sizes), np.float32),
        "offset": np.zeros(sum(sizes), np.float32),
    }
    return pack(examples, np.split(rng.permutation(sum(sizes)), np.cumsum(sizes)[:-1]))


def poisoned(client, **values):
    """The federation with other factors or offsets for one client's examples."""
    data = federation()
    rows = data.order[data.offsets[client] : data.offsets[client + 1]]
    changed = {name: data.examples[name].at[rows].set(value) for name, value in values.items()}
    return dataclasses.replace(data, examples={**data.examples, **changed})


@functools.cache
def sampled_cohorts() -> list[list[int]]:
    """The cohorts that `simulate` draws with the key of `RUN`, round after round."""
    keys = [_random.round_keys(run_key(), jnp.int32(number))[0] for number in range(ROUNDS)]
    return [sample_cohort(key, POPULATION, COHORT).tolist() for key in keys]


@functools.cache
def run_key():
    """The key of every run here."""
    return jax.random.key(0)


@functools.cache
def quick_options() -> dict[str, Any]:
    """What spares XLA most of its work on programs that run for milliseconds; nothing where it knows no such option."""
    options = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 0}
    try:
        jax.jit(jnp.negative, compiler_options=options).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def quick_jit(function):
    """Compiling is nearly all of the time of these tests, and this compiles three times as fast."""
    return jax.jit(function, compiler_options=quick_options())


class Bench:
    """An algorithm of the table, its compiled round and the run that the tests compare with.

    ``round`` counts its own traces: chex starts counting anew in every test, and the program outlives them.
    """

    def __init__(self, line: Line):
        self.line = line
        self.algorithm = line.build(**line.setting(0))
        self.traces = 0
        self._compiled = quick_jit(self._traced)
        self.states, self.infos = self.play(self.algorithm.init(logistic_params()), sampled_cohorts())

    def _traced(self, key, state, cohort):
        self.traces += 1
        return self.algorithm.round(key, state, cohort)

    def round(self, state, ids, data=None):
        """A round of a padded cohort in the one compiled program."""
        ids = jnp.asarray([*ids, *[POPULATION] * (SLOTS - len(ids))], jnp.int32)
        return self._compiled(run_key(), state, Cohort(data=federation() if data is None else data, client_ids=ids))

    def play(self, state, cohorts):
        """States, the first included, and infos of several rounds."""
        states, infos = [state], []
        for ids in cohorts:
            state, info = self.round(state, ids)
            states.append(state)
            infos.append(info)
        return states, infos

    def reached(self, algorithm):
        """The evaluated parameters after a run of `sampled_cohorts` from the init of another algorithm."""
        states, _ = self.play(algorithm.init(logistic_params()), sampled_cohorts())
        return algorithm.evaluated_params(states[-1])


@pytest.fixture(scope="module", autouse=True)
def little_optimization():
    """For the programs that are not compiled by `quick_jit`: those of `sweep`, and single operations."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", params=LINES)
def bench(request):
    """Of the module, so that all tests of a line follow each other and share its compiled round."""
    return Bench(LINES[request.param])


# -------------------------------------------------------------------------------------------------- the algorithms


def test_a_round_keeps_structure_shapes_dtypes_and_weak_types(bench):
    """So that it can be scanned, and so that the second round does not compile anew."""
    assert types_of(bench.states[1]) == types_of(bench.states[0])
    assert types_of(bench.states[-1]) == types_of(bench.states[0])
    assert bench.traces == 1
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


def test_other_values_are_other_data_for_the_same_program(bench):
    """One compiled round, fed states of other settings, computes what their own rounds do, alone and in a sweep.

    The sweep makes each algorithm from traced values, so it cannot share a number that the first one closed over.
    """
    line = bench.line
    makers = (float, np.float64, jnp.float32)
    algorithms = [line.build(**{k: make(v) for k, v in line.setting(i).items()}) for i, make in enumerate(makers)]
    starts = [algorithm.init(logistic_params()) for algorithm in algorithms]
    assert all(types_of(start) == types_of(starts[0]) for start in starts)
    runs = [bench.play(start, sampled_cohorts()) for start in starts]

    first = bench.algorithm.evaluated_params(bench.states[-1])
    for name, values in line.floats.items():
        changed = line.build(**{**line.setting(0), name: values[1]})
        assert differs(bench.reached(changed), first), f"{name} acts nowhere, or is no data"
    assert bench.traces == 1

    params, history = sweep(
        line.build,
        {name: jnp.asarray(values) for name, values in line.floats.items()},
        run_key()[None],
        jax.tree.map(lambda leaf: leaf[None], logistic_params()),
        federation(),
        rounds=ROUNDS,
        cohort_size=COHORT,
    )
    for i, (algorithm, (states, infos)) in enumerate(zip(algorithms, runs, strict=True)):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i, 0], params), algorithm.evaluated_params(states[-1]))
        infos = jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos)
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i, 0], history.info), infos)


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
                assert_identical(leaf[others], before[others])
                same = np.all(np.reshape(leaf == before, (POPULATION, -1)), axis=1)
                assert not np.any(same[np.asarray(ids)])
        state = after


@pytest.mark.parametrize("poison", [{"offset": np.inf}, {"factor": np.nan}], ids=["loss", "gradient"])
def test_a_client_left_out_is_as_if_it_had_not_been_there(bench, poison):
    """Nor is its row written: it is the third of the cohort of four."""
    state = bench.states[0] if bench.line.counts_left_out else bench.states[-1]
    after, info = bench.round(state, [1, 0, 4, 2], poisoned(4, **poison))
    expected, expected_info = bench.round(state, [1, 0, 2])
    assert int(info.left_out) == 1
    for name, rows in after.clients.items():
        assert_identical(*(jax.tree.map(lambda leaf: leaf[4], tree) for tree in (rows, state.clients[name])))
    assert_close(after, expected)
    told = {"left_out": 0, "bytes_down": 0}  # that a client was there, and what it was sent
    assert_close(info._replace(**told), expected_info._replace(**told))


def test_padded_slots_alone_change_nothing_but_the_number_of_the_round(bench):
    """And what a schedule makes of it."""
    state = bench.states[-1]
    after, _ = bench.round(state, [])
    left = {"round": 0, "global_rate": 0, "local_rate": 0}
    assert_identical({**vars(after), **left}, {**vars(state), **left})
    assert int(after.round) == ROUNDS + 1
    for rate in ("global_rate", "local_rate"):
        if not hasattr(getattr(state, rate), "table"):
            assert_identical(getattr(after, rate), getattr(state, rate))


@pytest.mark.parametrize("strategy", ["sequential", "chunked(3)"])
def test_strategies_agree(bench, strategy):
    """With the vectorized one whose cohort is padded, over a run and with a client left out."""
    algorithm = bench.line.build(strategy=strategy, **bench.line.setting(0))
    round_fn, state = quick_jit(algorithm.round), bench.states[0]
    for ids, info in zip(sampled_cohorts(), bench.infos, strict=True):
        state, own_info = round_fn(run_key(), state, Cohort(data=federation(), client_ids=jnp.asarray(ids, jnp.int32)))
        assert_close(own_info, info)
    assert_close(state, bench.states[-1])
    data, ids = poisoned(4, factor=np.nan), [1, 0, 4, 2]
    after = round_fn(run_key(), state, Cohort(data=data, client_ids=jnp.asarray(ids, jnp.int32)))
    assert_close(after, bench.round(state, ids, data))


def debug_round(bench, state, data):
    """The last round of the run, step by step without jit."""
    algorithm = bench.line.build(strategy="debug", **bench.line.setting(0))
    ids = jnp.asarray(sampled_cohorts()[-1], jnp.int32)
    return algorithm, algorithm.round(run_key(), state, Cohort(data=data, client_ids=ids))


def test_debug_agrees(bench):
    """In a round far enough on that every rule and every state plays its part."""
    _, (state, info) = debug_round(bench, bench.states[-2], federation())
    assert_close((state, info), (bench.states[-1], bench.infos[-1]))
    assert types_of(state) == types_of(bench.states[0])


def test_float64_differs_from_float32_by_rounding_only(bench, float64):
    """Parameters, rates and all other floating-point state are float64 throughout."""
    data = dataclasses.replace(federation(), examples=cast(federation().examples, jnp.float64))
    start = cast(bench.states[-2], jnp.float64)
    algorithm, (state, info) = debug_round(bench, start, data)
    assert types_of(start) == types_of(algorithm.init(start.params))
    assert types_of(state) == types_of(start)
    assert {state.global_rate.rate.dtype, info.local_rate.dtype, info.client_rate_max.dtype} == {jnp.dtype("float64")}
    sizes = {"bytes_up": 0, "bytes_down": 0}
    assert_close((state, info._replace(**sizes)), (bench.states[-1], bench.infos[-1]._replace(**sizes)))


@pytest.mark.parametrize("params", ["bfloat16", "mixed"])
def test_small_dtypes_are_kept(bench, params, request):
    """Parameters and state keep their types in a round, and rates are float32."""
    if params == "mixed" and bench.line.not_mixed:
        request.applymarker(pytest.mark.xfail(strict=True, reason=bench.line.not_mixed))
    params = mixed_params() if params == "mixed" else logistic_params(jnp.bfloat16)
    start = jax.eval_shape(bench.algorithm.init, params)
    cohort = Cohort(data=federation(), client_ids=jnp.arange(COHORT, dtype=jnp.int32))
    state, info = jax.eval_shape(bench.algorithm.round, run_key(), start, cohort)
    assert state == start
    assert jax.tree.map(lambda leaf: leaf.dtype, state.params) == jax.tree.map(lambda leaf: leaf.dtype, params)
    rates_seen = (state.global_rate.rate, state.local_rate.rate, info.client_rate_max, info.global_rate)
    assert {rate.dtype for rate in rates_seen} == {jnp.dtype(jnp.float32)}


def test_data_of_another_population_are_refused(bench):
    """Where rows are kept; without them any data will do."""
    cohort = Cohort(data=federation(POPULATION - 1), client_ids=jnp.arange(COHORT, dtype=jnp.int32))
    if bench.line.rows:
        with pytest.raises(ValueError, match=f"keeps {POPULATION} clients, but the data set has {POPULATION - 1}"):
            bench.algorithm.round(run_key(), bench.states[0], cohort)
    else:
        jax.eval_shape(bench.algorithm.round, run_key(), bench.states[0], cohort)


# ----------------------------------------------------------------------------------- the transforms and rules of rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """An optax transform or a rule of a rate.

    Attributes:
      build: ``build(**floats)``.
      floats: three values of each number that is data.
      not_mixed: as in `Line`.
    """

    build: Callable[..., optax.GradientTransformation | RateRule]
    floats: dict[str, tuple[float, float, float]] = dataclasses.field(default_factory=dict)
    not_mixed: str | None = None

    def setting(self, index: int) -> dict[str, float]:
        return {name: values[index] for name, values in self.floats.items()}


_ADAPTIVE = {
    "initial_rate": (0.6, 0.58, 0.64),
    "hyper_rate": (0.4, 0.2, 0.3),
    "lower": (0.55, 0.1, 0.3),
    "upper": (0.7, 1.0, 0.68),
}
_ACCUMULATOR = {"initial_accumulator": (0.0, 0.1, 0.3)}


def with_bounds(factory, **fixed):
    """The factory with its pair of bounds as two numbers."""
    return lambda *, lower, upper, **floats: factory(bounds=(lower, upper), **fixed, **floats)


TRANSFORMS = {
    "scale_by_hypergradient": Part(build=with_bounds(hypergradient.scale_by_hypergradient), floats=_ADAPTIVE),
    "track_hypergradient": Part(build=with_bounds(hypergradient.track_hypergradient), floats=_ADAPTIVE),
    "scale_by_local_hypergradient": Part(
        build=with_bounds(hypergradient.scale_by_local_hypergradient),
        floats=_ADAPTIVE | {"hyper_rate": (0.05, 0.02, 0.03), "global_weight": (0.1, 0.2, 0.05)},
    ),
    "momentum": Part(build=server_optimizers.momentum),
    "adagrad": Part(build=server_optimizers.adagrad, floats=_ACCUMULATOR),
    "adam": Part(build=server_optimizers.adam, floats=_ACCUMULATOR),
    "adam, corrected": Part(build=functools.partial(server_optimizers.adam, bias_correction=True), floats=_ACCUMULATOR),
    "yogi": Part(build=server_optimizers.yogi, floats=_ACCUMULATOR),
    "dog": Part(build=server_optimizers.dog, floats={"initial_distance": (0.1, 0.2, 0.05)}, not_mixed=_DOG),
    "mechanic": Part(build=functools.partial(server_optimizers.mechanic, initial_scale=0.1), not_mixed=_MECHANIZE),
}
"""Every scheduler and server optimizer that is an optax transform."""

RULES = {
    "scheduled": Part(build=rates.scheduled, floats={"schedule": (0.1, 0.2, 0.05)}),
    "scheduled, a table": Part(
        build=lambda *, rate, factor: rates.scheduled(exponential_decay(rate, factor), rounds=8),
        floats={"rate": (0.1, 0.2, 0.05), "factor": (0.9, 0.8, 0.7)},
    ),
    "hypergradient": Part(build=with_bounds(rates.hypergradient), floats=_ADAPTIVE),
    "hypergradient, warm": Part(
        build=with_bounds(rates.hypergradient, warm=True, initial_rate=0.6),
        floats={name: values for name, values in _ADAPTIVE.items() if name != "initial_rate"},
    ),
    "extrapolation": Part(build=rates.extrapolation, floats={"epsilon": (0.01, 1.0, 0.1)}),
    "smoothed_cosine": Part(
        build=with_bounds(rates.smoothed_cosine),
        floats={
            "initial_rate": (0.655, 0.66, 0.64),
            "hyper_rate": (0.4, 0.2, 0.3),
            "lower": (0.652, 0.1, 0.3),
            "upper": (0.7, 1.0, 0.75),
            "smoothing": (0.5, 0.2, 0.8),
        },
    ),
    "reduce_on_plateau": Part(
        build=functools.partial(rates.reduce_on_plateau, factor=0.5, patience=1),
        floats={"initial_rate": (0.1, 0.2, 0.05)},
    ),
}
"""Every rule of a rate."""

PARTS = TRANSFORMS | RULES

STATIC_PARTS = STATIC | {
    "decay": f"{_OPTAX} (sgd)",
    "weight_decay": f"{_OPTAX} (mechanize)",
    "bias_correction": "another formula",
    "factor": f"{_OPTAX} (reduce_on_plateau)",
    "relative_tolerance": f"{_OPTAX} (reduce_on_plateau)",
    "cooldown": f"{_OPTAX} (reduce_on_plateau)",
    "rounds": "the length of a table",
    "warm": "another formula",
    "name": "of messages",
}
"""Arguments of these factories that are no data, and why."""


def test_every_transform_and_rule_and_argument_is_in_the_table():
    """By the public functions of the modules, and by their signatures."""
    servers = {
        name: function
        for name, function in vars(server_optimizers).items()
        if inspect.isfunction(function) and function.__module__ == server_optimizers.__name__ and name[0] != "_"
    }
    transforms = {name: vars(hypergradient)[name] for name in hypergradient.__all__ if "hypergradient" in name}
    rules = {name: vars(rates)[name] for name in rates.__all__ if inspect.isfunction(vars(rates)[name])}
    del rules["as_rate_rule"], rules["check_horizon"]
    for table, factories in ((TRANSFORMS, servers | transforms), (RULES, rules)):
        assert {name.split(",")[0] for name in table} == set(factories)
        for name, factory in factories.items():
            floats = {*table[name].floats, *(["bounds"] if "lower" in table[name].floats else [])}
            assert set(inspect.signature(factory).parameters) - floats <= set(STATIC_PARTS), name


def step(part, carry, number):
    """Of a transform: parameters and state after an update; of a rule: its rate for a round.

    Returns:
      (parameters, state) and what came out: updates and rate (where there is one), or the rate and its report.
    """
    params, state = carry
    wide = jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params)) else jnp.float32

    def series(*values):
        return jnp.asarray(values, wide)[number]

    def draw(leaf):
        draws = 0.3 + jax.random.normal(jax.random.key(1), (ROUNDS, *leaf.shape), jnp.float32)
        return (draws[number] * series(1.0, -1.0, -1.0, -1.0)).astype(leaf.dtype)

    gradient = jax.tree.map(draw, params)
    if isinstance(part, RateRule):
        feedback = Feedback(
            round=number,
            inner_product=series(0.0, 0.3, -0.6, 0.1),
            pseudo_gradient=gradient,
            client_loss=series(1.0, 0.9, 0.95, 0.8),
            mean_squared_norm=series(90.0, 80.0, 70.0, 60.0),
            mean_client_rate=series(0.6, 0.65, 0.55, 0.6),
        )
        state, report = part.update(state, feedback)
        return (params, state), (state.rate, report)
    part = optax.with_extra_args_support(part)
    direction = jax.tree.map(lambda g: (g * series(1.0, 1.0, -1.0, 1.0)).astype(g.dtype), gradient)
    updates, state = part.update(gradient, state, params, global_update=direction, unknown="ignored")
    return (optax.apply_updates(params, updates), state), (updates, getattr(state, "rate", ()))


def play(part, state, params, one_step=None):
    """What came out of four steps, and the last state."""
    carry, outputs = (params, state), []
    for number in range(ROUNDS):
        carry, output = (one_step or functools.partial(step, part))(carry, jnp.int32(number))
        outputs.append(output)
    return outputs, carry[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("name", PARTS)
def test_a_part_keeps_its_types_in_a_scan(name, dtype, request):
    """And updates have the dtypes of the parameters; rates and all other scalars of the state are float32."""
    if dtype == "mixed" and PARTS[name].not_mixed:
        request.applymarker(pytest.mark.xfail(strict=True, reason=PARTS[name].not_mixed))
    params = mixed_params() if dtype == "mixed" else logistic_params(jnp.dtype(dtype))
    part = PARTS[name].build(**PARTS[name].setting(0))
    start = (params, part.init(params))
    one_step = functools.partial(step, part)
    end, output = jax.eval_shape(one_step, start, jnp.int32(0))
    assert end == types_of(start)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((end, output)))
    assert jax.eval_shape(lambda start: jax.lax.scan(one_step, start, jnp.arange(ROUNDS))[0], start) == end
    if name in TRANSFORMS:
        assert jax.tree.map(lambda leaf: leaf.dtype, output[0]) == jax.tree.map(lambda leaf: leaf.dtype, params)
    if hasattr(end[1], "rate"):
        assert end[1].rate.dtype == jnp.float32


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if part.floats])
def test_other_values_are_other_data_for_the_same_update(name):
    """One jitted step, fed states of other settings, computes what their own does; and so does one under vmap."""
    line, params = PARTS[name], logistic_params()
    parts = [line.build(**line.setting(i)) for i in range(3)]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def one_step(carry, number):
        return step(parts[0], carry, number)

    runs = [play(parts[0], part.init(params), params, one_step)[0] for part in parts]
    for part, run in zip(parts, runs, strict=True):
        assert_close(run, play(part, part.init(params), params)[0])
    for argument, values in line.floats.items():
        changed = line.build(**{**line.setting(0), argument: values[1]})
        run, _ = play(parts[0], changed.init(params), params, one_step)
        assert differs(run, runs[0]), f"{argument} acts nowhere, or is no data"

    def one(setting):
        part = line.build(**setting)
        return play(part, part.init(params), params)[0]

    together = jax.vmap(one)({argument: jnp.asarray(values) for argument, values in line.floats.items()})
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *runs))


@pytest.mark.parametrize("name", PARTS)
def test_a_part_in_float64_differs_from_float32_by_rounding_only(name, float64):
    """Its state and updates are float64 throughout."""
    part, params = PARTS[name].build(**PARTS[name].setting(0)), logistic_params(jnp.float32)
    expected, state = play(part, part.init(params), params)
    wide = part.init(cast(params, jnp.float64))
    assert types_of(wide) == types_of(cast(state, jnp.float64))
    outputs, end = play(part, wide, cast(params, jnp.float64))
    assert types_of(end) == types_of(wide)
    assert types_of(outputs) == types_of(cast(expected, jnp.float64))
    assert_close((outputs, end), (expected, state))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_extra_arguments_of_a_transform(name):
    """Unknown ones change nothing, alone and in a chain; the local scheduler must be told the global update."""
    transform = optax.with_extra_args_support(TRANSFORMS[name].build(**TRANSFORMS[name].setting(0)))
    params = logistic_params()
    required = {"global_update": params} if name == "scale_by_local_hypergradient" else {}
    state = transform.init(params)
    expected = transform.update(params, state, params, **required)
    assert_identical(transform.update(params, state, params, unknown="ignored", value=1.0, **required), expected)
    chain = optax.chain(optax.identity(), transform)
    updates, _ = chain.update(params, chain.init(params), params, unknown="ignored", **required)
    assert_identical(updates, expected[0])
    if required:
        with pytest.raises(TypeError, match="global_update"):
            transform.update(params, state, params)
