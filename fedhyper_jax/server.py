"""The server round: cohort → pseudo-gradient → rates → parameters, one pure function."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from fedhyper_jax import _random, _tree, _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction, Params, RoundInfo, ServerState
from fedhyper_jax.client import ClientResult, ClientRule, broadcast_rate, train_client
from fedhyper_jax.cohort import Slots, Strategy, parse_strategy
from fedhyper_jax.data.batches import LocalWork, draw_batches
from fedhyper_jax.data.cohorts import Cohort, check_client_ids
from fedhyper_jax.rates import Feedback, RateReport, RateRule

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
    others. Where nobody is left, or the server's own step is not finite, the round changes nothing but the round number
    (and what a schedule makes of it).

    Args:
      loss_fn: ``(params, batch) -> per-example losses (B,)``.
      work: what clients do in a round, `local_epochs` or `local_steps`.
      global_rate: rule of α, see `fedhyper_jax.rates`.
      local_rate: rule of the broadcast β.
      client_rule: rule of β between local steps; the broadcast rate throughout if None.
      server_optimizer: used as it stands, own sign and rate included; ``optax.sgd(1.0)`` if None. It is handed the
        extra arguments ``value`` (mean loss of the clients) and ``gradient`` (Δ^t).
      client_optimizer: likewise, its state afresh each round.
      weighting: p_m by ``"examples"`` (n_m / Σ n) or ``"uniform"``.
      strategy: 'vectorized', 'sequential', 'chunked(c)' or 'debug', see `fedhyper_jax.cohort`; speed only.

    Returns:
      The pair (init, round).

    Raises:
      ValueError: unknown weighting or strategy, something that is not an optimizer. ``init`` refuses parameters that
        are not floating-point or not finite, ``round`` states of other algorithms and impossible cohorts.
      TypeError: something that is not a `LocalWork`.

    Example:
      >>> import optax
      >>> from fedhyper_jax.data import local_steps
      >>> from fedhyper_jax.rates import hypergradient, scheduled
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = federated_algorithm(  # FedHyper-G whose local rate decays
      ...     loss_fn,
      ...     work=local_steps(5, batch_size=8),
      ...     global_rate=hypergradient(1.0, bounds=(1 / 3, 3.0)),
      ...     local_rate=scheduled(optax.exponential_decay(0.1, 1, 0.99)),
      ... )
      >>> float(algorithm.init(0.5).global_rate.rate)
      1.0
    """
    if not isinstance(work, LocalWork):
        raise TypeError(f"work must come from local_epochs(...) or local_steps(...), got {work!r}")
    _validate.one_of(WEIGHTINGS, weighting=weighting)
    strategy = parse_strategy(strategy)
    client_rule = broadcast_rate() if client_rule is None else client_rule
    server_optimizer = _as_optimizer(server_optimizer, name="server_optimizer")
    client_optimizer = _as_optimizer(client_optimizer, name="client_optimizer")

    def init(params: Params) -> ServerState:
        params = _as_parameters(params)
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
        """Σ p_m Δ_m and Σ p_m over the survivors; per client, whether it survived and what it reports."""
        _, clients_key = _random.round_keys(key, state.round)
        accumulator = _tree.accumulator_dtype(state.params)
        real = cohort.client_ids < cohort.data.population
        sizes = jnp.where(real, jnp.take(cohort.data.client_sizes, cohort.client_ids, mode="clip"), 0)
        # p_m ≤ 1 before summing, so that a mean of finite updates does not overflow on the way.
        shares = sizes if weighting == "examples" else real
        total_share = jnp.maximum(jnp.sum(shares), 1).astype(accumulator)

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
            share = jnp.take(cohort.data.client_sizes, client_id, mode="clip") if weighting == "examples" else 1
            weight = jnp.where(survives, share / total_share, 0).astype(accumulator)
            # where, not a product with 0: 0 · NaN is NaN.
            summand = jax.tree.map(lambda d: jnp.where(survives, weight * d.astype(accumulator), 0.0), update)
            return (summand, weight), (survives, result)

        slots = Slots(
            client_ids=cohort.client_ids,
            steps=work.num_steps(sizes),
            common_steps=work.steps,
            padding_id=cohort.data.population,
        )
        return strategy.map_reduce(client_fn, slots)

    def round_fn(key, state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundInfo]:
        check_client_ids(cohort.client_ids, cohort.data.population)
        _check_state(state, init)
        (weighted_sum, total_weight), (survives, results) = train_cohort(key, state, cohort)
        divisor = jnp.where(total_weight > 0, total_weight, 1)
        pseudo_gradient = jax.tree.map(lambda total, w: (total / divisor).astype(w.dtype), weighted_sum, state.params)
        product = _tree.inner_product(pseudo_gradient, state.pseudo_gradient)
        # α is moved first and then used; β is moved for the next round.
        global_state, global_report = global_rate.update(state.global_rate, Feedback(state.round, product))
        local_state, local_report = local_rate.update(state.local_rate, Feedback(state.round + 1, product))
        client_loss = _over(survives, results.loss) / jnp.maximum(_over(survives, results.examples), 1)
        updates, optimizer_state = server_optimizer.update(
            pseudo_gradient, state.server_optimizer, state.params, value=client_loss, gradient=pseudo_gradient
        )
        params = optax.apply_updates(state.params, _tree.scale(updates, global_state.rate))
        # A step that leaves the numbers of the dtype would end the run; nobody takes part in such a round.
        survives &= _tree.is_finite((pseudo_gradient, params))
        survived = jnp.any(survives)
        new_state = ServerState(
            round=state.round + 1,
            params=params,
            global_rate=global_state,
            local_rate=local_state,
            client_rule=state.client_rule,
            pseudo_gradient=pseudo_gradient,
            server_optimizer=optimizer_state,
        )
        moved_on = {
            "round": state.round + 1,
            "global_rate": global_state if global_rate.by_round else state.global_rate,
            "local_rate": local_state if local_rate.by_round else state.local_rate,
        }
        new_state = _tree.select(survived, new_state, ServerState(**{**vars(state), **moved_on}))

        info = _observe(
            state,
            new_state,
            survives=survives,
            slots=jnp.sum(cohort.client_ids < cohort.data.population, dtype=jnp.int32),
            results=results,
            reports=(global_report, local_report),
            product=product,
            pseudo_gradient=pseudo_gradient,
            client_loss=client_loss,
            sends_pseudo_gradient=client_rule.needs_pseudo_gradient,
        )
        return new_state, info

    return FederatedAlgorithm(init=init, round=round_fn)


def _observe(
    state: ServerState,
    new_state: ServerState,
    *,
    survives: Bool[Array, " cohort"],
    slots: Int[Array, ""],
    results: ClientResult,
    reports: tuple[RateReport, RateReport],
    product: Float[Array, ""],
    pseudo_gradient: Params,
    client_loss: Float[Array, ""],
    sends_pseudo_gradient: bool,
) -> RoundInfo:
    """What `RoundInfo` says of a round."""
    survived, over_survivors = jnp.any(survives), functools.partial(_over, survives)
    global_report, local_report = (_tree.select(survived, report, RateReport.none()) for report in reports)
    client_reports = jax.tree.map(over_survivors, results.rate_report)
    nan = jnp.full((), jnp.nan, product.dtype)
    client_rates = jnp.where(survives, results.rate, nan)
    participants = jnp.sum(survives, dtype=jnp.int32)
    model_bytes = float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params)))
    bytes_to_a_client = model_bytes * (1 + sends_pseudo_gradient) + state.local_rate.rate.dtype.itemsize
    return RoundInfo(
        round=state.round,
        global_rate=new_state.global_rate.rate,
        local_rate=state.local_rate.rate,
        inner_product=jnp.where(survived, product, nan),
        pseudo_gradient_norm=jnp.where(survived, _tree.norm(pseudo_gradient), nan),
        client_rate_min=jnp.nanmin(client_rates),
        client_rate_median=jnp.nanmedian(client_rates),
        client_rate_max=jnp.nanmax(client_rates),
        global_rate_updates=global_report.updates,
        global_rate_clipped=global_report.clipped,
        local_rate_updates=local_report.updates + client_reports.updates,
        local_rate_clipped=local_report.clipped + client_reports.clipped,
        # G and SL share one product.
        non_finite_products=jnp.maximum(global_report.non_finite, local_report.non_finite) + client_reports.non_finite,
        client_loss=jnp.where(survived, client_loss, nan),
        participants=participants,
        left_out=slots - participants,
        local_steps=over_survivors(results.num_steps),
        examples=over_survivors(results.examples.astype(product.dtype)),
        bytes_up=model_bytes * participants.astype(product.dtype),
        bytes_down=bytes_to_a_client * slots.astype(product.dtype),
    )


def _over(survives: Bool[Array, " cohort"], values: Array) -> Array:
    """Sum over the survivors."""
    return jnp.sum(jnp.where(survives, values, 0), dtype=values.dtype)


def _as_optimizer(optimizer, *, name: str) -> optax.GradientTransformationExtraArgs:
    """An optax optimizer, or anything with init and update (``optax.MultiSteps``), accepting extra arguments."""
    optimizer = optax.sgd(1.0) if optimizer is None else optimizer
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"{name} must be an optax optimizer, got {optimizer!r}; call its factory, e.g. optax.sgd(1.0)")
    return optax.with_extra_args_support(optimizer)


def _as_parameters(params: Params) -> Params:
    """Parameters as arrays whose types are those that a round returns, so that the first round is no special case."""

    def as_leaf(path, leaf):
        dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))
        where = f"params{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{where} must be floating-point, got dtype {dtype}; keep what is not trained in the model"
            )
        if not _validate.is_traced(leaf) and not bool(jnp.all(jnp.isfinite(jnp.asarray(leaf, dtype)))):
            raise ValueError(f"{where} has NaN or infinite entries; start from finite parameters")
        return jax.lax.convert_element_type(leaf, dtype)  # strips weak types

    if not jax.tree.leaves(params):
        raise ValueError(f"params has no arrays, got {params!r}; give what model.init returned")
    return jax.tree_util.tree_map_with_path(as_leaf, params)


def _check_state(state: ServerState, init: Callable[[Params], ServerState]) -> None:
    """Raises ValueError, while tracing, for the state of an algorithm built otherwise."""
    expected, given = jax.tree.structure(jax.eval_shape(init, state.params)), jax.tree.structure(state)
    if expected != given:
        raise ValueError(
            "state does not belong to this algorithm (other schedulers or optimizers); make it with "
            f"algorithm.init(params).\nExpected {expected}\ngot {given}"
        )
