"""One job, measured: compilation apart, then rounds of each method in turn, so that a slow moment is every method's.

A *client-step* is one local step of one client on one batch; those that a mask makes no-ops do not count. All of it
works in a process that is one of several (``jax.distributed``): counts of steps are those of the whole run, memory and
matrix products are summed over the processes.
"""

import contextlib
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedhyper_jax import _validate
from fedhyper_jax.base import ROUND_NUMBERS, FederatedAlgorithm, PyTree, RoundInfo
from fedhyper_jax.data import ClientData
from fedhyper_jax.engine import (
    divided,
    fastest,
    number_of_cores,
    parse_strategy,
    place,
    simulate,
    strategy_candidates,
    time_strategies,
)
from fedhyper_jax.methods import make_method, parse_method
from fedhyper_jax.shell.bench.jobs import Job, Workload

AUTO = "auto"
REMARKED = tuple(name for name, number in ROUND_NUMBERS.items() if number.remark)
"""Numbers of a round whose totals a table remarks on where they are not 0."""
BASELINE = "fedavg"
"""The method that the others' costs are relative to."""
_LONG_RUN = 1_000_000
"""Rounds for which a strategy is chosen: so many that every candidate is worth a trial."""


def measure(
    job: Job,
    methods: Sequence[str] = (BASELINE,),
    *,
    cohort_size: int | None = None,
    strategy: str | None = None,
    rounds: int | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    r"""Times some methods on one job.

    Per method, one program of ``rounds`` rounds is compiled and run once. Then each repeat runs the program of every
    method in turn, every other repeat in reversed order. The cost of a method is, over the repeats,

    .. math:: \mathrm{median}(t_\mathrm{method} / t_\mathrm{FedAvg}) - 1.

    Args:
      job: a value of `JOBS`, or your own.
      methods: names of methods, e.g. "G+SL".
      cohort_size: clients a round; the job's own if None.
      strategy: how the cohort is run, see `cohort.parse_strategy`, or "auto" to time the usual ones; the job's own if
        None. Where there are several devices, the cohort is divided between them.
      rounds: in a timed program; the job's own if None.
      repeats: timed runs of every program.

    Returns:
      What JSON can hold: facts of the job, ``gigaflops_ceiling``, ``memory_mib`` and in ``methods``, one a method,
      ``compile_seconds``, ``round_seconds``, ``client_steps_per_second``, ``rounds_per_second`` and ``gigaflops`` (each
      median, min and max over the repeats), ``share_of_ceiling``, and ``cost_over_fedavg`` by wall clock and by the
      process' own CPU time (None without FedAvg among the methods). Totals that deserve a remark, such as
      ``left_out``, go by their names.
      ``memory_mib`` is that of the process with the data, and the most it held from then on: the programs of all the
      methods, their compilation and their states; making the data is left out (where the system can tell).

    Raises:
      ValueError: numbers that are not ≥ 1, unknown methods or strategies, a method named twice, ``debug``.
      FileNotFoundError: data that the job needs and that are not there.

    Example:
      >>> from fedhyper_jax.shell.bench.jobs import JOBS
      >>> measured = measure(JOBS["mlp"], ["fedavg", "CL"])  # doctest: +SKIP
      >>> cost = measured["methods"][1]["cost_over_fedavg"]["wall"]["median"]  # doctest: +SKIP
      >>> measure(JOBS["mlp"], ["fedavg", "CL"], repeats=0)
      Traceback (most recent call last):
      ValueError: repeats must be an integer ≥ 1, got 0; give a whole number such as 10
    """
    asked = job.strategy if strategy is None else strategy
    rounds = job.rounds if rounds is None else rounds
    check_settings(methods, cohort_size=cohort_size, strategy=asked, rounds=rounds, repeats=repeats)
    job = job if cohort_size is None else job._replace(cohort_size=cohort_size)
    start = time.perf_counter()
    workload = job.build()
    jax.block_until_ready((workload.params, workload.data))
    build_seconds = time.perf_counter() - start
    forget_peak_memory()
    memory_of_data = peak_memory()

    flops = flops_per_client_step(workload)
    strategy = _choose(job, workload, asked)
    data = place(strategy, workload.data)
    programs = [compile_rounds(job, workload, data, method, strategy, rounds) for method in methods]
    runs: list[list[_Run]] = [[] for _ in methods]
    for program in programs:  # the first run is not timed
        program.advance()
    for repeat in range(repeats):
        order = range(len(methods)) if repeat % 2 == 0 else reversed(range(len(methods)))
        for index in order:
            runs[index].append(_timed(programs[index].advance))
    memory = peak_memory()  # before the matrix products, which have their own
    ceiling = over_processes(matrix_product_ceiling())

    baseline = runs[list(methods).index(BASELINE)] if BASELINE in methods else None
    return {
        "job": job.name,
        "description": job.description,
        "strategy": {"asked": asked, "used": strategy},
        "rounds_per_program": rounds,
        "repeats": repeats,
        "processes": jax.process_count(),
        "population": workload.data.population,
        "cohort_size": job.cohort_size,
        "parameters": sum(int(leaf.size) for leaf in jax.tree.leaves(workload.params)),
        "flops_per_client_step": flops,
        "client_steps_per_round": runs[0][0].client_steps / rounds,
        "build_seconds": build_seconds,
        "gigaflops_ceiling": ceiling,
        "memory_mib": {"data": over_processes(memory_of_data), "peak": over_processes(memory)},
        "methods": [
            _summary(method, program, timed, baseline, rounds=rounds, flops=flops, ceiling=ceiling)
            for method, program, timed in zip(methods, programs, runs, strict=True)
        ],
    }


def check_settings(
    methods: Sequence[str], *, cohort_size: int | None, strategy: str | None, rounds: int | None, repeats: int
) -> None:
    """Raises ValueError for what `measure` would refuse; None is a job's own choice."""
    _validate.positive_integer(repeats=repeats)
    for name, value in {"rounds": rounds, "cohort_size": cohort_size}.items():
        if value is not None:
            _validate.positive_integer(**{name: value})
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods must be one or more different names, got {list(methods)}")
    for method in methods:
        parse_method(method)
    if strategy not in (None, AUTO) and not parse_strategy(strategy).compiles:
        raise ValueError(f"strategy {strategy!r} runs without compilation and has no speed to measure; use another")


class _Run(NamedTuple):
    wall: float  # seconds
    cpu: float  # seconds of all threads of this process
    client_steps: int
    remarked: dict[str, int]  # totals that deserve a remark, by name
    client_loss: float  # in the last round


class _Program:
    """Some rounds of one method as one compiled program, and the state that they have led to."""

    def __init__(
        self,
        compiled: Callable[..., tuple[PyTree, RoundInfo]],
        state: PyTree,
        compile_seconds: float,
        memory_mib: float | None,
    ):
        self._compiled, self._state = compiled, state
        self.compile_seconds: float = compile_seconds
        self.memory_mib: float | None = memory_mib  # of a device: arguments, results and what lies between
        self.first_loss: float | None = None

    def advance(self) -> RoundInfo:
        """Runs the next rounds to their end."""
        self._state, info = jax.block_until_ready(self._compiled(self._state))
        if self.first_loss is None:
            self.first_loss = float(info.client_loss[0])
        return info


def _algorithm(workload: Workload, method: str, strategy: str) -> FederatedAlgorithm:
    return make_method(
        method,
        workload.loss_fn,
        work=workload.work,
        local_rate=workload.local_rate,
        population=workload.data.population,
        strategy=strategy,
    )


def _choose(job: Job, workload: Workload, asked: str) -> str:
    """The strategy for the devices that there are."""
    if asked != AUTO:
        return divided(asked, jax.device_count())

    def one_round(strategy: str) -> Callable[[], Any]:
        algorithm, data = _algorithm(workload, BASELINE, strategy), place(strategy, workload.data)
        key, state = jax.random.key(1), place(strategy, algorithm.init(workload.params))
        return lambda: simulate(algorithm, key, state, data, rounds=1, cohort_size=job.cohort_size)

    candidates = strategy_candidates(job.cohort_size, jax.device_count())
    return fastest(time_strategies(candidates, one_round, rounds=_LONG_RUN))


def compile_rounds(job: Job, workload: Workload, data: ClientData, method: str, strategy: str, rounds: int) -> _Program:
    """Some rounds of a method on a job, compiled."""
    algorithm = _algorithm(workload, method, strategy)
    key, state = jax.random.key(1), place(strategy, algorithm.init(workload.params))

    def some_rounds(key, state, data):
        state, history = simulate(algorithm, key, state, data, rounds=rounds, cohort_size=job.cohort_size)
        return state, history.info

    start = time.perf_counter()
    compiled = jax.jit(some_rounds).lower(key, state, data).compile()
    seconds = time.perf_counter() - start
    return _Program(lambda state: compiled(key, state, data), state, seconds, _planned_memory(compiled))


def _planned_memory(compiled: jax.stages.Compiled) -> float | None:
    """What the compiler has planned for a program on a device, in MiB; None where it does not tell."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    parts = analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes
    return (sum(parts) - analysis.alias_size_in_bytes) / 2**20


def _timed(advance: Callable[[], RoundInfo]) -> _Run:
    wall, cpu = time.perf_counter(), time.process_time()
    info = advance()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return _Run(
        wall=wall,
        cpu=cpu,
        client_steps=int(np.sum(info.local_steps)),
        remarked={name: int(np.sum(getattr(info, name))) for name in REMARKED},
        client_loss=float(info.client_loss[-1]),
    )


def _summary(
    method: str,
    program: _Program,
    runs: Sequence[_Run],
    baseline: Sequence[_Run] | None,
    *,
    rounds: int,
    flops: float | None,
    ceiling: float,
) -> dict[str, Any]:
    speeds = [run.client_steps / run.wall for run in runs]
    gigaflops = None if flops is None else spread([speed * flops / 1e9 for speed in speeds])
    return {
        "method": method,
        "compile_seconds": program.compile_seconds,
        "round_seconds": spread([run.wall / rounds for run in runs]),
        "client_steps_per_second": spread(speeds),
        "rounds_per_second": spread([rounds / run.wall for run in runs]),
        "gigaflops": gigaflops,
        "share_of_ceiling": None if gigaflops is None else gigaflops["median"] / ceiling,
        "cost_over_fedavg": None
        if baseline is None
        else {
            clock: spread([getattr(a, clock) / getattr(b, clock) - 1 for a, b in zip(runs, baseline, strict=True)])
            for clock in ("wall", "cpu")
        },
        **{name: sum(run.remarked[name] for run in runs) for name in REMARKED},
        "client_loss": {"first": _finite(program.first_loss), "last": _finite(runs[-1].client_loss)},
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum.

    Example:
      >>> spread([3.0, 1.0, 2.0])
      {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def flops_per_client_step(workload: Workload) -> float | None:
    """Floating-point operations of one loss and gradient on one batch, as XLA counts them.

    Counted in a program of its own without loops, since XLA counts the body of a loop once however often it runs.

    Returns:
      The number, or None where the compiler reports none.

    Example:
      >>> from fedhyper_jax.shell.bench.jobs import _mlp
      >>> closed_form = 2 * 20 * (2 * 64 * 64 + 3 * 64 * 10)  # no gradient towards the inputs
      >>> bool(abs(flops_per_client_step(_mlp(clients=2)) / closed_form - 1) < 0.1)
      True
    """
    batch = {
        name: jax.ShapeDtypeStruct((workload.work.batch_size, *array.shape), array.dtype)
        for name, array in workload.example.items()
    }
    step = jax.jit(jax.value_and_grad(lambda params, batch: jnp.mean(workload.loss_fn(params, batch))))
    analysis = step.lower(workload.params, batch).compile().cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list | tuple) else analysis
    flops = (analysis or {}).get("flops", 0.0)
    return float(flops) if flops > 0 else None


def matrix_product_ceiling(sizes: Sequence[int] = (1024, 2048), repeats: int = 4) -> float:
    """The best float32 matrix product of this process, in GFLOP/s: 2n³ operations in the time of one product.

    Args:
      sizes: n of the n × n products that are tried.
      repeats: of each; the best counts.

    Example:
      >>> matrix_product_ceiling([64], repeats=1) > 0
      True
    """
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST))
    best = 0.0
    for size in sizes:
        a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.float32)
        product(a, b).block_until_ready()
        for _ in range(repeats):
            start = time.perf_counter()
            product(a, b).block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best


def peak_memory() -> float | None:
    """Most memory that this process has held at once, in MiB; None where the system does not tell.

    Linux keeps it per program; elsewhere ``getrusage`` is asked, which may count what ran before in the process.

    Example:
      >>> 10 < peak_memory() < 1e6
      True
    """
    try:
        lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def forget_peak_memory() -> None:
    """Makes `peak_memory` count from now on, where the system can do so (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def over_processes(value: float | None) -> float | None:
    """The sum of a number over the processes of the run."""
    if value is None or jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return float(np.sum(multihost_utils.process_allgather(np.float64(value))))


def machine() -> dict[str, Any]:
    """The machine, as far as a speed depends on it: cores that all processes may use, and their vector unit.

    Example:
      >>> sorted(machine())
      ['cores', 'vectors']
    """
    cores = int(over_processes(number_of_cores()))  # pinned to different ones
    try:
        words = set(pathlib.Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split())
    except OSError:
        words = set()
    names = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX", "sve": "SVE", "asimd": "NEON"}
    return {"cores": cores, "vectors": next((name for flag, name in names.items() if flag in words), "unknown")}
