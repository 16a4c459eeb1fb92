"""Whole runs: `simulate`, one pure scan over rounds, and `run`, a host loop over such scans with callbacks."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from fedhyper_jax import _random, _validate
from fedhyper_jax.base import FederatedAlgorithm, PyTree, ServerState
from fedhyper_jax.data import ClientData, Cohort, check_cohort_size
from fedhyper_jax.engine.checks import check_run_arguments
from fedhyper_jax.engine.diagnoses import watch_idle_cores, watch_left_out
from fedhyper_jax.engine.history import History
from fedhyper_jax.parts import Participation, rates
from fedhyper_jax.parts import participation as participations
from fedhyper_jax.tasks import Evaluation, EvaluationData


def _missing() -> float:
    """What stands where nothing was evaluated; a NaN of ours would end every run under ``jax_debug_nans``."""
    return 0.0 if jax.config.jax_debug_nans else jnp.nan


class Schedule(NamedTuple):
    """How the rounds of a run go, besides the algorithm; static under ``jit``."""

    cohort_size: int
    participation: Participation
    evaluate: Evaluation | None
    eval_every: int


class Setting(NamedTuple):
    """The arrays that all rounds of a run share."""

    key: Array  # of the run
    data: ClientData
    evaluation_data: EvaluationData | None
    participation: PyTree  # its settings
    total_rounds: Array
    missing: Array  # stands where nothing was evaluated


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
    participation: Participation | None = None,
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
      cohort_size: clients a round.
      evaluate: see `evaluation.make_evaluation`.
      evaluation_data: its data.
      eval_every: evaluate after every so many rounds, and after the last of all.
      participation: how cohorts are drawn, see `fedhyper_jax.parts.participation`; uniformly if None.
      first_round: number of the first of these rounds, for `eval_every`; ``state.round`` if None, or 0 where that is
        traced. An argument of its own, since under vmap ``state.round`` is batched and every round would evaluate.
      total_rounds: length of the whole run; first_round + rounds if None.
      donate: give the memory of ``state`` to the result; the arrays of ``state`` are gone afterwards. Worth it where
        clients keep large rows.

    Returns:
      The last state and the `History`.

    Raises:
      ValueError: numbers that are not ≥ 1, a cohort larger than the population, a schedule shorter than the run, a
        ``first_round`` that is not the state's, examples that the loss or the evaluation refuses (as labels that are no
        class).

    Example:
      >>> import jax, numpy as np
      >>> from fedhyper_jax.methods import fedhyper
      >>> from fedhyper_jax.data import local_epochs, pack
      >>> data = pack({"x": np.array([[1.0], [3.0]])}, [np.array([0]), np.array([1])])
      >>> def loss_fn(w, batch): return 0.5 * ((w - batch["x"]) ** 2).sum(axis=1)
      >>> algorithm = fedhyper(loss_fn, "G+SL", work=local_epochs(1, batch_size=1), local_rate=0.05)
      >>> state, history = simulate(
      ...     algorithm, jax.random.key(0), algorithm.init(jax.numpy.zeros(1)), data, rounds=60, cohort_size=2)
      >>> bool(abs(state.params[0] - 2.0) < 0.05), history.info.local_rate.shape
      (True, (60,))
    """
    check_run_arguments(algorithm, key, state, data)
    first_round = _first_round(state) if first_round is None else first_round
    total_rounds = first_round + rounds if total_rounds is None else total_rounds
    schedule = _schedule(cohort_size, participation, evaluate, eval_every)
    _check_run(algorithm, state, data, rounds, schedule, evaluation_data, first_round, total_rounds)
    algorithm.diagnose(state, data)
    setting = _setting(key, data, evaluation_data, schedule, total_rounds)
    scan = _scan_rounds_in_place if donate else _scan_rounds
    state, history = scan(algorithm, schedule, setting, state, jnp.asarray(first_round, jnp.int32), rounds=rounds)
    if jax.config.jax_debug_nans and not _validate.is_traced(history.evaluated):
        history = history.with_gaps(jnp.where)
    return state, history


def _schedule(
    cohort_size: int, participation: Participation | None, evaluate: Evaluation | None, eval_every: int
) -> Schedule:
    return Schedule(
        cohort_size, participations.uniform() if participation is None else participation, evaluate, eval_every
    )


def _setting(key: Array, data: ClientData, evaluation_data, schedule: Schedule, total_rounds) -> Setting:
    settings = schedule.participation.init(data.population)
    return Setting(key, data, evaluation_data, settings, jnp.asarray(total_rounds, jnp.int32), jnp.asarray(_missing()))


def _one_round(
    algorithm: FederatedAlgorithm, schedule: Schedule, setting: Setting, state: ServerState, number, *, cond=lax.cond
) -> tuple[ServerState, History]:
    """A round and its evaluation, compiled or not: ``cond`` is `jax.lax.cond` or a plain choice."""
    population = setting.data.population
    cohort_key = _random.round_keys(setting.key, state.round).cohort
    ids = schedule.participation.sample(cohort_key, setting.participation, population, schedule.cohort_size)
    state, info = algorithm.round(setting.key, state, Cohort(data=setting.data, client_ids=ids))
    done, evaluate = number + 1, schedule.evaluate
    evaluated = (done % schedule.eval_every == 0) | (done == setting.total_rounds)
    values = {}
    if evaluate is not None:
        skipped = _not_evaluated(evaluate, state.params, setting)
        values = cond(
            evaluated,
            lambda state: evaluate(algorithm.evaluated_params(state), setting.evaluation_data),
            lambda _: skipped,
            state,
        )
    return state, History(info=info, evaluation=values, evaluated=evaluated & (evaluate is not None))


def _rounds(algorithm, schedule, setting, state, first_round, *, rounds):
    one_round = functools.partial(_one_round, algorithm, schedule, setting)
    return lax.scan(one_round, state, first_round + jnp.arange(rounds, dtype=jnp.int32))


_STATIC = ("algorithm", "schedule", "rounds")
_scan_rounds = jax.jit(_rounds, static_argnames=_STATIC)
_scan_rounds_in_place = jax.jit(_rounds, static_argnames=_STATIC, donate_argnames="state")


def play_rounds(
    one_round: Callable[..., Any],
    state: PyTree,
    first_round: int | Array,
    rounds: int | Array,
    *,
    most_rounds: int,
    axis: int,
) -> Any:
    """Plays rounds; how many of at most ``most_rounds`` is data, so that a chunk of any length is the same program.

    Args:
      one_round: ``one_round(state, number) -> (state, history)``, whose history has an ``axis`` of one round.
      state: before the first round.
      first_round: its number.
      rounds: how many; may be traced, as the number of the first one may.
      most_rounds: length of the history's axis; what stands there beyond ``rounds`` means nothing.
      axis: of rounds.

    Returns:
      The state after the last round, and the history.
    """
    one_round = jax.jit(one_round)  # traced once for the shapes and the loop

    def next_round(index, carry):
        state, history = carry
        state, one = one_round(state, first_round + index)
        set_row = functools.partial(lax.dynamic_update_slice_in_dim, start_index=index, axis=axis)
        return state, jax.tree.map(set_row, history, one)

    def room(leaf):
        return jnp.zeros((*leaf.shape[:axis], most_rounds, *leaf.shape[axis + 1 :]), leaf.dtype)

    _, one = jax.eval_shape(one_round, state, first_round)
    return lax.fori_loop(0, rounds, next_round, (state, jax.tree.map(room, one)))


@functools.partial(jax.jit, static_argnames=("algorithm", "schedule", "rounds_per_chunk"), donate_argnames="state")
def _chunk(algorithm, schedule, setting, state, first_round, rounds, *, rounds_per_chunk):
    def one_round(state, number):
        state, history = _one_round(algorithm, schedule, setting, state, number)
        return state, jax.tree.map(lambda leaf: leaf[None], history)

    return play_rounds(one_round, state, first_round, rounds, most_rounds=rounds_per_chunk, axis=0)


def _not_evaluated(evaluate: Evaluation, params, setting: Setting) -> dict[str, Array]:
    shapes = jax.eval_shape(evaluate, params, setting.evaluation_data)
    return jax.tree.map(lambda shape: jnp.broadcast_to(setting.missing.astype(shape.dtype), shape.shape), shapes)


def _first_round(state: ServerState) -> int:
    return 0 if _validate.is_traced(state.round) else int(state.round)


def _check_run(
    algorithm: FederatedAlgorithm,
    state: ServerState,
    data: ClientData,
    rounds: int,
    schedule: Schedule,
    evaluation_data: EvaluationData | None,
    first_round,
    total_rounds,
) -> None:
    """Raises ValueError for whatever `simulate` refuses."""
    _validate.positive_integer(rounds=rounds, eval_every=schedule.eval_every)
    check_cohort_size(schedule.cohort_size, data.population)
    schedule.participation.check(data.population, schedule.cohort_size)
    if (schedule.evaluate is None) != (evaluation_data is None):
        raise ValueError("give both evaluate and evaluation_data, or neither")
    if not _validate.is_traced(first_round, state.round) and int(first_round) != int(state.round):
        raise ValueError(
            f"first_round is {int(first_round)}, but the state's next round is {int(state.round)}; leave it out"
        )
    if not _validate.is_traced(total_rounds):
        rates.check_horizon(state.global_rate, int(total_rounds), name="global_rate")
        rates.check_horizon(state.local_rate, int(total_rounds), name="local_rate")
    check_known_data(algorithm, state, data, schedule.evaluate, evaluation_data)


def check_known_data(
    algorithm: FederatedAlgorithm,
    state: ServerState,
    data: ClientData,
    evaluate: Callable | None,
    evaluation_data: EvaluationData | None,
) -> None:
    """Raises ValueError for examples, where they are known, that training or evaluation would get silently wrong."""
    algorithm.check(state, data)
    check = getattr(evaluate, "check", None)
    if check is not None:
        check(state.params, evaluation_data)


class Progress(NamedTuple):
    """A chunk of rounds that is done, as callbacks of `run` see it.

    Attributes:
      first_round: number of the chunk's first round.
      rounds_done: of the run, with the chunk.
      total_rounds: of the run.
      state: after the chunk; its memory is the next chunk's, so keep `copied`.
      history: of the chunk, as NumPy arrays.
      seconds: the chunk took, compilation included in the first.
    """

    first_round: int
    rounds_done: int
    total_rounds: int
    state: PyTree
    history: History
    seconds: float

    def __repr__(self) -> str:
        return (
            f"<Progress: rounds {self.first_round} to {self.rounds_done - 1} of {self.total_rounds} are done, in "
            f"{self.seconds:.2g} s>"
        )

    def copied(self) -> PyTree:
        """A copy of the state, to keep beyond the callback."""
        return jax.tree.map(jnp.copy, self.state)


class StopRun(Exception):
    """Raised by a callback to end its run after the rounds that are done; `run` returns them."""


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
    participation: Participation | None = None,
    rounds_per_chunk: int = 10,
    total_rounds: int | None = None,
    callbacks: Sequence[Callback] = (),
    compiles: bool = True,
) -> tuple[ServerState, History]:
    """Runs rounds chunk by chunk from the host, calling back after each chunk; the same numbers as `simulate`.

    A state of an earlier run goes on with its own next round.

    Args:
      algorithm, key, state, data, rounds, cohort_size, evaluate, evaluation_data, eval_every, participation: as
        in `simulate`.
      rounds_per_chunk: rounds per compiled call, which is one program for them and for a shorter last one; between
        calls the host sees the history.
      total_rounds: of the whole run that these are the next rounds of, which evaluates its last one; None if these are
        its last ones.
      callbacks: each called with a `Progress` after every chunk. One that raises `StopRun` ends the run there; any
        other exception goes on to the caller, with the `History` so far as its attribute ``history`` and the state
        after it as ``state``.
      compiles: False runs every round eagerly, as the strategy 'debug' needs; errors then name the round.

    Returns:
      The last state and the whole `History`, as NumPy arrays.

    Raises:
      ValueError: as `simulate`.
    """
    check_run_arguments(algorithm, key, state, data)
    _validate.positive_integer(rounds=rounds, rounds_per_chunk=rounds_per_chunk)
    first_round = _first_round(state)
    total_rounds = first_round + rounds if total_rounds is None else total_rounds
    schedule = _schedule(cohort_size, participation, evaluate, eval_every)
    _check_run(algorithm, state, data, rounds, schedule, evaluation_data, first_round, total_rounds)
    if compiles:
        algorithm.diagnose(state, data)
        state = jax.tree.map(jnp.copy, state)  # the caller's stays whole
    setting = _setting(key, data, evaluation_data, schedule, total_rounds)

    def advance(state, *, first_round, rounds, total_rounds):
        del total_rounds  # (in the setting)
        if not compiles:
            return _eager(algorithm, schedule, setting, state, first_round, rounds=rounds)
        numbers = (jnp.asarray(number, jnp.int32) for number in (first_round, rounds))
        state, history = _chunk(algorithm, schedule, setting, state, *numbers, rounds_per_chunk=rounds_per_chunk)
        return state, jax.tree.map(lambda leaf: np.asarray(leaf)[:rounds], history)

    return run_chunks(
        advance,
        state,
        first_round=first_round,
        rounds=rounds,
        rounds_per_chunk=rounds_per_chunk if compiles else 1,
        callbacks=[watch_left_out(), *callbacks, *([watch_idle_cores()] if compiles else [])],
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

    def joined() -> History:
        return jax.tree.map(lambda *parts: np.concatenate(parts, axis=axis), *pieces)

    for first in range(first_round, last_round, rounds_per_chunk):
        start = time.perf_counter()
        count = min(rounds_per_chunk, last_round - first)
        state, history = advance(state, first_round=first, rounds=count, total_rounds=last_round)
        history = jax.tree.map(np.asarray, history)  # waits for the device
        if jax.config.jax_debug_nans:
            history = history.with_gaps(np.where)
        pieces.append(history)
        progress = Progress(first, first + count, last_round, state, history, time.perf_counter() - start)
        try:
            for callback in callbacks:
                callback(progress)
        except StopRun:
            break
        except BaseException as error:
            error.history, error.state = joined(), state
            raise
    return state, joined()


class RoundError(RuntimeError):
    """An error inside a round that ran without jit; the message names the round, `__cause__` is the error itself."""


def _eager(algorithm, schedule: Schedule, setting: Setting, state: ServerState, first_round: int, *, rounds: int):
    """As `_chunk`, without jit."""
    pieces = []
    for number in range(first_round, first_round + rounds):
        try:
            state, piece = _one_round(algorithm, schedule, setting, state, jnp.int32(number), cond=_choose)
        except Exception as error:
            raise RoundError(f"round {number}: {error}") from error
        pieces.append(piece)
    return state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *pieces)


def _choose(condition, on_true: Callable, on_false: Callable, operand: Any) -> Any:
    return on_true(operand) if condition else on_false(operand)
