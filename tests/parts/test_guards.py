"""Guards, by hand: which rounds count, and what is remembered."""

import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax.parts import Proposal, guards, rates
from fedhyper_jax.parts.contract import keep_before


def proposal(params=1.0):
    nothing = {name: () for name in Proposal._fields}
    return Proposal(**{**nothing, "params": jnp.float32(params), "pseudo_gradient": jnp.float32(0.0), "terms": {}})


def verdicts(guard, losses, params=None):
    state, found = guard.init(jnp.zeros(())), []
    for index, loss in enumerate(losses):
        verdict, state = guard.judge(state, proposal(1.0 if params is None else params[index]), jnp.float32(loss))
        found.append((bool(verdict.accepted), bool(verdict.finite)))
    return found, state


def test_finite_accepts_all_that_is_finite():
    found, _ = verdicts(guards.finite(), [1.0, 100.0, 1.0], params=[1.0, 2.0, np.nan])
    assert found == [(True, True), (True, True), (False, False)]
    verdict, _ = guards.finite().judge((), proposal(), jnp.float32(1.0))
    assert not verdict.takes_back


def test_rollback_compares_with_the_last_round_that_counted():
    """Loss 1, 1.9 (counts), 3.7 (counts: below 3.8), 7.5 (above 7.4), 7.3 (below it), 100."""
    found, state = verdicts(guards.rollback(2.0), [1.0, 1.9, 3.7, 7.5, 7.3, 100.0])
    assert [accepted for accepted, _ in found] == [True, True, True, False, True, False]
    assert float(state.last_loss) == pytest.approx(7.3) and int(state.refusals) == 1


def test_rollback_takes_back_losses_and_steps_that_are_not_finite():
    found, state = verdicts(guards.rollback(2.0), [1.0, np.nan, np.inf, 1.0], params=[1.0, 1.0, 1.0, np.inf])
    assert found == [(True, True), (False, True), (False, True), (False, False)]
    assert float(state.last_loss) == 1.0


def test_patience_ends():
    """Two in a row are taken back; the third counts, and its loss is the new measure. NaN never counts."""
    found, state = verdicts(guards.rollback(1.5, patience=2), [1.0, 9.0, 9.0, 9.0, 12.0, np.nan])
    assert [accepted for accepted, _ in found] == [True, False, False, True, True, False]
    assert float(state.last_loss) == 12.0


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, np.nan])
def test_factors_that_are_refused(factor):
    with pytest.raises(ValueError, match="rollback_factor"):
        guards.rollback(factor)


def test_what_rules_make_of_a_refusal():
    """FedHyper's halve within their bounds, κ = 0 and other rules keep the rate, schedules go on by themselves."""
    params = jnp.zeros(2)
    rule = rates.hypergradient(0.5, 1.0, (0.2, 5.0))
    before = rule.init(params)
    moved = before._replace(rate=jnp.float32(0.9))
    once = rule.refused(before, moved)
    assert float(once.rate) == 0.25 and float(rule.refused(once, moved).rate) == pytest.approx(0.2)
    still = rates.hypergradient(0.5, 0.0, (0.2, 5.0))
    assert float(still.refused(still.init(params), moved).rate) == 0.5
    assert rates.extrapolation().refused is keep_before and rates.scheduled(0.1).by_round
