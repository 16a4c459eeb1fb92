"""Whole runs side by side: rates, hyper rates and seeds are data, so one compiled program runs the whole grid."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, Params
from fedhyper_jax.data.federated import FederatedData
from fedhyper_jax.simulation import Callback, History, run_chunks, simulate


def sweep(
    make_algorithm: Callable[..., FederatedAlgorithm],
    settings: dict[str, Array],
    keys: Array,
    params: Params,
    data: FederatedData,
    *,
    rounds: int,
    rounds_per_chunk: int | None = None,
    callbacks: Sequence[Callback] = (),
    **simulation,
) -> tuple[Params, History]:
    """Runs an algorithm for every setting and every key in one program.

    Args:
      make_algorithm: ``make_algorithm(**one_setting) -> FederatedAlgorithm``; it gets traced scalars.
      settings: arrays of one common length R, e.g. ``{"local_rate": jnp.array([0.001, 0.01])}``. They are checked
        here, by making each algorithm once, since traced values cannot be.
      keys: (seeds,) keys, one per run of a setting.
      params: initial parameters with a leading axis of seeds: one initialisation per key.
      data: the federated data set, shared.
      rounds: number of rounds.
      rounds_per_chunk: rounds per compiled call; all of them if None.
      callbacks: as in `simulation.run`; states and histories carry the two leading axes.
      **simulation: ``cohort_size``, ``evaluate``, ``evaluation_data``, ``eval_every`` of `simulation.simulate`.

    Returns:
      Final parameters and history; every leaf has leading axes (R, seeds), then rounds in the history.

    Raises:
      ValueError: settings of different lengths or refused by the factory.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from fedhyper_jax.algorithms import fedavg
      >>> from fedhyper_jax.data import local_epochs, pack
      >>> data = pack({"x": np.array([[1.0], [3.0]])}, [np.array([0]), np.array([1])])
      >>> def loss_fn(w, batch): return 0.5 * ((w - batch["x"]) ** 2).sum(axis=1)
      >>> def make(local_rate): return fedavg(loss_fn, work=local_epochs(1, batch_size=1), local_rate=local_rate)
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params, history = sweep(
      ...     make, {"local_rate": jnp.array([0.1, 0.5])}, keys, jnp.zeros((3, 1)), data, rounds=5, cohort_size=2)
      >>> params.shape, history.info.client_loss.shape
      ((2, 3, 1), (2, 3, 5))
    """
    lengths = {name: jnp.shape(values) for name, values in settings.items()}
    if not settings or len(set(lengths.values())) != 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise ValueError(f"settings must be 1-D arrays of one common length, got shapes {lengths}")
    _validate.positive_integer(rounds=rounds)
    for index in range(next(iter(lengths.values()))[0]):
        algorithm = make_algorithm(**{name: values[index] for name, values in settings.items()})

    def initial_states(setting):
        return jax.vmap(make_algorithm(**setting).init)(params)

    states = jax.jit(jax.vmap(initial_states))(settings)

    def advance(states, **chunk):
        def one(key, state):
            return simulate(algorithm, key, state, data, **simulation, **chunk)

        return jax.vmap(jax.vmap(one), in_axes=(None, 0))(keys, states)

    states, history = run_chunks(
        advance, states, rounds=rounds, rounds_per_chunk=rounds_per_chunk or rounds, callbacks=callbacks, axis=2
    )
    return states.params, history
