"""One ragged federation and one compiled round an algorithm, which all its contracts and its transcription share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from fedhyper_jax import _random
from fedhyper_jax.data import Cohort, client_batches, pack
from fedhyper_jax.data.cohorts import sample_cohort
from tests.algorithms import COHORT, EPOCHS, POPULATION, ROUNDS, SLOTS, Entry
from tests.helpers import logistic_params

SIZES = [1, 9, 2, 5, 3, 7, 4, 6]
CLASSES, FEATURES = 3, 5


def run_key():
    """The key of every run here."""
    return jax.random.key(0)


@functools.cache
def examples():
    """Examples, and the rows of each client: 1 to 9."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, CLASSES, sum(SIZES))
    inputs = rng.normal(size=(sum(SIZES), FEATURES)) + np.eye(FEATURES)[labels]
    rows = np.split(rng.permutation(sum(SIZES)), np.cumsum(SIZES)[:-1])
    return {"x": inputs, "y": np.int32(labels)}, rows


@functools.cache
def federation(dtype, population=POPULATION):
    """The federation in a dtype; every example may be poisoned by its factor or offset."""
    arrays, rows = examples()
    count = len(arrays["y"])
    poison = {"factor": np.ones(count, dtype), "offset": np.zeros(count, dtype)}
    return pack({"x": arrays["x"].astype(dtype), "y": arrays["y"], **poison}, rows[:population])


def poisoned(data, client, **values):
    """The federation with other factors or offsets for one client's examples."""
    rows = np.asarray(data.order)[data.offsets[client] : data.offsets[client + 1]]
    changed = {name: np.array(data.examples[name]) for name in values}
    for name, value in values.items():
        changed[name][rows] = value
    return dataclasses.replace(data, examples={**data.examples, **jax.tree.map(jnp.asarray, changed)})


@functools.cache
def sampled_cohorts(rounds=ROUNDS) -> list[list[int]]:
    """The cohorts that `simulate` draws with the key of the run, round after round."""
    keys = [_random.round_keys(run_key(), jnp.int32(number)).cohort for number in range(rounds)]
    return [sample_cohort(key, POPULATION, COHORT).tolist() for key in keys]


@functools.cache
def drawn_batches(rounds, work=EPOCHS):
    """For each round, the rows of each local step of each client that it draws."""
    data = federation("float64")
    draw = jax.vmap(jax.vmap(lambda t, m: client_batches(run_key(), t, data, m, work), (None, 0)))
    cohorts = np.array(sampled_cohorts(rounds))
    drawn = jax.tree.map(np.asarray, jax.jit(draw)(jnp.arange(rounds), jnp.asarray(cohorts)))
    return [
        {
            int(client): [drawn.rows[t, s, k][drawn.mask[t, s, k]] for k in range(drawn.num_steps[t, s])]
            for s, client in enumerate(cohort)
        }
        for t, cohort in enumerate(cohorts)
    ]


class Bench:
    """An algorithm of the table, its compiled round and the run that the tests compare with.

    The round is compiled ahead of time, so that it refuses whatever would need another program.
    """

    def __init__(self, line: Entry, dtype="float64", strategy="vectorized", slots=SLOTS):
        self.line, self.dtype, self.slots = line, jnp.dtype(dtype), slots
        self.data = federation(dtype)
        self.algorithm = line.build(strategy=strategy, **line.setting(0))
        start = self.start(self.algorithm)
        self.lowered = jax.jit(self.algorithm.round).lower(*self.arguments(start, []))
        self._compiled = self.lowered.compile()
        self.states, self.infos = self.play(start, sampled_cohorts())

    def params(self):
        """A start that is not zero."""
        return logistic_params(self.dtype)

    def start(self, algorithm):
        """Of any algorithm, the state before round 0."""
        return algorithm.init(self.params())

    def arguments(self, state, ids, data=None):
        """Of a round of a cohort that is padded."""
        ids = jnp.asarray([*ids, *[POPULATION] * (self.slots - len(ids))], jnp.int32)
        return run_key(), state, Cohort(data=self.data if data is None else data, client_ids=ids)

    def round(self, state, ids, data=None):
        """A round of a padded cohort in the one compiled program."""
        return self._compiled(*self.arguments(state, ids, data))

    def play(self, state, cohorts):
        """States, the first included, and infos of several rounds."""
        states, infos = [state], []
        for ids in cohorts:
            state, info = self.round(state, ids)
            states.append(state)
            infos.append(info)
        return states, infos

    def reached(self, algorithm):
        """The evaluated parameters after a run of `sampled_cohorts` from the init of another algorithm."""
        states, _ = self.play(self.start(algorithm), sampled_cohorts())
        return algorithm.evaluated_params(states[-1])
