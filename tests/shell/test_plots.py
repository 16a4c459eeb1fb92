import json

import matplotlib.image
import pytest

from fedhyper_jax.shell.config import CompareConfig, ConfigError, RunConfig
from fedhyper_jax.shell.plots import plot_folder
from fedhyper_jax.shell.records import append_records, prepare_folder

RUN_PLOTS = {"accuracy", "global_rate", "local_rates", "inner_product", "clipped_share", "overview"}


def names(paths):
    for path in paths:
        height, width = matplotlib.image.imread(path).shape[:2]
        assert height > 300 and width > 600, path
    return {path.stem for path in paths}


def test_plots_of_a_run_come_back_from_its_records(run_folder):
    before = sorted(path.name for path in (run_folder / "plots").iterdir())
    for path in (run_folder / "plots").iterdir():
        path.unlink()
    assert names(plot_folder(run_folder)) == RUN_PLOTS
    assert sorted(path.name for path in (run_folder / "plots").iterdir()) == before


def test_plots_of_a_comparison(compare_folder):
    assert names(plot_folder(compare_folder)) == {"overview", "rate_0.02", "rate_0.5"}


def bare(**fields):
    keys = ("accuracy", "global_rate", "local_rate", "client_rate_min", "client_rate_median", "client_rate_max")
    nothing = dict.fromkeys((*keys, "inner_product", "global_clipped_share", "local_clipped_share"))
    counts = dict.fromkeys(
        ("global_rate_updates", "global_rate_clipped", "local_rate_updates", "local_rate_clipped"), 0
    )
    return {**nothing, **counts, **fields}


def test_a_run_in_which_nothing_is_finite_can_be_drawn(tmp_path):
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


def test_a_configuration_of_another_version_does_not_hinder(run_folder, tmp_path):
    (tmp_path / "config.toml").write_text('command = "run"\n[later]\nkey = 1\n')
    (tmp_path / "metrics.jsonl").write_text((run_folder / "metrics.jsonl").read_text())
    assert names(plot_folder(tmp_path)) == RUN_PLOTS


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        plot_folder(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"round": 0}) + "\n")
    with pytest.raises(ConfigError, match="is not a run folder"):
        plot_folder(tmp_path)
