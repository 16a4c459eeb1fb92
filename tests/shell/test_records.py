import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax.base import RoundInfo
from fedhyper_jax.engine.simulation import History
from fedhyper_jax.shell.config import ConfigError, RunConfig
from fedhyper_jax.shell.records import (
    append_records,
    history_records,
    plain,
    prepare_folder,
    read_notes,
    read_records,
    write_summary,
)


def test_an_earlier_run_is_replaced_only_on_request(tmp_path):
    folder = prepare_folder(tmp_path / "a" / "b", RunConfig())
    append_records(folder, [{"round": 0}])
    write_summary(folder, {})
    (folder / "plots").mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds a run already; choose another folder with --out, or add --overwrite"):
        prepare_folder(folder, RunConfig())
    assert read_records(folder) == [{"round": 0}]
    prepare_folder(folder, RunConfig(), overwrite=True, preset="demo")
    assert sorted(path.name for path in folder.iterdir()) == ["config.toml", "notes.txt"]
    assert read_notes(folder) == {"command": "run", "preset": "demo"}


@pytest.mark.parametrize("config", [None, "", "[tool]\nname = 'x'", "command = 'paint'", "command = ["])
def test_a_folder_that_is_no_run_folder_is_never_touched(tmp_path, config):
    (tmp_path / "metrics.jsonl").write_text("mine")
    if config is not None:
        (tmp_path / "config.toml").write_text(config)
    with pytest.raises(ConfigError, match="is not empty and not a run folder"):
        prepare_folder(tmp_path, RunConfig(), overwrite=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"
    with pytest.raises(ConfigError, match="is a file"):
        prepare_folder(tmp_path / "metrics.jsonl", RunConfig())
    with pytest.raises(ConfigError, match="cannot write"):
        prepare_folder(tmp_path / "metrics.jsonl" / "below", RunConfig())


def test_what_a_killed_run_left_is_read(tmp_path):
    prepare_folder(tmp_path, RunConfig())
    with pytest.raises(ConfigError, match="has no records yet"):
        read_records(tmp_path)
    append_records(tmp_path, [{"round": 0}, {"round": 1}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"round": 2, "accu')
    assert read_records(tmp_path) == [{"round": 0}, {"round": 1}]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match="damaged in line 3"):
        read_records(tmp_path)


def test_records_are_strict_json_whatever_was_observed(tmp_path):
    bad = np.array([np.nan, np.inf], np.float32)
    info = RoundInfo(**{name: bad for name in RoundInfo._fields})
    ints = {name: np.array([0, 3], np.int32) for name in ("round", "global_rate_updates", "global_rate_clipped")}
    ints |= {name: np.array([2, 0], np.int32) for name in ("local_rate_updates", "local_rate_clipped")}
    history = History(info=info._replace(**ints), evaluation={"test_accuracy": bad}, evaluated=np.array([True, True]))
    records = history_records(history, method="G")
    prepare_folder(tmp_path, RunConfig())
    append_records(tmp_path, records)

    def refuse(constant):
        raise AssertionError(constant)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert (first["method"], first["accuracy"], second["loss"] if "loss" in second else None) == ("G", None, None)
    assert (first["global_clipped_share"], second["global_clipped_share"]) == (None, 1.0)
    assert (first["local_clipped_share"], second["local_clipped_share"]) == (1.0, None)
    assert "seconds" not in first


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 123456.789])
def test_numbers_come_back_exactly(value):
    single = np.float32(value)
    assert np.float32(json.loads(json.dumps(plain(single)))) == single
    assert plain(np.float64(value)) == value
    assert plain(math.inf) is None and plain(True) is True and plain(np.asarray(jnp.bfloat16(0.5))[()]) == 0.5
