"""Several jobs, each in a process of its own, into one table and one JSON file; what `fedhyper bench` does."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedhyper_jax import _validate
from fedhyper_jax.base import ROUND_NUMBERS
from fedhyper_jax.shell.bench.jobs import JOBS
from fedhyper_jax.shell.bench.measure import BASELINE, REMARKED, check_settings, machine, measure
from fedhyper_jax.shell.files import written_whole

Results = dict[str, Any]


def bench(
    jobs: Sequence[str] = (),
    *,
    methods: Sequence[str] = ("fedavg", "G", "SL", "CL"),
    cohort_size: int | None = None,
    strategy: str | None = None,
    rounds: int | None = None,
    repeats: int = 7,
    processes: int | None = None,
    out: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Results:
    """Measures jobs one after the other.

    A single job runs in this process. Several run in a process each (or in several, pinned to a core each), so that
    neither memory nor caches of one are another's; where this is one process of several, they run here in turn. A job
    that cannot run (missing data) is reported in its place; the others run.

    Args:
      jobs: keys of `JOBS`; all if empty.
      methods, cohort_size, strategy, rounds, repeats: as in `measure`.
      processes: for each of several jobs; one a core if None.
      out: JSON file, written as a whole after each job; where this is one process of several, by the first.
      report: called with a line before each job.

    Returns:
      ``command``, ``environment``, ``machine``, ``settings`` and ``jobs``: what `measure` returned, or the name and
      ``error``.

    Raises:
      ValueError: unknown jobs, or one named twice; whatever `measure` refuses; an ``out`` that is no file of ours.

    Example:
      >>> bench(["mpl"])
      Traceback (most recent call last):
      ValueError: unknown job 'mpl'; did you mean mlp? known: ...
    """
    from fedhyper_jax.shell.records import environment  # and with it the command line's libraries, of no use elsewhere

    settings = {"cohort_size": cohort_size, "strategy": strategy, "rounds": rounds, "repeats": repeats}
    jobs = check_bench(jobs, methods=methods, **settings, out=out)
    settings = {"methods": list(methods), **settings}
    results: Results = {
        "command": "bench",
        "environment": environment(),
        "machine": machine(),
        "settings": settings,
        "jobs": [],
    }
    for name in jobs:
        job = JOBS[name]
        job = job if cohort_size is None else job._replace(cohort_size=cohort_size)
        report(f"{name}: {job.description}")
        try:
            if len(jobs) == 1 or jax.process_count() > 1:
                measured = measure(job, **settings)
            else:
                measured = _in_own_process(name, settings, processes)
        except (ValueError, OSError, ImportError) as error:
            measured = {"job": name, "error": " ".join(str(error).split())}
        results["jobs"].append(measured)
        if out is not None and jax.process_index() == 0:
            _write(pathlib.Path(out), results)
    return results


def check_bench(
    jobs: Sequence[str],
    *,
    methods: Sequence[str],
    cohort_size: int | None = None,
    strategy: str | None,
    rounds: int | None,
    repeats: int,
    out: str | os.PathLike[str] | None,
) -> list[str]:
    """The jobs that `bench` would measure; raises ValueError for what it would refuse. Nothing is loaded or written."""
    jobs = list(jobs) or list(JOBS)
    for name in jobs:
        _validate.one_of(JOBS, job=name)
    if len(set(jobs)) < len(jobs):
        raise ValueError(f"jobs must be different names, got {jobs}; name each once")
    check_settings(methods, cohort_size=cohort_size, strategy=strategy, rounds=rounds, repeats=repeats)
    if out is not None:
        _check_out(pathlib.Path(out))
    return jobs


def _in_own_process(name: str, settings: dict[str, Any], processes: int | None) -> dict[str, Any]:
    """The result of `measure` for one job, in a new interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "bench.json"
        options = ["--methods", *settings["methods"], "--repeats", str(settings["repeats"]), "--quiet"]
        for option in ("cohort_size", "strategy", "rounds"):
            if settings[option] is not None:
                options += [f"--{option.replace('_', '-')}", str(settings[option])]
        if processes is not None:
            options += ["--processes", str(processes)]
        # A program read back from JAX's cache would seem to compile at once.
        environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-m", "fedhyper_jax.shell.cli", "bench", name, *options, "--out", str(out)]
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
        )
        if not out.is_file():
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise OSError(last.removeprefix("fedhyper: error: "))
        (measured,) = json.loads(out.read_text(encoding="utf-8"))["jobs"]
    return measured


def _check_out(out: pathlib.Path) -> None:
    """Raises ValueError unless ``out`` is new or an earlier result."""
    if out.is_dir():
        raise ValueError(f"out must be a file, got the folder {out}; name a file in it, e.g. {out / 'bench.json'}")
    if out.exists():
        try:
            ours = json.loads(out.read_text(encoding="utf-8")).get("command") == "bench"
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise ValueError(f"out is {out}, which `fedhyper bench` did not write; choose another file")


def _write(out: pathlib.Path, results: Results) -> None:
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with written_whole(out) as file:
        file.write(json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def print_bench(results: Results, console: Console | None = None) -> None:
    """Prints the table of some results.

    Args:
      results: of `bench`.
      console: where to; standard output if None.
    """
    console = console or Console()
    for job in results["jobs"]:
        console.print(Text(f"{job['job']}: {job.get('description', 'not measured')}", style="bold"))
        if "error" in job:
            console.print(Text(job["error"]))
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("method")
        for title in ("compile", "client-steps/s", "rounds/s", "GFLOP/s", "cost"):
            table.add_column(title, justify="right")
        for method in job["methods"]:
            table.add_row(*(Text(cell) for cell in _cells(method)))
        console.print(table)
        memory, flops = job["memory_mib"]["peak"], job["flops_per_client_step"]
        facts = [
            f"strategy {job['strategy']['used']}",
            f"{job['cohort_size']:,} of {job['population']:,} clients a round",
            f"{job['client_steps_per_round']:,.0f} client-steps a round",
            f"{job['repeats']} × {job['rounds_per_program']} rounds",
            "peak memory " + ("unknown" if memory is None else f"{memory:,.0f} MiB"),
            "operations a step " + ("unknown" if flops is None else f"{flops / 1e6:,.3g} MFLOP"),
            f"matrix products {job['gigaflops_ceiling']:,.0f} GFLOP/s",
        ]
        if job["processes"] > 1:
            facts.append(f"{job['processes']} processes")
        totals = {name: sum(method[name] for method in job["methods"]) for name in REMARKED}
        facts += [f"{total} {ROUND_NUMBERS[name].remark}" for name, total in totals.items() if total]
        console.print(Text("; ".join(facts)), "")
    vectors, versions = results["machine"]["vectors"], results["environment"]
    console.print(
        Text(
            f"{results['machine']['cores']} cores, {vectors}; JAX {versions['jax']} on {versions['device']}. Medians, "
            "below them minimum and maximum, and below GFLOP/s the share of this machine's own matrix products; cost "
            "is a round's wall-clock time over FedAvg's in the same repeat."
        )
    )


def _cells(method: dict[str, Any]) -> list[str]:
    steps, flops, cost = method["client_steps_per_second"], method["gigaflops"], method["cost_over_fedavg"]
    relative = "–"
    if cost is not None and method["method"] != BASELINE:
        median, low, high = (f"{100 * cost['wall'][name]:+.1f}" for name in ("median", "min", "max"))
        relative = f"{median} %\n{low} – {high} %"
    return [
        method["method"],
        f"{method['compile_seconds']:.1f} s",
        f"{_number(steps['median'])}\n{_number(steps['min'])} – {_number(steps['max'])}",
        f"{method['rounds_per_second']['median']:.3g}",
        "–" if flops is None else f"{_number(flops['median'])}\n{100 * method['share_of_ceiling']:.0f} %",
        relative,
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
