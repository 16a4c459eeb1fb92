"""The last stage of a round: the only place that writes a `ServerState`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from fedhyper_jax import _tree
from fedhyper_jax.base import PyTree, ServerState
from fedhyper_jax.engine.plan import Plan
from fedhyper_jax.engine.step import Step
from fedhyper_jax.engine.train import ClientRecord
from fedhyper_jax.parts import Parts, Proposal, RateRule, Verdict


def judged(parts: Parts, state: ServerState, proposal: Proposal, client_loss: Array) -> tuple[Verdict, PyTree]:
    """The verdict of the guard and of the rules that judge rounds themselves; the guard forgets what these refuse."""
    verdict, guard_state = parts.guard.judge(state.guard, proposal, client_loss)
    for rule, moved in ((parts.global_rate, proposal.global_rate), (parts.local_rate, proposal.local_rate)):
        if rule.accepts is not None:
            accepts = rule.accepts(moved)
            verdict = Verdict(accepted=verdict.accepted & accepts, finite=verdict.finite)
            guard_state = _tree.select(accepts, guard_state, state.guard)
    return verdict, guard_state


def commit(
    parts: Parts,
    state: ServerState,
    plan: Plan,
    records: ClientRecord,
    step: Step,
    verdict: Verdict,
    guard_state: PyTree,
) -> ServerState:
    """The next state: what was proposed if the round counts, else what was, but for the number of the round.

    Rates that depend on the round alone move on all the same, and rules hear of a round that was taken back.
    """
    someone = jnp.any(records.alive)
    counts = someone & verdict.accepted
    moved = step.proposal
    kept = Proposal(
        **{name: getattr(state, name) for name in Proposal._fields if not name.endswith("_rate")},
        global_rate=moved.global_rate if parts.global_rate.by_round else state.global_rate,
        local_rate=moved.local_rate if parts.local_rate.by_round else state.local_rate,
    )
    if verdict.takes_back:
        taken_back = someone & verdict.finite & ~verdict.accepted
        arrived = plan.started if records.lost is None else plan.started & ~records.lost
        failed = jnp.any(arrived) & ~counts
        for name in ("global_rate", "local_rate"):
            rule, before = getattr(parts, name), getattr(state, name)
            told = taken_back if rule.accepts is None else failed
            after = _tree.select(told, _refused(rule, before, getattr(moved, name)), getattr(kept, name))
            kept = kept._replace(**{name: after})
    return ServerState(
        round=state.round + 1,
        client_rule=state.client_rule,
        failures=state.failures,
        guard=_tree.select(someone, guard_state, state.guard),
        clients=_written(state, plan, records, records.alive & verdict.accepted),
        **_tree.select(counts, moved, kept)._asdict(),
    )


def _refused(rule: RateRule, before: PyTree, moved: PyTree) -> PyTree:
    return moved if rule.by_round else rule.refused(before, moved)


def _written(state: ServerState, plan: Plan, records: ClientRecord, counted: Bool[Array, " cohort"]):
    """The rows of all clients; those of clients that do not count, empty slots included, are written nowhere."""
    where = jnp.where(counted, plan.clients.client_id, plan.padding_id)
    return jax.tree.map(
        lambda old, new: old.at[where].set(new.astype(old.dtype), mode="drop"), state.clients, records.rows
    )
