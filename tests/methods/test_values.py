"""Methods as values: by value, by name and in short they are one thing; they add up, or say why not."""

import functools
import inspect
import pydoc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedhyper_jax as fh
from fedhyper_jax import rates, terms
from fedhyper_jax.data import Cohort, local_steps, pack
from fedhyper_jax.methods import METHODS, Method, method_by_name, method_options
from fedhyper_jax.parts import aggregators, client_rules, guards
from tests.helpers import cases

WORK = local_steps(2, batch_size=2)
SETTINGS = {"work": WORK, "local_rate": 0.1}
POPULATION = 3


def loss_fn(w, batch):
    return 0.5 * ((w - batch["x"]) ** 2).sum(axis=1)


def program(algorithm):
    """The text of a round, and the state before the first: no compilation."""
    data = pack({"x": np.arange(6.0, dtype=np.float32)[:, None]}, np.split(np.arange(6), [1, 3]))
    state = algorithm.init(jnp.ones(1))
    cohort = Cohort(data=data, client_ids=jnp.arange(POPULATION))
    return jax.jit(algorithm.round).lower(jax.random.key(0), state, cohort).as_text(), state


def assert_same(one, *others):
    text, state = program(one)
    for other in others:
        other_text, other_state = program(other)
        assert text == other_text
        jax.tree.map(np.testing.assert_array_equal, state, other_state)


OPTIONS = {"hyper_rate": 0.3, "proximal_weight": 0.5, "clip_norm": 0.7, "momentum": 0.4, "epsilon": 0.2}


def given(name):
    """The options of a method that are not at their defaults here."""
    return {option: value for option, value in OPTIONS.items() if option in METHODS[name].options}


@pytest.mark.parametrize("name", METHODS)
def test_by_value_and_by_name_are_the_same(name):
    assert getattr(fh, name)(**given(name)) == method_by_name(name, **given(name))


# One decorator makes all of them: one tells for the others. (Schedulers and default rates have tests of their own.)
@pytest.mark.parametrize("name", cases(METHODS, later=set(METHODS) - {"scaffold"}))
def test_rounds_by_value_by_name_and_in_short_are_the_same(name):
    options, settings = given(name), {**SETTINGS, "population": POPULATION}
    in_short, by_name = (
        getattr(fh, name)(loss_fn, **options, **settings),
        fh.make_method(name, loss_fn, **options, **settings),
    )
    assert_same(getattr(fh, name)(**options)(loss_fn, **settings), in_short, by_name)


def test_sums_are_the_same_by_value_and_by_name():
    value = fh.scaffold(population=POPULATION) + fh.fedexp(epsilon=0.01)
    assert value == method_by_name("scaffold+fedexp", population=POPULATION, epsilon=0.01)
    assert value.name == "scaffold+fedexp" and value != fh.scaffold + fh.fedexp
    by_hand = fh.scaffold(
        loss_fn,
        population=POPULATION,
        global_rate=rates.extrapolation(0.01),
        evaluate_at="mean_of_last_two",
        **SETTINGS,
    )
    by_name = fh.make_method("scaffold+fedexp", loss_fn, population=POPULATION, epsilon=0.01, **SETTINGS)
    assert_same(value(loss_fn, **SETTINGS), by_hand, by_name)


def test_addition_is_associative_and_order_is_kept():
    a, b, c = fh.fedprox(proximal_weight=0.3), fh.G(hyper_rate=0.2), fh.SL
    assert (a + b) + c == a + (b + c)
    assert (b + a).name == "G+fedprox"
    assert_same(((a + b) + c)(loss_fn, **SETTINGS), (c + b + a)(loss_fn, **SETTINGS))  # here the order does not matter


def test_each_scheduler_may_have_options_of_its_own():
    value = fh.G(hyper_rate=0.4) + fh.SL(hyper_rate=0.01) + fh.CL(hyper_rate=0.1)
    named = method_by_name("G+SL+CL", hyper_rate={"G": 0.4, "SL": 0.01, "CL": 0.1})
    assert value == named
    assert value.options["hyper_rate"] == {"G": 0.4, "SL": 0.01, "CL": 0.1}
    assert_same(
        value(loss_fn, **SETTINGS),
        fh.fedhyper(loss_fn, "G+SL+CL", hyper_rate={"G": 0.4, "SL": 0.01, "CL": 0.1}, **SETTINGS),
    )
    assert method_by_name("G+SL", hyper_rate={"SL": 0.1}) == fh.G() + fh.SL(hyper_rate=0.1)


@pytest.mark.parametrize("name", ["fedprox", "G+SL+CL", "fedadam+G", "scaffold+fedexp", "clipped+median"])
def test_the_options_of_a_value_make_it_again(name):
    value = method_by_name(name)
    if "+" in name:
        value = value(**{option: 0.3 for option in value.options if option in ("epsilon", "clip_norm", "hyper_rate")})
    assert method_by_name(value.name, **value.options) == value
    namespace = dict(vars(fh))
    assert eval(repr(value), namespace) == value


def test_values_are_refined_and_compared_by_all_their_options():
    assert fh.fedprox == fh.fedprox() == fh.fedprox(proximal_weight=0.1)
    assert fh.fedadam(b1=0.5)(b2=0.5) == fh.fedadam(b1=0.5, b2=0.5) != fh.fedadam
    assert {fh.fedprox(), fh.fedprox(proximal_weight=0.1)} == {fh.fedprox}
    assert fh.fedprox != "fedprox"
    weight = jax.jit(lambda x: x * fh.fedprox(proximal_weight=x).options["proximal_weight"])  # numbers may be traced
    assert weight(2.0) == 4


def test_bounds_follow_from_where_the_rate_starts():
    def bounds(value, **settings):
        return np.asarray(value(loss_fn, **{**SETTINGS, **settings}).init(jnp.ones(1)).global_rate[2:4])

    np.testing.assert_allclose(bounds(fh.G), (1 / 3, 3), rtol=1e-6)
    np.testing.assert_allclose(bounds(fh.fedadam + fh.G), (0.1 / 3, 0.3), rtol=1e-6)
    np.testing.assert_allclose(bounds(fh.G(global_gamma=2.0) + fh.fedadam, global_rate=0.5), (0.25, 1.0), rtol=1e-6)
    with pytest.raises(ValueError, match="outside the absolute bounds"):
        bounds(fh.fedadam + fh.G(global_bounds="absolute"))


def test_default_starts_of_the_rates_are_the_methods_own():
    for value, local_rate in ((fh.delta_sgd, 0.2), (fh.fedsps, 1.0), (fh.fedprox + fh.fedsls, 1.0)):
        assert value(loss_fn, work=WORK).init(jnp.ones(1)).local_rate.rate == jnp.float32(local_rate)
    for value in (fh.fedadam, fh.fedprox + fh.fedyogi, fh.fedavg + fh.fedadagrad):
        assert value(loss_fn, **SETTINGS).init(jnp.ones(1)).global_rate.rate == jnp.float32(0.1)


def test_clipping_stands_around_other_aggregations():
    """In whatever order they are named; and around the mean, or an aggregator that is given."""
    clipped, mean, median = fh.clipped(clip_norm=0.5), aggregators.mean(), aggregators.median()
    expected = fh.fedavg(loss_fn, aggregator=aggregators.clipped(median, 0.5), **SETTINGS)
    given = clipped(loss_fn, aggregator=median, **SETTINGS)
    assert_same(expected, (clipped + fh.median)(loss_fn, **SETTINGS), (fh.median + clipped)(loss_fn, **SETTINGS), given)
    around_the_mean = fh.fedavg(loss_fn, aggregator=aggregators.clipped(mean, 0.5), **SETTINGS)
    assert_same(around_the_mean, clipped(loss_fn, **SETTINGS))


# --------------------------------------------------------------------------------------------------- what is refused

TWO_RULES = "two rules for one thing cannot both act; leave one out"


@pytest.mark.parametrize("aggregation", ["median", "clipped", "clipped+median"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fedexp", "FedExP extrapolates a mean of client updates"),
        ("fednova", "FedNova"),
        ("feddyn", "FedDyn"),
        ("scaffold+fedexp", "FedExP extrapolates a mean of client updates"),
    ],
)
def test_what_presumes_a_mean_of_updates_refuses_another_aggregation(name, reason, aggregation):
    because = "the mean of clipped updates is no mean" if aggregation == "clipped" else "the median of client updates"
    settings = {**SETTINGS, "population": POPULATION}
    with pytest.raises(ValueError, match=f"{reason}.*, but {because}.*; use one of the two"):
        fh.make_method(f"{name}+{aggregation}", loss_fn, **settings)
    with pytest.raises(ValueError, match=f"{reason}.*, but {because}"):
        (method_by_name(aggregation) + method_by_name(name))(loss_fn, **settings)


def refusing(value, **settings):
    return functools.partial(value, loss_fn, **{**SETTINGS, **settings})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        # what is given counts as one more method
        (refusing(fh.delta_sgd, client_rule=client_rules.armijo()), f"argument client_rule both set.*{TWO_RULES}"),
        (refusing(fh.fedadam, server_optimizer=optax.sgd(1.0)), f"argument server_optimizer both set.*{TWO_RULES}"),
        (refusing(fh.median, aggregator=aggregators.median()), f"median and the argument aggregator.*{TWO_RULES}"),
        (refusing(fh.SL, local_rate=rates.scheduled(0.1)), "local_rate is a rule, but SL moves it already"),
        (refusing(fh.decay_global, global_rate=lambda t: 0.5), "global_rate is a schedule, but decay_global moves it"),
        (refusing(fh.CL(client_rates="warm"), local_rate=lambda t: 0.1), "needs a number as local_rate"),
        (refusing(fh.CL(client_rates="warm") + fh.fathom), "needs a number as local_rate.*or fathom out"),
        (refusing(fh.CL(client_rates="per_client", population=3) + fh.SL), "with SL: two rules for one rate"),
        (refusing(fh.CL(client_rates="per_client", population=3), local_rate=lambda t: 0.1), "with a schedule"),
        (refusing(fh.fedexp, global_rate=1.0), "takes no global_rate: FedExP computes"),
        (refusing(fh.fedadam + fh.server_dog), f"both set the server optimizer, and {TWO_RULES}"),
        (refusing(fh.reference_G + fh.median), "fixes both rates and the server's step.*leave median out"),
        (refusing(fh.reference_G, aggregator=aggregators.median()), "leave aggregator out"),
        (refusing(fh.reference_CL, client_rule=client_rules.armijo()), "leave client_rule out"),
        # options that contradict each other
        (refusing(fh.SL(local_bounds=(0.01, 5.0)) + fh.CL()), r"the server may move.* 5.0, outside CL's local_bounds"),
        (
            refusing(fh.G(inner_product="applied") + fh.SL(inner_product="pseudo_gradient")),
            "'applied' for G, 'pseudo_gradient' for SL, but the rules of both rates are fed the same one",
        ),
        (lambda: fh.CL(population=3), "belongs to client_rates='per_client'; leave it out"),
        # names
        (lambda: fh.G + fh.fedprox + fh.G, "'G.fedprox.G' names one twice"),
        (lambda: method_by_name("fedprox", momentum=0.9), "takes no momentum; it takes proximal_weight, and with a"),
        (lambda: method_by_name("fedprox+H"), "unknown method 'H'; known: fedavg, G, SL, CL"),
        (lambda: method_by_name("G+SL", hyper_rate={"CL": 0.1}), "unknown method in hyper_rate 'CL'; known: G, SL"),
        # values, where they are written
        (lambda: fh.fedprox(proximal_weight=-1.0), "proximal_weight must be finite and ≥ 0, got -1.0"),
        (lambda: fh.clipped(clip_norm=0.0), "clip_norm must be finite and > 0"),
    ],
)
def test_what_cannot_act_together_is_refused_with_the_reason(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: fh.fedprox(local_rate=0.1), r"a setting; give it with a loss: fedprox\(\)\(loss_fn, local_rate=…\)"),
        (lambda: fh.fedprox(0.01), "loss_fn must be a function, got 0.01; options go by name"),
        (lambda: fh.fedavg(loss_fn, local_rate=0.1), "fedavg is given no work"),
        (lambda: fh.fedavg(loss_fn, work=WORK), "fedavg is given no local_rate"),
        (lambda: fh.fedavg + 1, "unsupported operand"),
    ],
)
def test_values_say_how_they_are_used(make, reason):
    with pytest.raises(TypeError, match=reason):
        make()


def test_inner_product_of_one_scheduler_is_that_of_both():
    value = fh.G(inner_product="applied") + fh.SL()
    assert_same(value(loss_fn, **SETTINGS), fh.make_method("G+SL", loss_fn, inner_product="applied", **SETTINGS))


# ---------------------------------------------------------------------------------------------- one function a method


def test_settings_reach_the_algorithm():
    algorithm = fh.fedprox(loss_fn, terms=[terms.client_momentum(0.5)], guard=guards.rollback(3.0), **SETTINGS)
    state = algorithm.init(jnp.ones(1))
    assert set(state.terms) == {"proximal", "client_momentum"} and state.guard.factor == 3


def test_signatures_and_help_show_the_true_options():
    shown = str(inspect.signature(fh.fedprox))
    assert shown.startswith("(loss_fn=None, *, proximal_weight=0.1, work=None, local_rate=None, global_rate=1.0")
    assert "global_rate=0.1" in str(inspect.signature(fh.fedadam)) and "local_rate=0.2" in str(
        inspect.signature(fh.delta_sgd)
    )
    assert "global_rate" not in inspect.signature(fh.fedexp).parameters
    text = pydoc.plain(pydoc.render_doc(fh.fedprox))
    assert "fedprox(loss_fn=None, *, proximal_weight=0.1" in text and "FedProx: clients descend" in text


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_documented_function_under_its_name(name):
    method = METHODS[name]
    assert getattr(fh, name) is getattr(fh.methods, name) is method and name in fh.__all__
    assert isinstance(method, Method) and method.name == name
    assert method.__doc__ == method.__wrapped__.__doc__ and method.equation and method.source
    options = {option: p.default for option, p in inspect.signature(method.__wrapped__).parameters.items()}
    assert {o: v for o, v in options.items() if o != "population"} == method.options
    shown = method_options(name)
    assert list(shown) == [*([] if method.own_global_rate else ["global_rate"]), *method.options]
