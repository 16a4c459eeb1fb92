"""Golden runs: what every method and the usual compositions compute, kept while code moves, compared bit for bit.

    python -m tests.house.golden record /tmp/golden.npz     # before
    python -m tests.house.golden check /tmp/golden.npz      # after: says what differs, and where first

Six rounds on the ragged federation of the tests in float64. Bits depend on the machine and on JAX's version, so the
file is made afresh where it is needed and not kept in the repository.
"""

import os
import sys

from experiments.xla_flags import SIMPLE_LOOPS, as_flags

# Without fused multiply-add: which products are fused with which sums depends on how XLA cuts a program into loops, and
# another cut, of the same operations in the same order, would change last bits.
os.environ["XLA_FLAGS"] = as_flags("cpu_max_isa=AVX", "backend_optimization_level=0", *SIMPLE_LOOPS)

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedhyper_jax as fh
from fedhyper_jax import data

ROUNDS, COHORT, POPULATION = 6, 6, 20
MOMENTUM = optax.sgd(1.0, momentum=0.9)

COMPOSITIONS = {
    "G+SL": {},
    "G+CL": {},
    "SL+CL": {},
    "G+SL+CL": {},
    "G+CL ": {"strategy": "sequential"},
    "G+CL  ": {"strategy": "chunked(2)"},
    "fedprox+G": {},
    "fedprox+G+SL": {},
    "scaffold+fedexp": {"weighting": "uniform"},
    "fedprox+scaffold": {"strategy": "chunked(4)"},
    "fednova+G": {"client_optimizer": MOMENTUM, "local_rate": 0.01},
    "fednova+fedprox": {},
    "fednova+fedexp": {},
    "fedadam+G": {},
    "fedadam+G ": {"inner_product": "applied"},
    "fathom+CL": {},
    "fathom+fedexp": {},
    "decay_local+CL": {"schedule_rounds": 20},
    "feddyn+SL": {"weighting": "uniform"},
    "delta_sgd+fedprox": {},
    "scaffold+SL": {"client_optimizer": MOMENTUM, "local_rate": 0.01},
    "scaffold+CL": {},
    "fedcm+fedyogi": {},
    "mime_lite+G": {},
    "CL": {"client_rates": "warm", "hyper_rate": 0.02},
    "SL+CL ": {"client_rates": "warm", "hyper_rate": 0.02},
    "CL ": {"client_rates": "per_client", "hyper_rate": 0.02},
    "CL  ": {"global_weight": 0.0},
    "G": {"server_optimizer": optax.adam(0.01)},
}


def federation():
    """As the fixture of the tests: 20 clients of 1 to 40 examples, 5 features, 3 classes."""
    rng = np.random.default_rng(7)
    sizes = np.concatenate([[1, 2, 40], rng.integers(3, 25, 17)])
    labels = rng.integers(0, 3, sizes.sum())
    inputs = rng.normal(size=(sizes.sum(), 5)) + np.eye(5)[labels]
    rows = np.split(rng.permutation(sizes.sum()), np.cumsum(sizes)[:-1])
    return data.pack({"x": inputs, "y": labels.astype(np.int32)}, rows)


def loss_fn(params, batch):
    """Softmax regression."""
    logits = batch["x"] @ params["weights"] + params["bias"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


def played(name, clients, work, settings):
    """Named arrays of a run: parameters, rates, states and records of every round."""
    settings = {"local_rate": 0.05, "population": POPULATION, **settings}
    algorithm = fh.make_method(name.strip(), loss_fn, work=work, **settings)
    params = {"weights": 0.1 * jax.random.normal(jax.random.key(5), (5, 3)), "bias": jnp.zeros(3)}
    state, round_fn, key = algorithm.init(params), jax.jit(algorithm.round), jax.random.key(0)
    found = {}

    def keep(where, tree):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            found[where + jax.tree_util.keystr(path)] = np.asarray(leaf)

    for number in range(ROUNDS):
        ids = data.sample_cohort(jax.random.fold_in(jax.random.key(1), number), POPULATION, COHORT)
        state, info = round_fn(key, state, data.Cohort(data=clients, client_ids=ids))
        for field, value in info._asdict().items():
            found[f"{number}/info/{field}"] = np.asarray(value)
        keep(f"{number}/params", state.params)
        keep(f"{number}/global_rate", state.global_rate.rate)
        keep(f"{number}/local_rate", state.local_rate.rate)
    keep("end/pseudo_gradient", state.pseudo_gradient)
    keep("end/server_optimizer", state.server_optimizer)
    keep("end/terms", state.terms)
    keep("end/clients", state.clients)
    keep("end/evaluated", algorithm.evaluated_params(state))
    return found


def all_runs():
    """Every method, then the compositions, by works."""
    clients = federation()
    works = {"epochs": data.local_epochs(2, 8), "steps": data.local_steps(5, 6)}
    cases = [(f"{name}/epochs", name, works["epochs"], {}) for name in fh.methods.METHODS]
    cases += [(f"{name}/composed", name, works["epochs"], settings) for name, settings in COMPOSITIONS.items()]
    cases += [(f"{name}/steps", name, works["steps"], {}) for name in ("G+SL+CL", "scaffold", "feddyn", "fedexp")]
    runs = {}
    for label, name, work, settings in cases:
        runs |= {f"{label}//{key}": array for key, array in played(name, clients, work, settings).items()}
        jax.clear_caches()
    return runs


def main(action, file):
    """Records, or checks and says what differs."""
    with jax.enable_x64(True):
        runs = all_runs()
    if action == "record":
        np.savez_compressed(file, **{key.replace("/", "|"): array for key, array in runs.items()})
        print(f"{len(runs)} arrays recorded")
        return 0
    with np.load(file) as stored:
        golden = {key.replace("|", "/"): stored[key] for key in stored.files}
    known = {name.split("//")[0] for name in runs}
    differing = {}
    for key, expected in golden.items():
        case = key.split("//")[0]
        if case not in known:
            differing.setdefault(case, "not played any more")
        elif key not in runs or runs[key].dtype != expected.dtype:
            differing.setdefault(case, f"{key}: missing, or of another dtype")
        elif not np.array_equal(runs[key], expected, equal_nan=expected.dtype.kind == "f"):
            difference = np.max(np.abs(np.asarray(runs[key], float) - np.asarray(expected, float)))
            differing.setdefault(case, f"{key} by {difference:.2g}")
    for case, where in differing.items():
        print(f"{case} differs, first in {where}")
    print(f"{len(golden)} arrays of {len({k.split('//')[0] for k in golden})} runs: {len(differing)} runs differ")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
