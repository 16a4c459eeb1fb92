import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import pytest

from fedhyper_jax.shell.config import (
    CompareConfig,
    ConfigError,
    DataConfig,
    GridConfig,
    MethodConfig,
    MethodSettings,
    ModelConfig,
    RunConfig,
    SimulationConfig,
    WorkConfig,
    from_toml,
    load_config,
    to_toml,
)
from fedhyper_jax.shell.presets import PRESETS, preset_config
from fedhyper_jax.shell.tasks import make_model

ODD = RunConfig(
    data=DataConfig(name='a "quoted"\nname', alpha=1e-300, folder="/tmp/ä", evaluate_clients=False),
    model=ModelConfig(hidden=(), channels=(3, 5), kernel_size=3),
    work=WorkConfig(local_steps=7, with_replacement=True),
    method=MethodConfig(
        local_rate=0.1 + 0.2,
        local_bounds=(0.0, math.inf),
        server_optimizer_rate=1e-3,
        options={"epsilon": 0.1 + 0.2, "upper": math.inf, "a.b": "c d", "client_rates": 'wa"rm'},
    ),
    run=SimulationConfig(seed=2**31, out="runs/x"),
)
GRID = CompareConfig(compare=GridConfig(seeds=(5,), local_rates=(1.0, 3e-7), methods=()))


@pytest.mark.parametrize("config", [RunConfig(), CompareConfig(), ODD, GRID, *PRESETS.values()])
def test_toml_gives_back_exactly_what_was_written(config):
    text = to_toml(config, preset="any")
    assert from_toml(text) == config
    assert to_toml(from_toml(text), preset="any") == text


def test_every_model_is_made_with_the_settings_of_its_own():
    wide = make_model(ModelConfig(name="resnet18", width=4, groups=2), 3)
    params = jax.eval_shape(wide.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert params["stem"]["kernel"].shape == (3, 3, 3, 4)
    assert params["dense_0"]["kernel"].shape == (32, 3)
    with pytest.raises(ValueError, match="'resnet18' has no setting hidden"):
        make_model(ModelConfig(name="resnet18", hidden=(3,)), 3)
    with pytest.raises(ValueError, match="'logistic' has no setting width"):
        make_model(ModelConfig(name="logistic", width=4), 3)


def test_optional_fields_default_to_none_since_toml_has_no_null():
    def check(cls):
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(hints[field.name]):
                check(hints[field.name])
            elif type(None) in typing.get_args(hints[field.name]):
                assert field.default is None, field.name

    check(RunConfig)
    check(CompareConfig)


def test_a_file_may_leave_out_what_has_a_default():
    config = from_toml("[run]\nrounds = 7\n[method]\nlocal_rate = 1", "run")
    assert config == RunConfig(run=SimulationConfig(rounds=7), method=MethodConfig(local_rate=1.0))
    assert isinstance(config.method.local_rate, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nround = 7", "unknown key 'round' in [run]; did you mean rounds? known: rounds, cohort_size"),
        ("[runs]\nrounds = 7", "unknown table 'runs'; did you mean run? known: data, model, work, method"),
        ("[run]\nrounds = 'ten'", "run.rounds must be an integer, got 'ten'"),
        ("[run]\nrounds = 7.0", "run.rounds must be an integer, got 7.0"),
        ("[run]\nrounds = true", "run.rounds must be an integer, got True"),
        ("[data]\nevaluate_clients = 1", "data.evaluate_clients must be true or false, got 1"),
        ("[model]\nhidden = [64, 'a']", "model.hidden must be a list of integers, got [64, 'a']"),
        ("[method]\nlocal_bounds = [1]", "method.local_bounds must be a string or a list of 2 numbers, got [1]"),
        ("[method]\noptions = 3", "method.options must be a table, got 3"),
        ("[method.options]\nx = [1]", "method.options.x must be a number or a string, got [1]"),
        ("[method.options]\nx = true", "method.options.x must be a number or a string, got True"),
        ("run = 3", "run must be a table, got 3"),
        ("[run\nrounds = 7", "is not valid TOML"),
        ("command = 'compare'", "is a configuration of `fedhyper compare`, not of `fedhyper run`"),
        ("command = 'paint'", "must say what it is for"),
    ],
)
def test_mistakes_in_a_file_are_refused_by_name(text, message):
    with pytest.raises(ConfigError) as error:
        from_toml(text, "run", source="job.toml")
    assert message in str(error.value)
    assert "job.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml"):
        load_config(tmp_path / "binary.toml")


def test_presets_serve_both_commands():
    assert preset_config("demo", "compare") is PRESETS["demo"]
    run = preset_config("demo", "run")
    assert run.data == PRESETS["demo"].data and run.run.rounds == PRESETS["demo"].run.rounds
    assert run.folder != PRESETS["demo"].folder
    with pytest.raises(ConfigError, match=r"unknown preset 'dmeo'; did you mean demo\? known: demo, fashion_mnist"):
        preset_config("dmeo", "run")


def test_a_number_of_seeds_and_seeds_themselves():
    assert GridConfig(seeds=3).seed_list == (0, 1, 2)
    assert GridConfig(seeds=(3,)).seed_list == (3,)


def test_shared_settings_are_a_part_of_a_method():
    assert {field.name for field in dataclasses.fields(MethodConfig)} - {
        field.name for field in dataclasses.fields(MethodSettings)
    } == {"name", "local_rate"}
