"""The server round: cohort → pseudo-gradient → rates → parameters, one pure function."""

import jax
import jax.numpy as jnp
import optax

from fedhyper_jax import _random, _tree, _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction, Params, RoundInfo, ServerState
from fedhyper_jax.client import ClientRule, broadcast_rate, train_client
from fedhyper_jax.cohort import Slots, Strategy, parse_strategy
from fedhyper_jax.data.batches import LocalWork, draw_batches
from fedhyper_jax.data.cohorts import Cohort
from fedhyper_jax.rates import Feedback, RateRule

WEIGHTINGS = ("examples", "uniform")


def federated_algorithm(
    loss_fn: LossFunction,
    *,
    work: LocalWork,
    global_rate: RateRule,
    local_rate: RateRule,
    client_rule: ClientRule | None = None,
    server_optimizer: optax.GradientTransformation | None = None,
    client_optimizer: optax.GradientTransformation | None = None,
    weighting: str = "examples",
    strategy: str | Strategy = "vectorized",
) -> FederatedAlgorithm:
    r"""Assembles an algorithm from the rules of its rates and its optimizers; every algorithm here is made by it.

    .. math::
      \Delta^t = \sum_m p_m (w^t - w_m^t), \qquad
      w^{t+1} = w^t + \alpha^t \, \mathrm{server\_optimizer}(\Delta^t), \qquad
      w_m^{k+1} = w_m^k + \beta_m^k \, \mathrm{client\_optimizer}(g_m^k)

    A client whose update, loss or rate is not finite is left out and counted, the weights p_m renormalised over the
    others; a round without survivors changes nothing but the round number.

    Args:
      loss_fn: ``(params, batch) -> per-example losses (B,)``.
      work: what clients do in a round, `local_epochs` or `local_steps`.
      global_rate: rule of α, see `fedhyper_jax.rates`.
      local_rate: rule of the broadcast β.
      client_rule: rule of β between local steps; the broadcast rate throughout if None.
      server_optimizer: used as it stands, own sign and rate included; ``optax.sgd(1.0)`` if None.
      client_optimizer: likewise, its state afresh each round.
      weighting: p_m by ``"examples"`` (n_m / Σ n) or ``"uniform"``.
      strategy: 'vectorized', 'sequential', 'chunked(c)' or 'debug', see `fedhyper_jax.cohort`; speed only.

    Returns:
      The pair (init, round).

    Raises:
      ValueError: unknown weighting or strategy.
      TypeError: something that is not a `LocalWork`.
    """
    if not isinstance(work, LocalWork):
        raise TypeError(f"work must come from local_epochs(...) or local_steps(...), got {work!r}")
    _validate.one_of(WEIGHTINGS, weighting=weighting)
    strategy = parse_strategy(strategy)
    client_rule = broadcast_rate() if client_rule is None else client_rule
    server_optimizer, client_optimizer = (
        optax.with_extra_args_support(optax.sgd(1.0) if optimizer is None else optimizer)
        for optimizer in (server_optimizer, client_optimizer)
    )

    def init(params: Params) -> ServerState:
        return ServerState(
            round=jnp.zeros((), jnp.int32),
            params=params,
            global_rate=global_rate.init(params),
            local_rate=local_rate.init(params),
            client_rule=client_rule.init(params),
            pseudo_gradient=optax.tree.zeros_like(params),
            server_optimizer=server_optimizer.init(params),
        )

    def train_cohort(key, state: ServerState, cohort: Cohort):
        """Σ weight·Δ_m and Σ weight over the survivors; per client, whether it survived and what it reports."""
        _, clients_key = _random.round_keys(key, state.round)
        accumulator = _tree.accumulator_dtype(state.params)

        def client_fn(client_id, num_steps, loop):
            batches = draw_batches(_random.batch_key(clients_key, client_id), cohort.data, client_id, work)
            update, result = train_client(
                loss_fn,
                client_optimizer,
                client_rule,
                params=state.params,
                rate=state.local_rate.rate,
                settings=state.client_rule,
                pseudo_gradient=state.pseudo_gradient,
                examples=cohort.data.examples,
                batches=batches,
                num_steps=num_steps,
                loop=loop,
            )
            survives = _tree.is_finite((update, result.loss, result.rate)) & (batches.num_steps > 0)
            size = jnp.take(cohort.data.client_sizes, client_id, mode="clip") if weighting == "examples" else 1
            weight = jnp.where(survives, size, 0).astype(accumulator)
            # where, not a product with 0: 0 · NaN is NaN.
            summand = jax.tree.map(lambda d: jnp.where(survives, weight * d.astype(accumulator), 0.0), update)
            return (summand, weight), (survives, result)

        real = cohort.client_ids < cohort.data.population
        sizes = jnp.where(real, jnp.take(cohort.data.client_sizes, cohort.client_ids, mode="clip"), 0)
        slots = Slots(
            client_ids=cohort.client_ids,
            steps=work.num_steps(sizes),
            common_steps=work.steps,
            padding_id=cohort.data.population,
        )
        return strategy.map_reduce(client_fn, slots)

    def round_fn(key, state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundInfo]:
        (weighted_sum, total_weight), (survives, results) = train_cohort(key, state, cohort)
        survived = jnp.any(survives)
        pseudo_gradient = jax.tree.map(
            lambda total, w: (total / jnp.where(survived, total_weight, 1.0)).astype(w.dtype),
            weighted_sum,
            state.params,
        )
        product = _tree.inner_product(pseudo_gradient, state.pseudo_gradient)
        # α is moved first and then used; β is moved for the next round.
        global_state, global_report = global_rate.update(state.global_rate, Feedback(state.round, product))
        local_state, local_report = local_rate.update(state.local_rate, Feedback(state.round + 1, product))
        updates, optimizer_state = server_optimizer.update(pseudo_gradient, state.server_optimizer, state.params)
        new_state = ServerState(
            round=state.round + 1,
            params=optax.apply_updates(state.params, _tree.scale(updates, global_state.rate)),
            global_rate=global_state,
            local_rate=local_state,
            client_rule=state.client_rule,
            pseudo_gradient=pseudo_gradient,
            server_optimizer=optimizer_state,
        )
        unchanged = ServerState(**{**vars(state), "round": state.round + 1})
        new_state = _tree.select(survived, new_state, unchanged)

        def over_survivors(values):
            return jnp.sum(jnp.where(survives, values, 0), dtype=values.dtype)

        nan = jnp.full((), jnp.nan, product.dtype)
        client_rates = jnp.where(survives, results.rate, nan)
        reports = results.rate_report
        examples = over_survivors(results.examples.astype(product.dtype))
        participants = jnp.sum(survives, dtype=jnp.int32)
        slots = jnp.sum(cohort.client_ids < cohort.data.population, dtype=jnp.int32)
        model_bytes = float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params)))
        down_bytes = (
            model_bytes * (2 if client_rule.needs_pseudo_gradient else 1) + state.local_rate.rate.dtype.itemsize
        )
        info = RoundInfo(
            round=state.round,
            global_rate=new_state.global_rate.rate,
            local_rate=state.local_rate.rate,
            inner_product=jnp.where(survived, product, nan),
            pseudo_gradient_norm=jnp.where(survived, _tree.norm(pseudo_gradient), nan),
            client_rate_min=jnp.nanmin(client_rates),
            client_rate_median=jnp.nanmedian(client_rates),
            client_rate_max=jnp.nanmax(client_rates),
            global_rate_updates=jnp.where(survived, global_report.updates, 0),
            global_rate_clipped=jnp.where(survived, global_report.clipped, 0),
            local_rate_updates=jnp.where(survived, local_report.updates, 0) + over_survivors(reports.updates),
            local_rate_clipped=jnp.where(survived, local_report.clipped, 0) + over_survivors(reports.clipped),
            non_finite_products=jnp.where(survived, jnp.maximum(global_report.non_finite, local_report.non_finite), 0)
            + over_survivors(reports.non_finite),
            client_loss=jnp.where(survived, over_survivors(results.loss) / jnp.maximum(examples, 1), nan),
            participants=participants,
            left_out=slots - participants,
            local_steps=over_survivors(results.num_steps),
            examples=examples,
            bytes_up=model_bytes * participants.astype(product.dtype),
            bytes_down=down_bytes * slots.astype(product.dtype),
        )
        return new_state, info

    return FederatedAlgorithm(init=init, round=round_fn)
