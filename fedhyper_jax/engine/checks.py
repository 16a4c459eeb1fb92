"""Refusals of an algorithm: parts without a meaning together, impossible parameters, foreign states."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from fedhyper_jax import _validate
from fedhyper_jax.base import RATE_ROWS, FederatedAlgorithm, LossFunction, Params, PyTree, ServerState
from fedhyper_jax.data import ClientData, FederatedData
from fedhyper_jax.parts import LocalTerm, Parts, probes


def _check_terms(terms: tuple[LocalTerm, ...]) -> None:
    """Raises ValueError for terms that cannot stand side by side."""
    for term in terms:
        if not isinstance(term, LocalTerm):
            raise ValueError(f"terms must be LocalTerm, as made by terms.proximal(0.1), got {term!r}")
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"terms has {name!r} twice; give it once, with the weight you want")
    defining = [term for term in terms if term.defines_step]
    if len(defining) > 1:
        reasons = "; ".join(term.defines_step for term in defining)
        names = f"{defining[0].name} and {defining[1].name}"
        raise ValueError(f"{names} each define the server's step: {reasons}; use one")


def check_parts(parts: Parts) -> None:
    """Raises ValueError, with the reason, for parts that have no meaning together."""
    _check_terms(parts.terms)
    _check_steps(parts)
    _check_mean(parts)
    if parts.needs_spread and parts.inner_product == "applied":
        raise ValueError(
            "normalise='debiased' estimates the squared length of the mean update, and inner_product='applied' takes "
            "products with another direction; use normalise='squared_norm', or inner_product='pseudo_gradient'"
        )
    for term in parts.terms:
        if term.uniform_only and parts.weighting != "uniform":
            raise ValueError(f"{term.uniform_only}; use weighting='uniform'")
    if parts.client_rates_of is not None:
        _validate.positive_integer(population=parts.client_rates_of)
        if not parts.client_rule.moves or not parts.local_rate.by_round:
            raise ValueError(
                "per-client rates need a client rule that moves them (CL) and no rule of the server that does (SL)"
            )


def _check_steps(parts: Parts, params: Params | None = None) -> None:
    """Raises ValueError where rules and terms need other steps than the clients take.

    Without parameters it lets pass what optimizers that tell parameters apart may do.
    """
    optimizer, rule = parts.client_optimizer, parts.client_rule
    plain = probes.is_plain_sgd(optimizer, params)
    if rule.plain_sgd_only and not plain:
        raise ValueError(f"{rule.plain_sgd_only}: leave client_optimizer out")
    turning = next((term for term in parts.terms if term.direction is not None), None)
    if rule.plain_sgd_only and turning:
        raise ValueError(f"{rule.plain_sgd_only}, but {turning.name} changes the direction; use one of the two")
    for reason in [rate.along_gradient for rate in (parts.global_rate, parts.local_rate) if rate.along_gradient]:
        other = turning.name if turning else probes.why_no_weight(optimizer, params) and "client_optimizer"
        if other:
            raise ValueError(f"{reason}, but {other} takes others")
    for term in parts.terms:
        if rule.bounded_below_only and term.unbounded_below:
            raise ValueError(
                f"{rule.bounded_below_only}, but {term.name} adds a linear term, which has none; "
                "use another rule of the local rate, e.g. delta_sgd"
            )
        if term.needs_plain_sgd and not plain:
            raise ValueError(f"{term.needs_plain_sgd}; leave client_optimizer out")
        if term.needs_displacement and turning:
            raise ValueError(f"{term.needs_displacement}, but {turning.name} changes the direction; use one of the two")
        if term.needs_displacement and (reason := probes.why_no_weight(optimizer, params)):
            raise ValueError(f"{term.needs_displacement}, {reason}")


def check_optimizers(parts: Parts, params: Params) -> None:
    """Raises ValueError for optimizers whose masks or labels have no meaning for these parameters."""
    for name in ("server_optimizer", "client_optimizer"):
        optimizer = getattr(parts, name)
        try:
            tells_apart = probes.tells_apart(optimizer, params)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{name} does not take these parameters ({reason}); masks and labels must have their structure, "
                f"{jax.tree.structure(params)}"
            ) from error
        if not tells_apart:
            continue
        leaf = probes.climbing_leaf(optimizer, params)
        if leaf is not None:
            raise ValueError(f"{name} {probes.climbs(leaf)}")
        if name == "client_optimizer":
            _check_steps(parts, params)


def _check_mean(parts: Parts) -> None:
    """Raises ValueError where one part presumes a weighted mean of client updates and another makes it none."""
    rules = (parts.global_rate, parts.local_rate)
    presuming = [rule.mean_only for rule in rules if rule.mean_only]
    for reason in [term.offsets_mean for term in parts.terms if term.offsets_mean]:
        if presuming:
            raise ValueError(f"{presuming[0]}, but {reason}; use one of the two")
    presuming += [term.defines_step for term in parts.terms if term.defines_step]
    if parts.aggregator.not_a_mean and presuming:
        raise ValueError(f"{presuming[0]}, but {parts.aggregator.not_a_mean}; use one of the two")


def populations_of(parts: Parts) -> dict[str, int]:
    """Number of rows that the parts keep, by name."""
    populations = {term.name: term.population for term in parts.terms if term.population is not None}
    return populations if parts.client_rates_of is None else {**populations, RATE_ROWS: parts.client_rates_of}


def check_populations(populations: dict[str, int], population: int) -> None:
    """Raises ValueError where rows and data are of different populations."""
    for name, rows in populations.items():
        if rows != population:
            raise ValueError(
                f"{name} keeps {rows} clients, but the data set has {population}; "
                f"make the algorithm with population={population}"
            )


def as_optimizer(optimizer: Any, *, name: str) -> optax.GradientTransformationExtraArgs:
    """An optax optimizer, or anything with init and update (``optax.MultiSteps``), accepting extra arguments."""
    optimizer = optax.sgd(1.0) if optimizer is None else optimizer
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"{name} must be an optax optimizer, got {optimizer!r}; call its factory, e.g. optax.sgd(1.0)")
    return optax.with_extra_args_support(optimizer)


def as_parameters(params: Params) -> Params:
    """Parameters as arrays whose types are those that a round returns, so that the first round is no special case."""

    def as_leaf(path, leaf):
        dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))
        where = f"params{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{where} must be floating-point, got dtype {dtype}; keep what is not trained in the model"
            )
        if not _validate.is_traced(leaf):
            _validate.fits(leaf, name=where)
        # (NumPy has nothing to compile)
        if not _validate.is_traced(leaf) and not np.isfinite(np.asarray(leaf, dtype)).all():
            raise ValueError(f"{where} has NaN or infinite entries; start from finite parameters")
        return jax.lax.convert_element_type(leaf, dtype)  # strips weak types

    if not jax.tree.leaves(params):
        raise ValueError(f"params has no arrays, got {params!r}; give what model.init returned")
    return jax.tree_util.tree_map_with_path(as_leaf, params)


def check_run_arguments(algorithm: FederatedAlgorithm, key: Array, state: ServerState, data: ClientData) -> None:
    """Raises TypeError for arguments of a run that are something else, or in another order."""
    if not isinstance(algorithm, FederatedAlgorithm):
        raise TypeError(
            f"algorithm must be a FederatedAlgorithm, got {_told(algorithm)}; a method makes one of a loss: "
            "fh.fedavg(loss_fn, work=…, local_rate=…)"
        )
    check_key(key)
    check_is_state(state)
    if not (hasattr(data, "population") and hasattr(data, "client")):
        raise TypeError(f"data must be a federated data set, as data.pack(…) makes one, got {_told(data)}")


def check_key(key: Array) -> None:
    """Raises TypeError unless it is one key, typed or raw."""
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and (dtype != jnp.uint32 or np.ndim(key) != 1):
        raise TypeError(f"key must be a random key, got {_told(key)}; e.g. jax.random.key(0)")
    if typed and key.shape:
        raise TypeError(f"key must be one key, got an array of shape {key.shape}; vmap over keys, or use fh.sweep")


def check_is_state(state: ServerState) -> None:
    """Raises TypeError for something else in the place of a state."""
    if not isinstance(state, ServerState):
        raise TypeError(
            f"state must be a ServerState, got {_told(state)}; algorithm.init(params) makes one of parameters"
        )


def _told(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


def check_rate(state: PyTree, *, name: str) -> PyTree:
    """The state of a rule, which must hold its rate."""
    if not hasattr(state, "rate"):
        raise TypeError(
            f"the state of the rule {name} must have a field 'rate', got {_told(state)}; make it a NamedTuple with one"
        )
    return state


def check_training_data(loss_fn: LossFunction, weighting: str, state: ServerState, data: ClientData) -> None:
    """Raises ValueError for data without the weights that are asked for, and what the loss's own ``check`` refuses."""
    if weighting == "weights" and getattr(data, "weights", None) is None:
        raise ValueError(
            f"weighting='weights' needs a data set with weights, got {data!r}; name the array of examples that they "
            "are summed from: data.pack(…, weigh_by='tokens')"
        )
    check = getattr(loss_fn, "check", None)
    if check is not None and isinstance(data, FederatedData):
        check(state.params, data.examples, data.order)


def check_state(state: ServerState, init: Callable[[Params], ServerState]) -> None:
    """Raises ValueError, while tracing, for the state of an algorithm built otherwise."""
    check_is_state(state)
    expected, given = jax.tree.structure(jax.eval_shape(init, state.params)), jax.tree.structure(state)
    if expected != given:
        raise ValueError(
            "state does not belong to this algorithm (other schedulers or optimizers); make it with "
            f"algorithm.init(params).\nExpected {expected}\ngot {given}"
        )
