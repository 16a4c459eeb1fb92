"""One round, from its stages: cohort → updates → pseudo-gradient → rates → parameters, one pure function."""

from collections.abc import Callable

from jaxtyping import Array

from fedhyper_jax import _random
from fedhyper_jax.base import LossFunction, RoundInfo, ServerState
from fedhyper_jax.data import Cohort, LocalWork
from fedhyper_jax.engine.commit import commit, judged
from fedhyper_jax.engine.observe import observe
from fedhyper_jax.engine.plan import plan_cohort
from fedhyper_jax.engine.step import server_step
from fedhyper_jax.engine.strategies import Strategy
from fedhyper_jax.engine.train import train_cohort
from fedhyper_jax.parts import Parts

RoundFunction = Callable[[Array, ServerState, Cohort], tuple[ServerState, RoundInfo]]


def make_round(parts: Parts, loss_fn: LossFunction, work: LocalWork, strategy: Strategy) -> RoundFunction:
    """The round of an algorithm: ``round_fn(key of the run, state, cohort) -> (state, RoundInfo)``."""

    def round_fn(key: Array, state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundInfo]:
        keys = _random.round_keys(key, state.round)
        plan = plan_cohort(parts, work, keys, state, cohort)
        gathered, records = train_cohort(parts, loss_fn, work, strategy, keys, state, cohort.data, plan)
        step = server_step(parts, keys.server, state, gathered)
        verdict, guard_state = judged(parts, state, step.proposal, gathered.client_loss)
        new_state = commit(parts, state, plan, records, step, verdict, guard_state)
        return new_state, observe(parts, state, new_state, plan, gathered, records, step, verdict)

    return round_fn
