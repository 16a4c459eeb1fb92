"""One federation, played by the package and handed to the NumPy references with the very same batches."""

import jax
import jax.numpy as jnp
import numpy as np

from fedhyper_jax.data import Cohort, client_batches, pack, sample_cohort
from tests.reference import baselines_numpy as baselines
from tests.reference import fedhyper_numpy as reference

CLASSES, FEATURES, POPULATION, COHORT = 3, 5, 20, 6


def flatten(params):
    """In the reference's order: weights row by row, then bias."""
    return np.concatenate([np.asarray(params["weights"], float).ravel(), np.asarray(params["bias"], float)])


def unflatten(vector, dtype):
    weights, bias = np.split(np.asarray(vector), [FEATURES * CLASSES])
    return {"weights": jnp.asarray(weights.reshape(FEATURES, CLASSES), dtype), "bias": jnp.asarray(bias, dtype)}


class Duel:
    """One run in the package and what the reference needs to repeat it."""

    def __init__(self, ragged, dtype, work, rounds=20, seed=0, cohorts=None):
        examples, rows = ragged
        self.dtype, self.rounds, self.key = dtype, rounds, jax.random.key(seed)
        self.inputs = examples["x"].astype(np.dtype(dtype))
        self.data = pack({"x": self.inputs, "y": examples["y"].astype(np.int32)}, rows)
        self.problem = reference.softmax_regression(self.inputs.astype(np.float64), examples["y"], CLASSES)
        self.sizes = np.array([len(r) for r in rows])
        self.start = np.random.default_rng(seed).normal(size=self.problem.size) * 0.1
        self.start = flatten(unflatten(self.start, dtype))  # what the dtype holds of it
        keys = jax.random.split(jax.random.key(seed + 1), rounds)
        self.cohorts = cohorts or [np.asarray(sample_cohort(k, POPULATION, COHORT)) for k in keys]
        draw = jax.vmap(jax.vmap(lambda t, m: client_batches(self.key, t, self.data, m, work), (None, 0)))
        drawn = jax.tree.map(np.asarray, jax.jit(draw)(jnp.arange(rounds), jnp.asarray(np.array(self.cohorts))))
        self.batches = [
            {
                int(client): [drawn.rows[t, s, k][drawn.mask[t, s, k]] for k in range(drawn.num_steps[t, s])]
                for s, client in enumerate(cohort)
            }
            for t, cohort in enumerate(self.cohorts)
        ]

    def package(self, algorithm, round_fn=None):
        """States and infos of a run; ``round_fn`` may be the compiled round of an algorithm with other rates."""
        state = algorithm.init(unflatten(self.start, self.dtype))
        round_fn = round_fn or jax.jit(algorithm.round)
        states, infos = [state], []
        for cohort in self.cohorts:
            state, info = round_fn(self.key, state, Cohort(data=self.data, client_ids=jnp.asarray(cohort)))
            states.append(state)
            infos.append(info)
        return states, infos

    def baseline(self, method, **settings):
        """A run of the oracle of baselines."""
        order, offsets = np.asarray(self.data.order), np.asarray(self.data.offsets)
        return baselines.run(
            self.problem.gradient,
            self.problem.loss,
            self.start,
            self.cohorts,
            self.batches,
            self.sizes,
            method=method,
            client_rows={m: order[offsets[m] : offsets[m + 1]] for m in range(POPULATION)},
            **settings,
        )

    def reference(self, **settings):
        """A run of FedHyper's oracle."""
        return reference.run(self.problem.gradient, self.start, self.cohorts, self.batches, self.sizes, **settings)


DUELS = {}


def cached_duel(dtype, work, ragged):
    """The same federation, cohorts and batches for all tests of one kind of work."""
    if (dtype, work) not in DUELS:
        DUELS[dtype, work] = Duel(ragged, dtype, work)
    return DUELS[dtype, work]
