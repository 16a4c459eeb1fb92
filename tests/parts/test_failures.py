"""Clients that drop out or are slow, by chance: how often, and by what key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import _random
from fedhyper_jax.parts import failures

PARAMS = jnp.zeros(3)


def fates(model, number=20_000):
    settings = model.init(PARAMS)

    @jax.jit
    @jax.vmap
    def fate(client_id):
        key = _random.failure_key(jax.random.key(0), client_id)
        starts = model.before(key, settings, jnp.int32(7)) if model.before else None
        return starts, model.after(key, settings, PARAMS)[1] if model.after else None

    return fate(jnp.arange(number))


@pytest.mark.parametrize(("before", "after"), [(0.1, 0.3), (0.5, 0.05)])
def test_how_often(before, after):
    starts, arrives = map(np.asarray, fates(failures.dropout(before, after)))
    assert set(starts.tolist()) == {0, 7}
    for share, expected in ((np.mean(starts == 0), before), (np.mean(~arrives), after)):
        assert abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(starts))
    # independent of each other
    both = np.mean((starts == 0) & ~arrives)
    assert abs(both - before * after) <= 5 * np.sqrt(before * after / len(starts))


def test_a_door_that_is_not_used_costs_nothing():
    assert failures.dropout(0.0, 0.1).before is None and failures.dropout(0.1, 0.0).after is None
    nothing = failures.none()
    assert nothing.before is None and nothing.after is None and nothing.init(PARAMS) == ()


@pytest.mark.parametrize("settings", [{"before": -0.1}, {"before": 1.0}, {"after": np.nan}, {"after": 2}])
def test_probabilities_that_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} must be a probability in"):
        failures.dropout(**settings)
    with pytest.raises(ValueError, match="share must be a probability in"):
        failures.stragglers(settings[name])


def test_stragglers_take_any_number_of_steps_alike():
    steps = np.asarray(fates(failures.stragglers(0.6))[0])
    # 1 to 7 with probability 0.6 / 7 each, and all 7 also with 0.4
    expected = np.array([0.6 / 7] * 6 + [0.4 + 0.6 / 7])
    shares = np.bincount(steps, minlength=8)[1:] / len(steps)
    assert steps.min() == 1 and steps.max() == 7
    assert np.all(abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(steps)))


@pytest.mark.parametrize("num_steps", [0, 1])
def test_who_has_nothing_to_leave_out_takes_all(num_steps):
    model = failures.stragglers(0.9)
    keys = jax.random.split(jax.random.key(0), 50)
    taken = jax.jit(jax.vmap(lambda key: model.before(key, model.init(PARAMS), jnp.int32(num_steps))))(keys)
    assert set(taken.tolist()) == {num_steps}


def test_joined_models_have_chances_of_their_own():
    dropout, slow = failures.dropout(0.3, 0.2), failures.stragglers(0.5)
    starts, arrives = map(np.asarray, fates(failures.joined(dropout, slow)))
    alone, arrives_alone = map(np.asarray, fates(dropout))
    np.testing.assert_array_equal(starts == 0, alone == 0)  # the first is as if it were alone
    np.testing.assert_array_equal(arrives, arrives_alone)
    slowed = np.mean(starts[starts > 0] < 7)
    assert abs(slowed - 0.5 * 6 / 7) <= 5 * np.sqrt(0.25 / np.sum(starts > 0))
    twice = np.asarray(fates(failures.joined(failures.dropout(0.3), failures.dropout(0.3)))[0])
    assert abs(np.mean(twice > 0) - 0.49) <= 5 * np.sqrt(0.25 / len(twice))  # not the same clients twice


def test_doors_that_no_joined_model_uses_stay_shut():
    assert failures.joined(failures.stragglers(0.5)).after is None
    assert failures.joined(failures.dropout(0.0, 0.1), failures.none()).before is None
    assert failures.joined().before is None and failures.joined().after is None
