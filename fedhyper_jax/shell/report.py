"""Summaries of records, and their tables."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedhyper_jax.base import ROUND_NUMBERS, SHARES
from fedhyper_jax.shell.records import Record, plain, share
from fedhyper_jax.tasks import Measure, rounds_to_target

WINDOW = 3
"""Evaluations averaged for a final value and for reaching a target."""


def summarise_records(records: Sequence[Record], measure: Measure) -> dict[str, Any]:
    """A run in numbers.

    Args:
      records: of one run, in order of rounds.
      measure: the metric that its task reports first, with the target to reach.

    Returns:
      Rounds, final value of the metric (mean of the last three evaluations) and loss (last evaluation), best value,
      number of evaluations, rounds to the target (None where it was not reached, or with fewer than three evaluations),
      the totals of `RoundInfo`, clipped shares over all updates, and ``state``, see `Measure.state`. Values that are
      not finite are None.

    Example:
      >>> from fedhyper_jax.tasks import accuracy_of_classes
      >>> records = [{"round": t, "accuracy": 0.5 + t / 10, "loss": 1.0} for t in range(4)]
      >>> summary = summarise_records(records, accuracy_of_classes(10).with_target(0.6))
      >>> round(summary["final_accuracy"], 6), summary["rounds_to_target"], summary["state"]
      (0.7, 3, 'ok')
    """
    name, prefix, last = measure.name, f"client_{measure.name}_", records[-1]
    evaluated = [record for record in records if record.get(name) is not None]
    values = [record[name] for record in evaluated]
    # The last round is always evaluated: nothing there is a value that was not finite.
    final = statistics.fmean(values[-WINDOW:]) if evaluated and evaluated[-1] is last else None
    best, loss = (measure.best(values) if values else None), last.get("loss")
    totals = {
        number: sum(record.get(number) or 0 for record in records)
        for number, facts in ROUND_NUMBERS.items()
        if facts.over_rounds == "total"
    }
    reached = rounds_to_target(
        [record["round"] for record in evaluated],
        values,
        measure.target,
        window=WINDOW,
        higher_is_better=measure.higher_is_better,
    )
    return {
        "rounds": len(records),
        f"final_{name}": final,
        "final_loss": loss,
        f"best_{name}": best,
        f"last_{name}": last.get(name),
        f"client_{name}": {key.removeprefix(prefix): value for key, value in last.items() if key.startswith(prefix)},
        f"target_{name}": measure.target,
        "evaluations": len(values),
        "rounds_to_target": reached,
        "state": measure.state(final=final, best=best, loss=loss),
        **{
            f"last_{number}": last.get(number) for number, facts in ROUND_NUMBERS.items() if facts.over_rounds == "last"
        },
        **{name: share(totals[part], totals[whole]) for name, (part, whole) in SHARES.items()},
        **totals,
    }


def summarise_cells(
    cells: dict[tuple[str, float], list[dict[str, Any]]], rounds: int, measure: Measure
) -> list[dict[str, Any]]:
    """The seeds of each method and initial local rate together.

    Args:
      cells: (method, initial local rate) -> summaries of its runs, one a seed, see `summarise_records`.
      rounds: rounds of every run.
      measure: the metric that the task reports first.

    Returns:
      A dict per cell. The metric is the mean and the sample standard deviation over seeds; None where one of them ended
      at no finite value. Rounds to the target is the median over seeds, where a run that never reaches it counts as
      infinite; None is a median of infinity. The speed-up is FedAvg's median over the method's, at the same initial
      rate: ``relation`` is "=", or "≥" where FedAvg's exceeds ``rounds`` and the value is a lower bound, or None where
      there is nothing to divide.
    """
    medians = {
        cell: statistics.median(
            [math.inf if run["rounds_to_target"] is None else run["rounds_to_target"] for run in runs]
        )
        for cell, runs in cells.items()
    }
    return [
        {
            "method": method,
            "initial_local_rate": rate,
            **_together(runs, measure.name),
            "rounds_to_target": {
                "median": plain(float(medians[method, rate])),
                "values": [run["rounds_to_target"] for run in runs],
                "text": _rounds_text(medians[method, rate], runs, rounds),
            },
            "speed_up": _speed_up(medians[method, rate], medians.get(("fedavg", rate)), runs, rounds),
        }
        for (method, rate), runs in cells.items()
    ]


def _together(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Entries that need no other cell: the metric ``name``, states, last rates, shares, and totals worth a remark."""
    final = [run[f"final_{name}"] for run in runs]
    finite = None not in final
    last = [f"last_{number}" for number, facts in ROUND_NUMBERS.items() if facts.over_rounds == "last"]
    return {
        f"final_{name}": {
            "mean": statistics.fmean(final) if finite else None,
            "standard_deviation": statistics.stdev(final) if finite and len(final) > 1 else None,
            "values": final,
        },
        f"best_{name}": [run[f"best_{name}"] for run in runs],
        "evaluations": [run["evaluations"] for run in runs],
        "states": [run["state"] for run in runs],
        **{key: _mean([run[key] for run in runs]) for key in SHARES},
        **{key: [run[key] for run in runs] for key in last},
        **{number: sum(run[number] for run in runs) for number, facts in ROUND_NUMBERS.items() if facts.remark},
    }


def _speed_up(median: float, baseline: float | None, runs: list[dict[str, Any]], rounds: int) -> dict[str, Any]:
    if baseline is None or math.isinf(median) or min(run["evaluations"] for run in runs) < WINDOW:
        return {"value": None, "relation": None}
    if math.isinf(baseline):
        return {"value": rounds / median, "relation": "≥"}
    return {"value": baseline / median, "relation": "="}


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


def value_text(measure: Measure, mean: float | None, spread: float | None = None) -> str:
    """A value of a metric as tables show it: 71.0 ± 0.9 %, or 0.512 ± 0.013.

    Example:
      >>> from fedhyper_jax.tasks import accuracy_of_classes
      >>> value_text(accuracy_of_classes(10), 0.71, 0.009)
      '71.0 ± 0.9 %'
    """
    if mean is None:
        return "not finite"
    if measure.unit == "%":
        return f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}") + " %"
    return f"{mean:.4g}" + ("" if spread is None else f" ± {spread:.2g}") + (f" {measure.unit}" if measure.unit else "")


def target_text(measure: Measure) -> str:
    """The target as titles show it: 80%, or 0.6."""
    return f"{100 * measure.target:g}%" if measure.unit == "%" else f"{measure.target:.3g}{measure.unit}"


def remarks(cell: dict[str, Any]) -> str:
    """Anything that a reader should know about a cell besides its numbers; empty for a sound one."""
    states, number = cell["states"], len(cell["states"])
    parts = [
        state if states.count(state) == number else f"{state} ({states.count(state)}/{number} seeds)"
        for state in ("diverged", "collapsed", "near chance")
        if state in states
    ]
    parts += [f"{cell[name]} {facts.remark}" for name, facts in ROUND_NUMBERS.items() if facts.remark and cell[name]]
    return ", ".join(parts)


def print_comparison(summary: dict[str, Any], console: Console | None = None) -> None:
    """Prints the tables of a comparison, one an initial local rate, and how to read them."""
    console = console or Console()
    measure, rounds, seeds = Measure(**summary["metric"]), summary["rounds"], summary["seeds"]
    target = target_text(measure)
    for rate in summary["local_rates"]:
        cells = [cell for cell in summary["cells"] if cell["initial_local_rate"] == rate]
        title = f"{summary['data']}, initial local rate {rate!r}"
        console.print(_table_of(cells, measure, title=title, target=target))
    evaluations = max(number for cell in summary["cells"] for number in cell["evaluations"])
    number = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    console.print(
        f"Final {measure.title}: mean of the {_last_evaluations(evaluations)} of a run; mean ± standard deviation over "
        f"{number}. Rounds to {target}: first round at which the mean of {WINDOW} evaluations in a row reaches it; "
        f"median over seeds, never counting as infinite, “> {rounds}” where that is the median. Speed-up: "
        "FedAvg's rounds over the method's, at the same initial local rate; “≥” where FedAvg "
        "never gets there, “-” where the method does not.",
        highlight=False,
        markup=False,
    )
    if not measure.higher_is_better:
        console.print(
            f"Lower is better: the {measure.title} of guessing is {value_text(measure, measure.guessing)}.",
            highlight=False,
            markup=False,
        )


def _table_of(cells: list[dict[str, Any]], measure: Measure, *, title: str, target: str) -> Table:
    """The methods from one initial local rate, the best value in bold."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    table.add_column(f"final {measure.title}", justify="right")
    table.add_column(f"rounds to {target}", justify="right")
    table.add_column("speed-up", justify="right")
    any_remarks = any(map(remarks, cells))
    if any_remarks:
        table.add_column("remarks")
    finals = [cell[f"final_{measure.name}"] for cell in cells]
    known = [final["mean"] for final in finals if final["mean"] is not None]
    best = measure.best(known) if known else None
    for cell, final in zip(cells, finals, strict=True):
        row = [
            Text(cell["method"]),
            Text(
                value_text(measure, final["mean"], final["standard_deviation"]),
                style="bold" if known and final["mean"] == best else "",
            ),
            Text(cell["rounds_to_target"]["text"]),
            Text(speed_up_text(cell["speed_up"])),
        ]
        table.add_row(*row, *([Text(remarks(cell), style="red")] if any_remarks else []))
    return table


def print_run(summary: dict[str, Any], console: Console | None = None) -> None:
    """Prints what a run came to, and what a reader should be wary of."""
    console = console or Console()
    measure, reached = Measure(**summary["metric"]), summary["rounds_to_target"]
    final, best = (_precisely(measure, summary[f"{which}_{measure.name}"]) for which in ("final", "best"))
    table = Table(show_header=False)
    rows = {
        "method": f"{summary['method']} from local rate {summary['initial_local_rate']:g}",
        "data": summary["data_source"],
        f"final {measure.title} ({_last_evaluations(summary['evaluations'])})": final,
        f"best {measure.title}": best,
        f"rounds to {target_text(measure)} (mean of {WINDOW} evaluations)": (
            _rounds_text(math.inf if reached is None else reached, [summary], summary["rounds"])
            if summary["evaluations"] >= WINDOW
            else f"not measured with {summary['evaluations']} of them"
        ),
        "last rates": f"global {_number(summary['last_global_rate'])}, "
        f"local {_number(summary['last_client_rate_median'])}",
        "clipped rate updates": ", ".join(
            f"{name.split('_')[0]} {'none made' if summary[name] is None else format(summary[name], '.0%')}"
            for name in SHARES
        ),
        "bytes": f"{_bytes(summary['bytes_up'])} up, {_bytes(summary['bytes_down'])} down",
    }
    if not measure.higher_is_better:
        rows[f"{measure.title} of guessing"] = _precisely(measure, measure.guessing)
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    console.print(table)
    notes = [] if summary["state"] == "ok" else [f"The run is {summary['state']}: final {measure.title} {final}."]
    notes += [f"{summary[name]} {facts.note}." for name, facts in ROUND_NUMBERS.items() if facts.note and summary[name]]
    for note in notes:
        console.print(Text(f"Note: {note}", style="red"))


def _last_evaluations(number: int) -> str:
    """What a final value is the mean of, after so many evaluations."""
    return "last evaluation" if number == 1 else f"last {min(WINDOW, number)} evaluations"


def _precisely(measure: Measure, value: float | None) -> str:
    return f"{value:.2%}" if measure.unit == "%" and value is not None else value_text(measure, value)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _bytes(value: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log10(value) // 3), len(units) - 1) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {units[power]}"
