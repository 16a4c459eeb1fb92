"""The numbers that a round records of itself."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fedhyper_jax import _tree
from fedhyper_jax.base import NOT_FINITE, RATE_ROWS, RoundInfo, ServerState
from fedhyper_jax.engine.plan import Plan
from fedhyper_jax.engine.step import Step
from fedhyper_jax.engine.train import ClientRecord, over
from fedhyper_jax.parts import Gathered, Parts, RateReport, Traffic, Verdict


def observe(
    parts: Parts,
    state: ServerState,
    new_state: ServerState,
    plan: Plan,
    gathered: Gathered,
    records: ClientRecord,
    step: Step,
    verdict: Verdict,
) -> RoundInfo:
    """The numbers of a round; `RoundInfo` says what each is."""
    # Of a step that left the numbers of the dtype nobody is said to have taken part.
    alive = records.alive & verdict.finite
    someone, over_participants = jnp.any(alive), functools.partial(over, alive)
    product = step.feedback.inner_product
    global_report, local_report = (_tree.select(someone, report, RateReport.none()) for report in step.reports)
    client_reports = jax.tree.map(over_participants, records.rate_report)
    nan = jnp.full((), jnp.nan, product.dtype)
    losses = jnp.zeros_like(alive) if records.lost is None else records.lost
    participants, started, lost = (jnp.sum(x, dtype=jnp.int32) for x in (alive, plan.started, losses))
    lowest, median, highest = _spread(jnp.where(alive, records.rate, nan), participants)
    first_left_out, because = _first_left_out(plan, records, losses, verdict)
    sent = _traffic(parts, state, gathered)
    taken_back, global_rate = someone & ~verdict.accepted, new_state.global_rate.rate
    if verdict.takes_back:  # the rate that the round used, not the one that is left after it
        global_rate = jnp.where(taken_back, step.proposal.global_rate.rate, global_rate)
    return RoundInfo(
        round=state.round,
        global_rate=global_rate,
        local_rate=state.local_rate.rate,
        inner_product=jnp.where(someone, product, nan),
        retained_share=_retained_share(parts, step),
        pseudo_gradient_norm=jnp.where(someone, _tree.norm(step.feedback.pseudo_gradient), nan),
        client_rate_min=lowest,
        client_rate_median=median,
        client_rate_max=highest,
        global_rate_updates=global_report.updates,
        global_rate_clipped=global_report.clipped,
        local_rate_updates=local_report.updates + client_reports.updates,
        local_rate_clipped=local_report.clipped + client_reports.clipped,
        # G and SL share one product.
        non_finite_products=jnp.maximum(global_report.non_finite, local_report.non_finite) + client_reports.non_finite,
        client_loss=jnp.where(someone, gathered.client_loss, nan),
        participants=participants,
        left_out=started - lost - participants,
        first_left_out=first_left_out,
        left_out_because=because,
        not_started=plan.cohort_size - started,
        lost=lost,
        taken_back=taken_back.astype(jnp.int32),
        local_steps=over_participants(records.num_steps),
        examples=over_participants(records.examples.astype(product.dtype)),
        bytes_up=sent.up * participants.astype(product.dtype),
        bytes_down=sent.down * started.astype(product.dtype),
    )


def _retained_share(parts: Parts, step: Step) -> Float[Array, ""]:
    """What the rule of the local rate observed in this round."""
    observed = parts.local_rate.observed
    product = step.feedback.inner_product
    return jnp.zeros_like(product) if observed is None else observed(step.proposal.local_rate).astype(product.dtype)


def _spread(values: Float[Array, " cohort"], number: Int[Array, ""]) -> tuple[Float[Array, ""], ...]:
    """Smallest, median and largest of the ``number`` values that are not NaN; NaN of none."""
    ranked = jnp.sort(values)  # NaN last
    last = jnp.maximum(number - 1, 0)
    low, middle, above, high = ranked[jnp.stack([jnp.zeros_like(last), last >> 1, (last + 1) >> 1, last])]
    return low, 0.5 * middle + 0.5 * above, high


def _first_left_out(
    plan: Plan, records: ClientRecord, lost: Bool[Array, " cohort"], verdict: Verdict
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The id of the first client that is left out, −1 if there is none, and a number of `NOT_FINITE`: the reason."""
    left_out = plan.started & (records.not_finite > 0) & ~lost
    first, someone = jnp.argmax(left_out), jnp.any(left_out)
    reason_of_all = jnp.where(verdict.finite, 0, NOT_FINITE.index("the server's step"))
    return (
        jnp.where(someone, plan.clients.client_id[first], -1),
        jnp.where(someone, records.not_finite[first], reason_of_all),
    )


def _traffic(parts: Parts, state: ServerState, gathered: Gathered) -> Traffic:
    """Bytes that one client sends and gets."""
    model = float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params)))
    scalar = state.local_rate.rate.dtype.itemsize
    extra = [term.traffic(state.params) for term in parts.terms]
    reported = len(jax.tree.leaves(gathered.reported)) + parts.needs_spread  # (‖Δ_m‖²)
    broadcast_rate_bytes = 0 if RATE_ROWS in state.clients else scalar
    return Traffic(
        up=model + reported * scalar + sum(traffic.up for traffic in extra),
        down=model * (1 + parts.client_rule.needs_pseudo_gradient)
        + broadcast_rate_bytes
        + sum(traffic.down for traffic in extra),
    )
