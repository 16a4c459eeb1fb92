"""Dropout of clients, by chance: how often, and by what key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax import _random
from fedhyper_jax.parts import failures

PARAMS = jnp.zeros(3)


def fates(model, number=20_000):
    settings = model.init(PARAMS)
    keys = jax.vmap(lambda m: _random.failure_key(jax.random.key(0), m))(jnp.arange(number))
    starts = jax.vmap(lambda key: model.before(key, settings, jnp.int32(7)))(keys) if model.before else None
    arrives = jax.vmap(lambda key: model.after(key, settings, PARAMS)[1])(keys) if model.after else None
    return starts, arrives


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
