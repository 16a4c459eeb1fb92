"""Summaries of records and their tables, and the table of methods."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedhyper_jax.shell.records import Record, plain, share
from fedhyper_jax.tasks import rounds_to_target

WINDOW = 3
"""Evaluations averaged for a final accuracy and for reaching a target."""
_COUNTS = ("left_out", "non_finite_products", "bytes_up", "bytes_down", "local_steps", "examples")


def summarise_records(records: Sequence[Record], target: float, num_classes: int) -> dict[str, Any]:
    """What one run came to.

    Args:
      records: of one run, in order of rounds.
      target: accuracy to reach.
      num_classes: for telling a run that is no better than guessing.

    Returns:
      Rounds, final accuracy (mean of the last three evaluations) and loss (last evaluation), best accuracy, number of
      evaluations, rounds to the target (None where it was not reached, or with fewer than three evaluations), sums of
      counts and bytes, clipped shares over all updates, and ``state``: "ok", "near chance" (less than 15 % of the way
      from guessing to perfection), "collapsed" (it lost a quarter of the accuracy it once had) or "diverged" (either
      of these with a loss above twice that of guessing, or not finite).

    Example:
      >>> records = [{"round": t, "accuracy": 0.5 + t / 10, "loss": 1.0} for t in range(4)]
      >>> summary = summarise_records(records, target=0.6, num_classes=10)
      >>> round(summary["final_accuracy"], 6), summary["rounds_to_target"], summary["state"]
      (0.7, 3, 'ok')
    """
    evaluated = [record for record in records if record.get("accuracy") is not None]
    accuracies = [record["accuracy"] for record in evaluated]
    final = statistics.fmean(accuracies[-WINDOW:])
    totals = {name: sum(record.get(name) or 0 for record in records) for name in _COUNTS}
    clipped = {
        rate: share(
            sum(record.get(f"{rate}_rate_clipped") or 0 for record in records),
            sum(record.get(f"{rate}_rate_updates") or 0 for record in records),
        )
        for rate in ("global", "local")
    }
    last = records[-1]
    return {
        "rounds": len(records),
        "final_accuracy": final,
        "final_loss": evaluated[-1]["loss"],
        "best_accuracy": max(accuracies),
        "last_accuracy": accuracies[-1],
        "client_accuracy": {
            name.removeprefix("client_accuracy_"): value
            for name, value in evaluated[-1].items()
            if name.startswith("client_accuracy_")
        },
        "target_accuracy": target,
        "evaluations": len(accuracies),
        "rounds_to_target": rounds_to_target([record["round"] for record in evaluated], accuracies, target),
        "state": _state(final, max(accuracies), evaluated[-1]["loss"], num_classes),
        "last_global_rate": last.get("global_rate"),
        "last_local_rate": last.get("local_rate_median"),
        "clipped_share": clipped,
        **totals,
    }


def _state(final: float, best: float, loss: float | None, num_classes: int) -> str:
    guessing = 1 / num_classes
    chance, collapsed = final < guessing + 0.15 * (1 - guessing), final < 0.75 * best
    if (chance or collapsed) and (loss is None or loss > 2 * math.log(num_classes)):
        return "diverged"
    return "near chance" if chance else "collapsed" if collapsed else "ok"


def summarise_cells(cells: dict[tuple[str, float], list[dict[str, Any]]], rounds: int) -> list[dict[str, Any]]:
    """What the seeds of each method and initial local rate came to together.

    Args:
      cells: (method, initial local rate) -> summaries of its runs, one a seed, see `summarise_records`.
      rounds: rounds of every run.

    Returns:
      A dict per cell. Accuracy is the mean and the sample standard deviation over seeds. Rounds to the target is the
      median over seeds, where a run that never reaches it counts as infinite; None is a median of infinity. The
      speed-up is FedAvg's median over the method's, at the same initial rate: ``relation`` is "=", or "≥" where
      FedAvg's exceeds ``rounds`` and the value is a lower bound, or None where there is nothing to divide.
    """
    medians = {
        cell: statistics.median(
            [math.inf if run["rounds_to_target"] is None else run["rounds_to_target"] for run in runs]
        )
        for cell, runs in cells.items()
    }
    summaries = []
    for (method, rate), runs in cells.items():
        accuracies = [run["final_accuracy"] for run in runs]
        median, baseline = medians[method, rate], medians.get(("fedavg", rate))
        if baseline is None or math.isinf(median) or min(run["evaluations"] for run in runs) < WINDOW:
            speed_up = {"value": None, "relation": None}
        elif math.isinf(baseline):
            speed_up = {"value": rounds / median, "relation": "≥"}
        else:
            speed_up = {"value": baseline / median, "relation": "="}
        summaries.append(
            {
                "method": method,
                "initial_local_rate": rate,
                "final_accuracy": {
                    "mean": statistics.fmean(accuracies),
                    "standard_deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                    "values": accuracies,
                },
                "best_accuracy": [run["best_accuracy"] for run in runs],
                "rounds_to_target": {
                    "median": plain(float(median)),
                    "values": [run["rounds_to_target"] for run in runs],
                    "text": _rounds_text(median, runs, rounds),
                },
                "speed_up": speed_up,
                "states": [run["state"] for run in runs],
                "clipped_share": {
                    name: _mean([run["clipped_share"][name] for run in runs]) for name in ("global", "local")
                },
                "last_global_rate": [run["last_global_rate"] for run in runs],
                "last_local_rate": [run["last_local_rate"] for run in runs],
                "left_out": sum(run["left_out"] for run in runs),
                "non_finite_products": sum(run["non_finite_products"] for run in runs),
            }
        )
    return summaries


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _rounds_text(median: float, runs: list[dict[str, Any]], rounds: int) -> str:
    if min(run["evaluations"] for run in runs) < WINDOW:
        return f"not measured (< {WINDOW} evaluations)"
    reached = sum(run["rounds_to_target"] is not None for run in runs)
    text = f"> {rounds}" if math.isinf(median) else f"{median:g}"
    return text if reached in (0, len(runs)) else f"{text} ({reached}/{len(runs)} seeds)"


def speed_up_text(speed_up: dict[str, Any]) -> str:
    """As tables show it: 2.0×, ≥ 2.0× or -."""
    if speed_up["value"] is None:
        return "-"
    return f"{'≥ ' if speed_up['relation'] == '≥' else ''}{speed_up['value']:.1f}×"


def remarks(cell: dict[str, Any]) -> str:
    """What a reader should know about a cell besides its numbers; empty for a sound one."""
    states, number = cell["states"], len(cell["states"])
    parts = [
        state if states.count(state) == number else f"{state} ({states.count(state)}/{number} seeds)"
        for state in ("diverged", "collapsed", "near chance")
        if state in states
    ]
    if cell["left_out"]:
        parts.append(f"{cell['left_out']} client updates left out")
    if cell["non_finite_products"]:
        parts.append(f"{cell['non_finite_products']} products not finite")
    return ", ".join(parts)


def print_comparison(summary: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables of a comparison, one an initial local rate, and how to read them."""
    console = console or Console()
    target, rounds, seeds = summary["target_accuracy"], summary["rounds"], summary["seeds"]
    for rate in summary["local_rates"]:
        table = Table(title=f"{summary['data']}, initial local rate {rate!r}", title_justify="left")
        table.add_column("method")
        table.add_column("final accuracy", justify="right")
        table.add_column(f"rounds to {_percent(target)}", justify="right")
        table.add_column("speed-up", justify="right")
        cells = [cell for cell in summary["cells"] if cell["initial_local_rate"] == rate]
        if any(map(remarks, cells)):
            table.add_column("remarks")
        best = max(cell["final_accuracy"]["mean"] for cell in cells)
        for cell in cells:
            accuracy = cell["final_accuracy"]
            spread = accuracy["standard_deviation"]
            text = f"{100 * accuracy['mean']:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}") + " %"
            row = [
                Text(cell["method"]),
                Text(text, style="bold" if accuracy["mean"] == best else ""),
                Text(cell["rounds_to_target"]["text"]),
                Text(speed_up_text(cell["speed_up"])),
            ]
            table.add_row(*row, *([Text(remarks(cell), style="red")] if any(map(remarks, cells)) else []))
        console.print(table)
    number = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    console.print(
        f"Final accuracy: mean of the last {WINDOW} evaluations of a run; mean ± standard deviation over {number}. "
        f"Rounds to {_percent(target)}: first round at which the mean of {WINDOW} evaluations in a row reaches it; "
        f"median over seeds, never counting as infinite, “> {rounds}” where that is the median. Speed-up: "
        "FedAvg's rounds over the method's, at the same initial local rate; “≥” where FedAvg "
        "never gets there, “-” where the method does not.",
        highlight=False,
        markup=False,
    )


def print_run(summary: dict[str, Any], console: Console | None = None) -> None:
    """Prints what a run came to, and what a reader should be wary of."""
    console = console or Console()
    reached = summary["rounds_to_target"]
    table = Table(show_header=False)
    rows = {
        "method": f"{summary['method']} from local rate {summary['initial_local_rate']:g}",
        "data": summary["data_source"],
        f"final accuracy (last {WINDOW} evaluations)": f"{summary['final_accuracy']:.2%}",
        "best accuracy": f"{summary['best_accuracy']:.2%}",
        f"rounds to {_percent(summary['target_accuracy'])}": _rounds_text(
            math.inf if reached is None else reached, [summary], summary["rounds"]
        ),
        "last rates": f"global {_number(summary['last_global_rate'])}, local {_number(summary['last_local_rate'])}",
        "clipped rate updates": ", ".join(
            f"{name} {'none made' if value is None else format(value, '.0%')}"
            for name, value in summary["clipped_share"].items()
        ),
        "bytes": f"{_bytes(summary['bytes_up'])} up, {_bytes(summary['bytes_down'])} down",
    }
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    console.print(table)
    warnings = []
    if summary["state"] != "ok":
        warnings.append(f"The run is {summary['state']}: final accuracy {summary['final_accuracy']:.2%}.")
    if summary["left_out"]:
        warnings.append(f"{summary['left_out']} client updates were not finite and left out of the average.")
    if summary["non_finite_products"]:
        warnings.append(f"{summary['non_finite_products']} inner products were not finite and moved no rate.")
    for warning in warnings:
        console.print(Text(f"Note: {warning}", style="red"))


def _percent(value: float) -> str:
    return f"{100 * value:g}%"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _bytes(value: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log10(value) // 3), len(units) - 1) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {units[power]}"
