"""Local training: a pure loop over a client's local steps with the learning rate in the carry."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from fedhyper_jax import _tree
from fedhyper_jax.base import Batch, LossFunction, Params, PyTree
from fedhyper_jax.data.batches import ClientBatches
from fedhyper_jax.hypergradient import AdaptiveRate, adaptive_rate
from fedhyper_jax.hypergradient._client import local_transform
from fedhyper_jax.hypergradient._rule import check
from fedhyper_jax.metrics import check_per_example
from fedhyper_jax.rates import RateReport


class ClientRule(NamedTuple):
    """How a client's rate moves between its local steps.

    Attributes:
      init: ``init(params) -> settings``, arrays that live in the server state (κ, bounds), so that they are data.
      transform: ``transform(settings, rate, num_steps) -> optax transform``, made afresh for each client and round
        from the broadcast rate; its state has a field ``rate``.
      report: ``report(transform_state) -> RateReport`` of the client's round.
      needs_pseudo_gradient: whether clients receive Δ^{t-1}, which doubles what is sent to them.
    """

    init: Callable[[Params], PyTree]
    transform: Callable[[PyTree, Array, Array], optax.GradientTransformationExtraArgs]
    report: Callable[[PyTree], RateReport]
    needs_pseudo_gradient: bool


class GivenRateState(NamedTuple):
    """State of a client's rate that does not move."""

    rate: Float[Array, ""]


def broadcast_rate() -> ClientRule:
    """Every local step uses the rate that the server broadcast."""

    def transform(settings, rate, num_steps):
        del settings, num_steps

        def update_fn(updates, state, params=None, **extra_args):
            del params, extra_args
            return _tree.scale(updates, state.rate), state

        return optax.GradientTransformationExtraArgs(lambda params: GivenRateState(rate=rate), update_fn)

    def report(state):
        del state
        return RateReport.none()

    return ClientRule(init=lambda params: (), transform=transform, report=report, needs_pseudo_gradient=False)


def local_hypergradient(initial_rate, hyper_rate, bounds) -> ClientRule:
    """FedHyper-CL: the rate moves at every local step, see `scale_by_local_hypergradient`; the global weight is 1/K_m.

    Args:
      initial_rate: β^0 of the run, which the bounds must enclose.
      hyper_rate: κ.
      bounds: (lower, upper) as plain numbers.
    """
    check(initial_rate, hyper_rate, bounds, rate_name="local_rate")

    def init(params) -> AdaptiveRate:
        return adaptive_rate(initial_rate, hyper_rate, bounds, _tree.accumulator_dtype(params))

    def transform(settings, rate, num_steps):
        global_weight = 1 / jnp.maximum(num_steps, 1).astype(rate.dtype)
        return local_transform(rate, settings.hyper_rate, (settings.lower, settings.upper), global_weight)

    def report(state):
        updates = jnp.maximum(state.step_count - 1, 0) - state.non_finite_count
        return RateReport(updates=updates, clipped=state.clipped_count, non_finite=state.non_finite_count)

    return ClientRule(init=init, transform=transform, report=report, needs_pseudo_gradient=True)


class ClientResult(NamedTuple):
    """What a client returns, besides its update."""

    rate: Float[Array, ""]  # final β_m = β_m^{t, K_m − 1}
    rate_report: RateReport
    loss: Float[Array, ""]  # sum of the losses of the examples seen, at the iterates that saw them
    examples: Int[Array, ""]  # examples seen, with repetition
    num_steps: Int[Array, ""]  # K_m


class _Carry(NamedTuple):
    params: Params
    optimizer: PyTree
    rate: PyTree
    loss: Float[Array, ""]
    examples: Int[Array, ""]


Loop = Callable[[Any, Callable, Any], Any]
"""``loop(num_steps, body, carry)``: a `for k in range(num_steps): carry = body(k, carry)`."""


def compiled_loop(num_steps, body, carry):
    """The loop of every strategy but ``debug``: a scan where the number of steps is static, else a while loop."""
    return lax.fori_loop(0, num_steps, body, carry)


def train_client(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformationExtraArgs,
    rule: ClientRule,
    *,
    params: Params,
    rate: Float[Array, ""],
    settings: PyTree,
    pseudo_gradient: Params,
    examples: Batch,
    batches: ClientBatches,
    num_steps: int | Int[Array, ""],
    loop: Loop = compiled_loop,
) -> tuple[Params, ClientResult]:
    """Trains one client for one round: w_m^{k+1} = w_m^k + β_m^k · optimizer(g_m^k), from w_m^0 = w.

    Args:
      loss_fn: ``(params, batch) -> per-example losses``.
      optimizer: the client's optax optimizer, its state afresh; its updates descend (−g for plain SGD).
      rule: how the rate moves; its products are taken of what the optimizer is fed.
      params: global parameters w.
      rate: β^t as broadcast.
      settings: the rule's settings from the server state.
      pseudo_gradient: Δ^{t-1}.
      examples: the pool.
      batches: the client's batches.
      num_steps: steps to run, at least K_m; those from K_m on leave parameters, optimizer and rate as they are. Where
        it is a Python number, all clients are known to take just so many, and nothing is masked.
      loop: how steps are repeated.

    Returns:
      The client update Δ_m = w − w_m (old minus new), and what the client reports.
    """
    transform = rule.transform(settings, rate, batches.num_steps)
    masks_steps = not isinstance(num_steps, int)

    def step(k, carry: _Carry) -> _Carry:
        mask = batches.mask[k]
        batch = jax.tree.map(lambda array: array[batches.rows[k]], examples)
        count = jnp.sum(mask, dtype=jnp.int32)

        def mean_loss(params):
            losses = loss_fn(params, batch)
            check_per_example(losses, len(mask), name="loss_fn")
            total = jnp.sum(jnp.where(mask, losses, 0.0))
            return total / jnp.maximum(count, 1), total

        (value, total), gradient = jax.value_and_grad(mean_loss, has_aux=True)(carry.params)
        extra = {"value": value, "gradient": gradient, "global_update": pseudo_gradient}
        direction, optimizer_state = optimizer.update(gradient, carry.optimizer, carry.params, **extra)
        updates, rate_state = transform.update(direction, carry.rate, carry.params, **extra)
        new = _Carry(
            params=optax.apply_updates(carry.params, updates),
            optimizer=optimizer_state,
            rate=rate_state,
            loss=carry.loss + total.astype(carry.loss.dtype),
            examples=carry.examples + count,
        )
        return _tree.select(k < batches.num_steps, new, carry) if masks_steps else new

    start = _Carry(
        params=params,
        optimizer=optimizer.init(params),
        rate=transform.init(params),
        loss=jnp.zeros((), rate.dtype),
        examples=jnp.zeros((), jnp.int32),
    )
    end = loop(num_steps, step, start)
    result = ClientResult(
        rate=end.rate.rate,
        rate_report=rule.report(end.rate),
        loss=end.loss,
        examples=end.examples,
        num_steps=batches.num_steps,
    )
    return _tree.subtract(params, end.params), result
