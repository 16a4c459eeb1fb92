"""Whole runs side by side: rates, hyper rates and seeds are data, so one compiled program runs the whole grid."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, Params, PyTree
from fedhyper_jax.data import ClientData
from fedhyper_jax.engine.checks import as_parameters
from fedhyper_jax.engine.diagnoses import watch_idle_cores, watch_left_out
from fedhyper_jax.engine.simulation import Callback, History, check_known_data, play_rounds, run_chunks, simulate
from fedhyper_jax.parts import rates


def sweep(
    make_algorithm: Callable[..., FederatedAlgorithm],
    settings: dict[str, Array],
    keys: Array,
    params: Params,
    data: ClientData,
    *,
    rounds: int,
    rounds_per_chunk: int | None = None,
    callbacks: Sequence[Callback] = (),
    states: PyTree | None = None,
    **simulation: Any,
) -> tuple[Params, History]:
    """Runs an algorithm for every setting and every key in one program.

    Args:
      make_algorithm: ``make_algorithm(**one_setting) -> FederatedAlgorithm``; it gets traced scalars, and whatever it
        does with them varies over the grid: rates, but also the rate of an optax server optimizer. The same function
        with other settings is not compiled again; a new one, made by calling ``lambda`` again, is.
      settings: arrays of one common length R, e.g. ``{"local_rate": jnp.array([0.001, 0.01])}``. They are checked
        here, by making each algorithm once, since traced values cannot be.
      keys: (seeds,) keys, one per run of a setting.
      params: initial parameters with a leading axis of seeds: one initialisation per key.
      data: the federated data set, shared.
      rounds: number of rounds of the whole runs.
      rounds_per_chunk: rounds per compiled call; all of them if None. A shorter call is the same program.
      callbacks: as in `simulation.run`; states and histories carry the two leading axes.
      states: go on from here: what a callback of the same sweep saw after some of its rounds, all at the same round;
        None begins. Only the rounds that are left are run. Its memory is given to the result.
      **simulation: ``cohort_size``, ``evaluate``, ``evaluation_data``, ``eval_every``, ``participation`` of `simulate`.

    Returns:
      Final parameters (those that the algorithm evaluates) and history; every leaf has leading axes (R, seeds), then
      rounds in the history.

    Raises:
      ValueError: settings of different lengths or refused by the factory; states that have no rounds left.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from fedhyper_jax.methods import fedavg
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
    lengths = {name: np.shape(values) for name, values in settings.items()}
    if not settings or len(set(lengths.values())) != 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise ValueError(f"settings must be 1-D arrays of one common length, got shapes {lengths}")
    for name, values in settings.items():
        _check_setting(name, values)
    settings = {name: jnp.asarray(values) for name, values in settings.items()}
    number = next(iter(lengths.values()))[0]
    _check_seeds(keys, params)
    params = as_parameters(params)
    rounds_per_chunk = rounds if rounds_per_chunk is None else rounds_per_chunk
    _validate.positive_integer(rounds=rounds, rounds_per_chunk=rounds_per_chunk, settings=number)
    for index in range(number):
        algorithm = make_algorithm(**{name: values[index] for name, values in settings.items()})
        state = algorithm.init(jax.tree.map(lambda p: p[0], params))
        rates.check_horizon(state.global_rate, rounds, name="global_rate")
        rates.check_horizon(state.local_rate, rounds, name="local_rate")
    check_known_data(algorithm, state, data, simulation.get("evaluate"), simulation.get("evaluation_data"))
    if states is None:
        states = _start(make_algorithm, settings, params)
    first_round = int(states.round.reshape(-1)[0])
    if not 0 <= first_round < rounds:
        raise ValueError(f"states are of round {first_round}, so none of {rounds} rounds is left; give more rounds")
    # Data are arguments of the compiled program, not constants in it.
    evaluation_data = simulation.pop("evaluation_data", None)
    static = tuple(sorted(simulation.items()))

    def advance(states, *, first_round, rounds, total_rounds):
        numbers = (jnp.asarray(number, jnp.int32) for number in (first_round, rounds, total_rounds))
        states, history = _advance(
            make_algorithm,
            states,
            settings,
            keys,
            data,
            evaluation_data,
            *numbers,
            most_rounds=rounds_per_chunk,
            static=static,
        )
        return states, jax.tree.map(lambda leaf: np.asarray(leaf)[:, :, :rounds], history)

    states, history = run_chunks(
        advance,
        states,
        first_round=first_round,
        rounds=rounds - first_round,
        rounds_per_chunk=rounds_per_chunk,
        callbacks=[watch_left_out(), *callbacks, watch_idle_cores()],
        axis=2,
    )
    return algorithm.evaluated_params(states), history


def sweep_shapes(
    make_algorithm: Callable[..., FederatedAlgorithm], settings: dict[str, Array], params: Params
) -> PyTree:
    """The shapes and types of the states of a sweep, with their two leading axes; nothing is run.

    Args:
      make_algorithm, settings, params: as in `sweep`; of ``params`` only the shapes matter.

    Returns:
      A tree of `jax.ShapeDtypeStruct`, as the states that its callbacks see.

    Example:
      >>> import jax.numpy as jnp
      >>> from fedhyper_jax.methods import fedavg
      >>> from fedhyper_jax.data import local_epochs
      >>> def make(local_rate): return fedavg(lambda w, b: w * b["x"], work=local_epochs(1, 1), local_rate=local_rate)
      >>> sweep_shapes(make, {"local_rate": jnp.array([0.1, 0.5])}, jnp.zeros(3)).params.shape
      (2, 3)
    """
    return jax.eval_shape(functools.partial(_start, make_algorithm), settings, params)


@functools.partial(jax.jit, static_argnums=0)
def _start(make_algorithm, settings, params):
    return jax.vmap(lambda setting: jax.vmap(make_algorithm(**setting).init)(params))(settings)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("most_rounds", "static"), donate_argnums=1)
def _advance(
    make_algorithm,
    states,
    settings,
    keys,
    data,
    evaluation_data,
    first_round,
    rounds,
    total_rounds,
    *,
    most_rounds,
    static,
):
    def one_round(states, number):
        def one_setting(setting, states):
            # Made inside the trace, so that a setting reaches whatever the factory does with it.
            algorithm = make_algorithm(**setting)

            def one_seed(key, state):
                return simulate(
                    algorithm,
                    key,
                    state,
                    data,
                    rounds=1,
                    first_round=number,
                    total_rounds=total_rounds,
                    evaluation_data=evaluation_data,
                    **dict(static),
                )

            return jax.vmap(one_seed)(keys, states)

        return jax.vmap(one_setting)(settings, states)

    return play_rounds(one_round, states, first_round, rounds, most_rounds=most_rounds, axis=2)


def _check_setting(name: str, values) -> None:
    """Raises ValueError for numbers of a setting that the conversion to JAX's dtype would change."""
    if isinstance(values, jax.Array):
        return
    where = f"settings[{name!r}]"
    _validate.fits(values, name=where)
    if np.asarray(values).dtype.kind == "f":
        for value in np.asarray(values)[np.isfinite(values)]:
            _validate.finite(**{where: value})  # (float32 has no rates as small as 1e-50 either)


def _check_seeds(keys: Array, params: Params) -> None:
    """Raises ValueError unless keys and parameters share a leading axis of seeds."""
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    if keys.ndim != (1 if typed else 2):
        raise ValueError(f"keys must have one axis of seeds, got shape {keys.shape}; for one seed give key[None]")
    shapes = {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    wrong = {where: shape for where, shape in shapes.items() if shape[:1] != keys.shape[:1]}
    if wrong:
        raise ValueError(
            f"params must have a leading axis of {keys.shape[0]} seeds, one initialisation per key, got shapes "
            f"{wrong}; make them by jax.vmap over the keys"
        )
