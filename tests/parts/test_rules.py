"""Contracts of the optax transforms and of the rules of rates: each enters by a line, and is held to all."""

import dataclasses
import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedhyper_jax import exponential_decay, hypergradient, rates, server_optimizers
from fedhyper_jax.parts import ClientResult, Feedback, RateRule, Spread
from fedhyper_jax.parts.client_rules import CountedDescentState
from tests.algorithms import DOG, MECHANIZE, OPTAX, ROUNDS, STATIC
from tests.compare import assert_close, assert_identical, cast, differs, same_program, types_of
from tests.helpers import cases, logistic_params, mixed_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """An optax transform or a rule of a rate.

    Attributes:
      build: ``build(**floats)``.
      floats: three values of each number that is data.
      not_mixed: as in `Entry`.
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


_SCALE_FREE = {"normalise": "cosine", "update": "exponential"}
_BOUNDED = {
    "initial_rate": (0.6, 0.605, 0.64),
    "hyper_rate": (30.0, 0.1, 1.0),
    "lower": (0.595, 0.1, 0.3),
    "upper": (0.61, 1.0, 0.68),
    "max_change": (0.03, 0.01, 0.02),
}

TRANSFORMS = {
    "scale_by_hypergradient": Part(build=with_bounds(hypergradient.scale_by_hypergradient), floats=_ADAPTIVE),
    "track_hypergradient": Part(build=with_bounds(hypergradient.track_hypergradient), floats=_ADAPTIVE),
    "scale_by_local_hypergradient": Part(
        build=with_bounds(hypergradient.scale_by_local_hypergradient),
        floats=_ADAPTIVE | {"hyper_rate": (0.05, 0.02, 0.03), "global_weight": (0.1, 0.2, 0.05)},
    ),
    "track_hypergradient, scale-free": Part(
        build=with_bounds(hypergradient.track_hypergradient, **_SCALE_FREE), floats=_BOUNDED
    ),
    "scale_by_local_hypergradient, scale-free": Part(
        build=with_bounds(hypergradient.scale_by_local_hypergradient, **_SCALE_FREE),
        floats=_BOUNDED | {"global_weight": (0.1, 0.0, 0.05)},
    ),
    "momentum": Part(build=server_optimizers.momentum),
    "adagrad": Part(build=server_optimizers.adagrad, floats=_ACCUMULATOR),
    "adam": Part(build=server_optimizers.adam, floats=_ACCUMULATOR),
    "adam, corrected": Part(build=functools.partial(server_optimizers.adam, bias_correction=True), floats=_ACCUMULATOR),
    "yogi": Part(build=server_optimizers.yogi, floats=_ACCUMULATOR),
    "dog": Part(build=server_optimizers.dog, floats={"initial_distance": (0.1, 0.2, 0.05)}, not_mixed=DOG),
    "mechanic": Part(build=functools.partial(server_optimizers.mechanic, initial_scale=0.1), not_mixed=MECHANIZE),
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
    "hypergradient, debiased": Part(
        build=with_bounds(rates.hypergradient, normalise="debiased", update="exponential"), floats=_BOUNDED
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
    "retained_gain": Part(
        build=functools.partial(rates.retained_gain, start="given"),
        floats={
            "initial_rate": (0.1, 0.2, 0.05),
            "target_share": (0.35, 0.5, 0.3),
            "coherence_power": (0.2, 0.4, 0.1),
            "coherence_limit": (1.5, 1.2, 1.8),
            "hyper_rate": (0.5, 1.0, 0.3),
            "memory": (0.2, 0.8, 0.5),
            "growth": (1.08, 1.2, 1.1),
            "smallest_gain": (0.05, 2.0, 0.1),
            "ceiling_growth": (1.03, 1.01, 1.05),
        },
    ),
    "retained_gain, tolerant": Part(
        build=functools.partial(rates.retained_gain, 0.1, start="given", smallest_gain=0.8),
        floats={"tolerance": (0.0, 0.4, 0.8)},
    ),
    "retained_gain, measured": Part(
        build=functools.partial(rates.retained_gain, 0.1), floats={"first_step": (0.25, 0.2, 0.3)}
    ),
    "reduce_on_plateau": Part(
        build=functools.partial(rates.reduce_on_plateau, factor=0.5, patience=1),
        floats={"initial_rate": (0.1, 0.2, 0.05)},
    ),
}
"""Every rule of a rate."""

PARTS = TRANSFORMS | RULES

STATIC_PARTS = STATIC | {
    "decay": f"{OPTAX} (sgd)",
    "weight_decay": f"{OPTAX} (mechanize)",
    "bias_correction": "another formula",
    "factor": f"{OPTAX} (reduce_on_plateau)",
    "relative_tolerance": f"{OPTAX} (reduce_on_plateau)",
    "cooldown": f"{OPTAX} (reduce_on_plateau)",
    "rounds": "the length of a table",
    "warm": "another formula",
    "name": "of messages",
    "normalise": "another formula",
    "update": "another formula",
    "max_change": "None is another formula; a number is data",
    "start": "where the rate begins",
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
            floats = {option for line in table if line.split(",")[0] == name for option in table[line].floats}
            floats |= {"bounds"} if "lower" in floats else set()
            assert set(inspect.signature(factory).parameters) - floats <= set(STATIC_PARTS), name


@functools.cache
def draws(shape):
    """Of each step; drawn once, for threefry is more to compile than most rules."""
    with jax.enable_x64(False), jax.ensure_compile_time_eval():
        return np.asarray(0.3 + jax.random.normal(jax.random.key(1), (ROUNDS, *shape), jnp.float32))


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
        return (jnp.asarray(draws(leaf.shape))[number] * series(1.0, -1.0, -1.0, -1.0)).astype(leaf.dtype)

    gradient = jax.tree.map(draw, params)
    if isinstance(part, RateRule):
        result = ClientResult(
            update=jax.tree.map(lambda g: 2 * g, gradient),
            displacement=jax.tree.map(lambda w: (series(0.9, 1.1, 1.3, 1.5) * w).astype(w.dtype), params),
            rate=series(0.6, 0.65, 0.55, 0.6),
            rate_state=CountedDescentState(series(0.6, 0.65, 0.55, 0.6), series(0.1, 0.1, 0.2, 0.1)),
            loss=series(1.0, 0.9, 0.95, 0.8),
            examples=jnp.int32(1),
            num_steps=jnp.int32(1),
            batch_loss=lambda k, params: optax.tree.norm(params, squared=True).astype(wide) / 2,
        )
        feedback = Feedback(
            round=number,
            inner_product=series(0.0, 0.3, -0.6, 0.1),
            pseudo_gradient=gradient,
            client_loss=series(1.0, 0.9, 0.95, 0.8),
            reported=part.report(state, params, result),
            previous=params,
            reference=params,
            failed=series(0.0, 0.6, 0.0, 0.0),
            spread=Spread(squared_norm=series(0.1, 0.2, 0.3, 0.4), squared_weight=series(0.2, 0.3, 0.2, 0.3)),
        )
        state, report = part.update(state, feedback)
        return (params, state), (state.rate, report)
    part = optax.with_extra_args_support(part)
    direction = jax.tree.map(lambda g: (g * series(1.0, 1.0, -1.0, 1.0)).astype(g.dtype), gradient)
    updates, state = part.update(gradient, state, params, global_update=direction, unknown="ignored")
    return (optax.apply_updates(params, updates), state), (updates, getattr(state, "rate", ()))


def play(part, state, params, one_step=None):
    """The outputs of four steps, and the last state."""
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
    start = jax.eval_shape(lambda params: (params, part.init(params)), params)
    end, output = jax.eval_shape(functools.partial(step, part), start, jnp.int32(0))
    assert end == start and jax.tree.structure(end) == jax.tree.structure(start)  # what a scan asks for
    assert not any(leaf.weak_type for leaf in jax.tree.leaves((end, output)))
    if name in TRANSFORMS:
        assert jax.tree.map(lambda leaf: leaf.dtype, output[0]) == jax.tree.map(lambda leaf: leaf.dtype, params)
    if hasattr(end[1], "rate"):
        assert end[1].rate.dtype == jnp.float32


@pytest.mark.parametrize("name", [name for name, part in PARTS.items() if part.floats])
def test_other_values_are_other_data_for_the_same_update(name):
    """Steps of all settings are one program, in which every option acts."""
    line, params = PARTS[name], logistic_params()
    parts = [line.build(**line.setting(i)) for i in range(3)]
    lowered = [
        jax.jit(functools.partial(step, part)).lower((params, part.init(params)), jnp.int32(0)) for part in parts
    ]
    texts = [one.as_text() for one in lowered]
    assert all(same_program(text, texts[0]) for text in texts)

    one_step = lowered[0].compile()
    first, _ = play(parts[0], parts[0].init(params), params, one_step)
    for argument, values in line.floats.items():
        changed = line.build(**{**line.setting(0), argument: values[1]})
        run, _ = play(parts[0], changed.init(params), params, one_step)
        assert differs(run, first), f"{argument} acts nowhere, or is no data"


SWEPT = ("track_hypergradient", "adagrad", "hypergradient", "scheduled, a table")


# The contracts of methods trace the values of all of these.
@pytest.mark.parametrize("name", cases([name for name in PARTS if PARTS[name].floats], later=set(PARTS) - set(SWEPT)))
def test_parts_made_while_tracing_are_those_made_before(name):
    line, params = PARTS[name], logistic_params()
    parts = [line.build(**line.setting(i)) for i in range(3)]
    one_step = jax.jit(functools.partial(step, parts[0]))
    runs = [play(parts[0], part.init(params), params, one_step)[0] for part in parts]

    def one(setting):
        part = line.build(**setting)
        return jax.lax.scan(functools.partial(step, part), (params, part.init(params)), jnp.arange(ROUNDS))[1]

    together = jax.jit(jax.vmap(one))({argument: jnp.asarray(values) for argument, values in line.floats.items()})
    alone = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(stacked(run) for run in runs))
    assert_close(together, alone)


def stacked(run):
    """The outputs of several steps, as a scan gives it."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *run)


@pytest.mark.product  # methods are compared with float64 transcriptions, and keep their types
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
    required = {"global_update": params} if "local" in name else {}

    def program(transform, **extra):
        def update(params):
            return transform.update(params, transform.init(params), params, **required, **extra)

        return str(jax.make_jaxpr(update)(params))

    expected = program(transform)
    assert program(transform, unknown="ignored", value=1.0) == expected
    assert program(optax.chain(optax.identity(), transform), unknown="ignored") == expected
    if required:
        with pytest.raises(TypeError, match="global_update"):
            transform.update(params, jax.eval_shape(transform.init, params), params)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_a_group_of_parameters(name):
    """In optax.partition a group is stepped as it would be alone, the rest not at all, and a group may be empty."""
    part, params = TRANSFORMS[name].build(**TRANSFORMS[name].setting(0)), logistic_params()
    labels = {leaf: "own" if leaf == min(params) else "rest" for leaf in params}
    groups = optax.partition({"own": part, "rest": optax.set_to_zero(), "empty": part}, labels)
    own = {min(params): params[min(params)]}
    together, alone = groups.init(params), part.init(own)
    alone_update = optax.with_extra_args_support(part).update
    for _ in range(2):
        updates, together = groups.update(params, together, params, gradient=params, global_update=params)
        expected, alone = alone_update(own, alone, own, global_update=own)
    assert_identical({min(params): updates[min(params)]}, expected)
    assert not any(np.any(updates[leaf]) for leaf in params if labels[leaf] == "rest")
