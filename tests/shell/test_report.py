import dataclasses
import io

import pytest
from rich.console import Console

from fedhyper_jax.shell.report import (
    print_comparison,
    print_run,
    remarks,
    speed_up_text,
    summarise_cells,
    summarise_records,
)
from fedhyper_jax.tasks import accuracy_of_classes


def records(accuracies, **fields):
    return [
        {"round": t, "accuracy": a, "loss": 1.0, "left_out": 0, **fields} for t, a in enumerate(accuracies) if a != "-"
    ]


ACCURACY = accuracy_of_classes(10)


def run(accuracies, target=0.8, **fields):
    return summarise_records(records(accuracies, **fields), ACCURACY.with_target(target))


GOOD = [0.1, 0.5, 0.7, 0.8, 0.9, 0.9]  # the mean of three reaches 0.8 after round 5
SLOW = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def test_final_accuracy_is_the_mean_of_three_evaluations():
    summary = run([0.2, None, 0.6, 0.7, None, 0.8])
    assert summary["final_accuracy"] == pytest.approx(0.7)
    assert (summary["best_accuracy"], summary["last_accuracy"], summary["rounds"]) == (0.8, 0.8, 6)
    assert summary["rounds_to_target"] is None


@pytest.mark.parametrize("accuracies", [[0.9], [0.9, 0.9]])
def test_fewer_evaluations_than_are_averaged_reach_no_target(accuracies):
    assert run(accuracies, target=0.1)["rounds_to_target"] is None


@pytest.mark.parametrize(
    ("accuracies", "loss", "state"),
    [
        (GOOD, 1.0, "ok"),
        ([0.1] * 5, 2.3, "near chance"),
        ([0.1] * 5, None, "diverged"),
        ([0.1, 0.9, 0.5, 0.5, 0.5], 1.5, "collapsed"),
        ([0.1, 0.9, 0.5, 0.5, 0.5], 5.0, "diverged"),
        (GOOD, 9.0, "ok"),  # confident mistakes of a good model
    ],
)
def test_runs_that_went_wrong_are_named(accuracies, loss, state):
    assert run(accuracies, loss=loss)["state"] == state


def test_clipped_share_is_of_all_updates():
    fields = [
        {"local_rate_updates": 9, "local_rate_clipped": 9, "global_rate_updates": 0, "global_rate_clipped": 0},
        {"local_rate_updates": 1, "local_rate_clipped": 0, "global_rate_updates": 0, "global_rate_clipped": 0},
    ]
    summary = summarise_records([{**r, **f} for r, f in zip(records([0.1, 0.1]), fields, strict=True)], ACCURACY)
    assert (summary["global_clipped_share"], summary["local_clipped_share"]) == (None, 0.9)


def cell(cells, method):
    return next(c for c in cells if c["method"] == method)


def test_speed_up_is_a_ratio_a_bound_or_nothing():
    fast = [0.8] * 6
    cells = summarise_cells(
        {
            ("fedavg", 0.1): [run(GOOD)] * 3,
            ("G", 0.1): [run(fast), run(fast), run(SLOW)],
            ("SL", 0.1): [run(fast), run(SLOW), run(SLOW)],
        },
        rounds=6,
        measure=ACCURACY,
    )
    assert speed_up_text(cell(cells, "fedavg")["speed_up"]) == "1.0×"
    assert speed_up_text(cell(cells, "G")["speed_up"]) == "1.7×"  # 5 / 3: the median ignores the slow seed
    assert cell(cells, "G")["rounds_to_target"]["text"] == "3 (2/3 seeds)"
    assert speed_up_text(cell(cells, "SL")["speed_up"]) == "-"
    assert cell(cells, "SL")["rounds_to_target"] == {
        "median": None,
        "values": [3, None, None],
        "text": "> 6 (1/3 seeds)",
    }

    cells = summarise_cells({("fedavg", 0.1): [run(SLOW)], ("G", 0.1): [run(fast)]}, rounds=6, measure=ACCURACY)
    assert speed_up_text(cell(cells, "G")["speed_up"]) == "≥ 2.0×"
    assert speed_up_text(cell(cells, "fedavg")["speed_up"]) == "-"
    assert cell(cells, "G")["final_accuracy"]["standard_deviation"] is None

    cells = summarise_cells({("G", 0.1): [run(fast)]}, rounds=6, measure=ACCURACY)
    assert cells[0]["speed_up"] == {"value": None, "relation": None}


def test_remarks_name_seeds_and_what_was_left_out():
    cells = summarise_cells(
        {("G", 0.1): [run(GOOD, left_out=2), run([0.1] * 5, non_finite_products=1)]}, rounds=6, measure=ACCURACY
    )
    assert remarks(cells[0]) == "near chance (1/2 seeds), 12 client updates left out, 5 products not finite"


def test_the_table_shows_never_reached_and_plain_text_without_a_terminal():
    cells = summarise_cells({("fedavg", 0.1): [run(SLOW)] * 2, ("G", 0.1): [run(GOOD)] * 2}, rounds=6, measure=ACCURACY)
    summary = {"cells": cells, "data": "digits", "rounds": 6, "seeds": [0, 1], "local_rates": [0.1]}
    out = io.StringIO()
    print_comparison({**summary, "metric": dataclasses.asdict(ACCURACY)}, Console(file=out, width=80))
    text = out.getvalue()
    assert "\x1b" not in text
    assert "digits, initial local rate 0.1" in text
    assert "50.0 ± 0.0 %" in text and "> 6" in text and "≥ 1.2×" in text and "rounds to 80%" in text
    assert "remarks" not in text


@pytest.mark.parametrize(
    ("accuracies", "final", "reached"),
    [
        ([0.89], "(last evaluation)", "not measured with 1 of them"),
        ([0.2, None, 0.89], "(last 2 evaluations)", "not measured with 2 of them"),
        ([0.2, 0.3, 0.89], "(last 3 evaluations)", "> 3"),  # the mean of three is 0.46
        ([0.8, 0.8, 0.8, 0.8], "(last 3 evaluations)", "3"),
    ],
)
def test_a_run_says_over_how_many_evaluations(accuracies, final, reached):
    facts = {"method": "G", "initial_local_rate": 0.1, "data_source": "d", "metric": dataclasses.asdict(ACCURACY)}
    out = io.StringIO()
    print_run({**run(accuracies), **facts}, Console(file=out, width=160))
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.getvalue().splitlines()]
    rows = {cell[0]: cell[1] for cell in cells if len(cell) == 2}
    assert f"final accuracy {final}" in rows
    assert rows["rounds to 80% (mean of 3 evaluations)"].startswith(reached)


@pytest.mark.parametrize(("evaluations", "text"), [(1, "last evaluation of"), (2, "last 2 eval"), (5, "last 3 ")])
def test_a_comparison_says_over_how_many_evaluations(evaluations, text):
    cells = summarise_cells({("G", 0.1): [run([0.5] * evaluations)]}, rounds=evaluations, measure=ACCURACY)
    summary = {"cells": cells, "data": "digits", "rounds": evaluations, "seeds": [0], "local_rates": [0.1]}
    out = io.StringIO()
    print_comparison({**summary, "metric": dataclasses.asdict(ACCURACY)}, Console(file=out, width=300))
    assert f"Final accuracy: mean of the {text}" in out.getvalue()
