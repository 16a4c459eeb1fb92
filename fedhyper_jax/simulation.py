"""Whole runs: `simulate`, one pure scan over rounds, and `run`, a host loop over such scans with callbacks."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from fedhyper_jax import _random, _validate
from fedhyper_jax.base import FederatedAlgorithm, PyTree, RoundInfo, ServerState
from fedhyper_jax.cores import watch_idle_cores
from fedhyper_jax.data.cohorts import Cohort, check_cohort_size, sample_cohort
from fedhyper_jax.data.federated import ClientData
from fedhyper_jax.evaluation import Evaluation, EvaluationData
from fedhyper_jax.rates import check_horizon


class History(NamedTuple):
    """What a run observed; every leaf has a leading axis of rounds."""

    info: RoundInfo
    evaluation: dict[str, Array]  # of the parameters after the round; NaN where not evaluated
    evaluated: Bool[Array, " rounds"]


def simulate(
    algorithm: FederatedAlgorithm,
    key: Array,
    state: ServerState,
    data: ClientData,
    *,
    rounds: int,
    cohort_size: int,
    evaluate: Evaluation | None = None,
    evaluation_data: EvaluationData | None = None,
    eval_every: int = 1,
    first_round: int | Array | None = None,
    total_rounds: int | Array | None = None,
    donate: bool = False,
) -> tuple[ServerState, History]:
    """Runs rounds as one compiled ``lax.scan``. Pure: jit it, vmap it over keys and states.

    Args:
      algorithm: the pair (init, round).
      key: key of the run; cohorts and batches are derived from it, the round number and client ids.
      state: from ``algorithm.init(params)``, or of an earlier call.
      data: the federated data set.
      rounds: number of rounds to run.
      cohort_size: clients a round, drawn uniformly without replacement.
      evaluate: see `evaluation.make_evaluation`.
      evaluation_data: its data.
      eval_every: evaluate after every so many rounds, and after the last of all.
      first_round: number of the first of these rounds, for `eval_every`; ``state.round`` if None, or 0 where that is
        traced. An argument of its own, since under vmap ``state.round`` is batched and every round would evaluate.
      total_rounds: length of the whole run; first_round + rounds if None.
      donate: give the memory of ``state`` to the result; the arrays of ``state`` are gone afterwards. Worth it where
        clients keep large rows.

    Returns:
      The last state and the `History`.

    Raises:
      ValueError: numbers that are not ≥ 1, a cohort larger than the population, a schedule shorter than the run, a
        ``first_round`` that is not the state's.

    Example:
      >>> import jax, numpy as np
      >>> from fedhyper_jax.algorithms import fedhyper
      >>> from fedhyper_jax.data import local_epochs, pack
      >>> data = pack({"x": np.array([[1.0], [3.0]])}, [np.array([0]), np.array([1])])
      >>> def loss_fn(w, batch): return 0.5 * ((w - batch["x"]) ** 2).sum(axis=1)
      >>> algorithm = fedhyper(loss_fn, "G+SL", work=local_epochs(1, batch_size=1), local_rate=0.05)
      >>> state, history = simulate(
      ...     algorithm, jax.random.key(0), algorithm.init(jax.numpy.zeros(1)), data, rounds=60, cohort_size=2)
      >>> bool(abs(state.params[0] - 2.0) < 0.05), history.info.local_rate.shape
      (True, (60,))
    """
    first_round = _first_round(state) if first_round is None else first_round
    total_rounds = first_round + rounds if total_rounds is None else total_rounds
    _check_run(state, data, rounds, cohort_size, evaluate, evaluation_data, eval_every, first_round, total_rounds)
    return (_simulate_in_place if donate else _simulate)(
        algorithm,
        key,
        state,
        data,
        evaluation_data,
        jnp.asarray(first_round, jnp.int32),
        jnp.asarray(total_rounds, jnp.int32),
        rounds=rounds,
        cohort_size=cohort_size,
        evaluate=evaluate,
        eval_every=eval_every,
    )


def _scan_rounds(
    algorithm,
    key,
    state,
    data,
    evaluation_data,
    first_round,
    total_rounds,
    *,
    rounds,
    cohort_size,
    evaluate,
    eval_every,
):
    def one_round(state, number):
        state, info = _round(algorithm, key, state, data, cohort_size)
        done = number + 1
        evaluated = (done % eval_every == 0) | (done == total_rounds)
        values = {}
        if evaluate is not None:
            skipped = _not_evaluated(evaluate, state.params, evaluation_data)
            values = lax.cond(
                evaluated,
                lambda state: evaluate(algorithm.evaluated_params(state), evaluation_data),
                lambda _: skipped,
                state,
            )
        return state, History(info=info, evaluation=values, evaluated=evaluated & (evaluate is not None))

    return lax.scan(one_round, state, first_round + jnp.arange(rounds, dtype=jnp.int32))


_STATIC = ("algorithm", "rounds", "cohort_size", "evaluate", "eval_every")
_simulate = jax.jit(_scan_rounds, static_argnames=_STATIC)
_simulate_in_place = jax.jit(_scan_rounds, static_argnames=_STATIC, donate_argnames="state")


def _not_evaluated(evaluate: Evaluation, params, evaluation_data) -> dict[str, Array]:
    shapes = jax.eval_shape(evaluate, params, evaluation_data)
    return jax.tree.map(lambda shape: jnp.full(shape.shape, jnp.nan, shape.dtype), shapes)


def _first_round(state: ServerState) -> int:
    return 0 if _validate.is_traced(state.round) else int(state.round)


def _check_run(
    state, data, rounds, cohort_size, evaluate, evaluation_data, eval_every, first_round, total_rounds
) -> None:
    """What `simulate` refuses."""
    _validate.positive_integer(rounds=rounds, eval_every=eval_every)
    check_cohort_size(cohort_size, data.population)
    if (evaluate is None) != (evaluation_data is None):
        raise ValueError("give both evaluate and evaluation_data, or neither")
    if not _validate.is_traced(first_round, state.round) and int(first_round) != int(state.round):
        raise ValueError(
            f"first_round is {int(first_round)}, but the state's next round is {int(state.round)}; leave it out"
        )
    if not _validate.is_traced(total_rounds):
        check_horizon(state.global_rate, int(total_rounds), name="global_rate")
        check_horizon(state.local_rate, int(total_rounds), name="local_rate")


def _round(algorithm, key, state, data, cohort_size):
    cohort_key, _ = _random.round_keys(key, state.round)
    cohort = Cohort(data=data, client_ids=sample_cohort(cohort_key, data.population, cohort_size))
    return algorithm.round(key, state, cohort)


class Progress(NamedTuple):
    """What a callback of `run` sees after each chunk of rounds."""

    first_round: int  # number of the chunk's first round
    rounds_done: int
    total_rounds: int
    state: PyTree  # after the chunk; its memory is the next chunk's, so copy what is to be kept
    history: History  # of the chunk, as NumPy arrays
    seconds: float  # the chunk took, compilation included in the first


Callback = Callable[[Progress], Any]
Advance = Callable[..., tuple[PyTree, History]]
"""``advance(state, first_round=…, rounds=…, total_rounds=…) -> (state, history)``."""


def run(
    algorithm: FederatedAlgorithm,
    key: Array,
    state: ServerState,
    data: ClientData,
    *,
    rounds: int,
    cohort_size: int,
    evaluate: Evaluation | None = None,
    evaluation_data: EvaluationData | None = None,
    eval_every: int = 1,
    rounds_per_chunk: int = 10,
    callbacks: Sequence[Callback] = (),
    compiles: bool = True,
) -> tuple[ServerState, History]:
    """Runs rounds chunk by chunk from the host, calling back after each chunk; the same numbers as `simulate`.

    A state of an earlier run goes on with its own next round.

    Args:
      algorithm, key, state, data, rounds, cohort_size, evaluate, evaluation_data, eval_every: as in `simulate`.
      rounds_per_chunk: rounds per compiled call; between calls the host sees the history.
      callbacks: each called with a `Progress` after every chunk.
      compiles: False runs every round eagerly, as the strategy 'debug' needs; errors then name the round.

    Returns:
      The last state and the whole `History`, as NumPy arrays.

    Raises:
      ValueError: as `simulate`.
    """
    settings = {
        "cohort_size": cohort_size,
        "evaluate": evaluate,
        "evaluation_data": evaluation_data,
        "eval_every": eval_every,
    }
    _validate.positive_integer(rounds=rounds, rounds_per_chunk=rounds_per_chunk)
    if compiles:
        state = jax.tree.map(jnp.copy, state)  # the caller's stays whole
    advance = functools.partial(simulate, donate=True) if compiles else _simulate_eagerly
    return run_chunks(
        lambda state, **chunk: advance(algorithm, key, state, data, **settings, **chunk),
        state,
        first_round=_first_round(state),
        rounds=rounds,
        rounds_per_chunk=rounds_per_chunk if compiles else 1,
        callbacks=[*callbacks, watch_idle_cores()] if compiles else callbacks,
    )


def run_chunks(
    advance: Advance,
    state: PyTree,
    *,
    first_round: int,
    rounds: int,
    rounds_per_chunk: int,
    callbacks: Sequence[Callback],
    axis: int = 0,
) -> tuple[PyTree, History]:
    """The host loop behind `run`, for any ``advance``; ``axis`` is the axis of rounds in its history."""
    pieces = []
    last_round = first_round + rounds
    for first in range(first_round, last_round, rounds_per_chunk):
        start = time.perf_counter()
        count = min(rounds_per_chunk, last_round - first)
        state, history = advance(state, first_round=first, rounds=count, total_rounds=last_round)
        history = jax.tree.map(np.asarray, history)  # waits for the device
        pieces.append(history)
        progress = Progress(first, first + count, last_round, state, history, time.perf_counter() - start)
        for callback in callbacks:
            callback(progress)
    return state, jax.tree.map(lambda *parts: np.concatenate(parts, axis=axis), *pieces)


class RoundError(RuntimeError):
    """An error inside a round that ran without jit; the message names the round, `__cause__` is the error itself."""


def _simulate_eagerly(
    algorithm,
    key,
    state,
    data,
    *,
    rounds,
    cohort_size,
    evaluate,
    evaluation_data,
    eval_every,
    first_round,
    total_rounds,
):
    _check_run(state, data, rounds, cohort_size, evaluate, evaluation_data, eval_every, first_round, total_rounds)
    pieces = []
    for number in range(first_round, first_round + rounds):
        try:
            state, info = _round(algorithm, key, state, data, cohort_size)
        except Exception as error:
            raise RoundError(f"round {number}: {error}") from error
        evaluated = evaluate is not None and ((number + 1) % eval_every == 0 or number + 1 == total_rounds)
        values = {}
        if evaluate is not None:
            run_or_skip = evaluate if evaluated else functools.partial(_not_evaluated, evaluate)
            values = run_or_skip(algorithm.evaluated_params(state), evaluation_data)
        pieces.append(History(info=info, evaluation=values, evaluated=jnp.asarray(evaluated)))
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *pieces)
