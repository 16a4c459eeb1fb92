import json
import shutil

import jax
import numpy as np
import pytest

import fedhyper_jax as fh
from fedhyper_jax.shell.config import ConfigError
from fedhyper_jax.shell.records import read_records


def test_a_run_comes_back_whole(run_folder):
    run = fh.load_run(str(run_folder))
    assert repr(run) == "<Run: G+CL on digits, 3 rounds, finished>" and run.config.run.rounds == 3
    assert run.summary == json.loads((run_folder / "summary.json").read_text())
    records = read_records(run_folder)
    assert set(run.history) == set(records[0])
    for name, values in run.history.items():
        assert values.shape == (3,)
        expected = [np.nan if record[name] is None else record[name] for record in records]
        np.testing.assert_array_equal(values, expected)
    logits = run.model.apply(run.params, np.ones((2, 8, 8, 1), np.float32))
    assert logits.shape == (2, 10) and bool(jax.numpy.isfinite(logits).all())


def test_a_comparison_comes_back_cell_by_cell(compare_folder):
    run = fh.load_run(compare_folder)
    assert repr(run) == "<Run: fedavg, SL on digits, 8 runs of 4 rounds, finished>"
    assert set(run.history) == {(m, b, s) for m in ("fedavg", "SL") for b in (0.02, 0.5) for s in (0, 1)}
    history = run.history["SL", 0.5, 1]
    np.testing.assert_array_equal(history["round"], np.arange(4))
    assert "method" not in history and run.params is None
    assert run.model.init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))


def test_an_unfinished_run_has_no_parameters_yet(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "status": "unfinished"}))
    with open(folder / "metrics.jsonl", "rb+") as file:
        file.truncate(len((folder / "metrics.jsonl").read_bytes()) - 5)
    run = fh.load_run(folder)
    assert run.params is None and run.history["round"].tolist() == [0, 1]


def test_other_folders_are_refused(run_folder, tmp_path):
    with pytest.raises(ConfigError, match="is not a run folder"):
        fh.load_run(tmp_path)
    folder = shutil.copytree(run_folder, tmp_path / "run")
    (folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"has no readable summary\.json"):
        fh.load_run(folder)
