import json

import matplotlib.image
import pytest

from fedhyper_jax.shell.config import CompareConfig, ConfigError, MethodConfig, RunConfig
from fedhyper_jax.shell.figures import comparison_figures, run_figures
from fedhyper_jax.shell.plots import plot_folder
from fedhyper_jax.shell.records import append_records, prepare_folder

RUN_PLOTS = {"accuracy", "global_rate", "local_rates", "inner_product", "clipped_share", "overview"}


def names(paths):
    for path in paths:
        if path.stat().st_size:  # (`drawn_quickly` leaves others empty)
            height, width = matplotlib.image.imread(path).shape[:2]
            assert height > 300 and width > 600, path
    return {path.stem for path in paths}


def bare(**fields):
    keys = ("accuracy", "global_rate", "local_rate", "client_rate_min", "client_rate_median", "client_rate_max")
    nothing = dict.fromkeys((*keys, "inner_product", "global_clipped_share", "local_clipped_share"))
    counts = dict.fromkeys(
        ("global_rate_updates", "global_rate_clipped", "local_rate_updates", "local_rate_clipped"), 0
    )
    return {**nothing, **counts, **fields}


def test_a_run_in_which_nothing_is_finite_can_be_drawn(tmp_path, drawn_quickly):
    prepare_folder(tmp_path, RunConfig())
    append_records(tmp_path, [bare(round=0), bare(round=1)])
    assert names(plot_folder(tmp_path)) == RUN_PLOTS


def test_a_killed_comparison_and_an_unknown_method_can_be_drawn(tmp_path):
    prepare_folder(tmp_path, CompareConfig())
    labels = {"initial_local_rate": 0.1, "accuracy": 0.5, "inner_product": -0.1}
    append_records(
        tmp_path,
        [
            bare(method="fedavg", seed=seed, round=t, **labels)
            for seed, rounds in ((0, 3), (1, 1))
            for t in range(rounds)
        ]
        + [bare(method="invented", seed=0, round=0, **labels)],
    )
    assert names(plot_folder(tmp_path)) == {"overview", "rate_0.1"}


def test_a_configuration_of_another_version_does_not_hinder(tmp_path, drawn_quickly):
    (tmp_path / "config.toml").write_text('command = "run"\n[later]\nkey = 1\n')
    append_records(tmp_path, evaluated_every(1, 3))
    assert names(plot_folder(tmp_path)) == RUN_PLOTS


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        plot_folder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"round": 0}) + "\n")
    with pytest.raises(ConfigError, match="is not a run folder"):
        plot_folder(tmp_path)


def evaluated_every(every, rounds, **labels):
    rates = {name: 0.1 for name in ("global_rate", "client_rate_min", "client_rate_median", "client_rate_max")}
    updates = {"local_rate_updates": 2, "local_rate_clipped": 1, "inner_product": 0.5}
    return [
        {**bare(round=t), **labels, **rates, **updates, "accuracy": 0.5 if (t + 1) % every == 0 else None}
        for t in range(rounds)
    ]


def test_plots_of_a_run_come_from_its_records(tmp_path):
    """test_readme.py draws those of a real run."""
    prepare_folder(tmp_path, RunConfig())
    append_records(tmp_path, evaluated_every(1, 3))
    paths = plot_folder(tmp_path)
    assert names(paths) == RUN_PLOTS == {path.stem for path in (tmp_path / "plots").iterdir()}
    assert all(path.stat().st_size for path in paths)


def test_plots_of_a_comparison(tmp_path, drawn_quickly):
    """Figures of one initial rate are drawn above, and where test_launch.py compares."""
    prepare_folder(tmp_path, CompareConfig())
    for method in ("fedavg", "SL"):
        for rate in (0.02, 0.5):
            for seed in (0, 1):
                labels = {"method": method, "initial_local_rate": rate, "seed": seed}
                append_records(tmp_path, evaluated_every(1, 4, **labels))
    assert names(plot_folder(tmp_path)) == {"overview", "rate_0.02", "rate_0.5"}


@pytest.mark.parametrize("method", ["G+SL", "G+CL", "fedavg", "decay_local", "fedexp"])
def test_the_curve_of_a_run_is_solid(method):
    figures = run_figures(evaluated_every(1, 4), RunConfig(method=MethodConfig(name=method)), {})
    for name, figure in figures.items():
        curves = [line for axes in figure.axes for line in axes.lines if len(line.get_xdata()) == 4]
        assert len(curves) == (5 if name == "overview" else 1)
        assert {line.get_linestyle() for line in curves} <= {"-", "None"}  # None: the points of the inner products


def test_the_curves_of_a_comparison_differ_in_dashes():
    records = [
        record
        for method in ("fedavg", "G+SL", "G")
        for record in evaluated_every(1, 4, method=method, initial_local_rate=0.1, seed=0)
    ]
    axes = comparison_figures(records, None, {})["overview"].axes[0]
    styles = {line.get_label(): line.get_linestyle() for line in axes.lines}
    assert styles == {"FedAvg": "--", "FedHyper-G+SL": "--", "FedHyper-G": "-"}


@pytest.mark.parametrize("every", [1, 5, 20])
def test_all_panels_begin_at_0_and_end_at_the_last_round(every):
    records = evaluated_every(every, 20, method="G", initial_local_rate=0.1, seed=0)
    figures = [*run_figures(records, None, {}).values(), *comparison_figures(records, None, {}).values()]
    panels = [axes for figure in figures for axes in figure.axes]
    assert len(panels) == 5 + 5 + 3 + 4
    assert {axes.get_xlim() for axes in panels} == {(0, 20.4)}


def test_one_evaluation_is_a_point():
    figures = run_figures(evaluated_every(20, 20), None, {})
    (accuracy,) = figures["accuracy"].axes[0].lines
    assert accuracy.get_xdata().tolist() == [20] and accuracy.get_marker() == "o"
    assert figures["global_rate"].axes[0].lines[0].get_marker() == "None"
