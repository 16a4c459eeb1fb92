from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedhyper_jax.models import make_model
from fedhyper_jax.shell.checkpoint import load_parameters, save_parameters


class Pair(NamedTuple):
    a: Any
    b: Any


TREE = {
    "half": jnp.arange(3, dtype=jnp.bfloat16),
    "nested": {"list": [jnp.float32(1 / 3), jnp.ones((2, 2), jnp.int8)], "tuple": (jnp.zeros(2),)},
    "pair": Pair(jnp.ones(1), jnp.array([True])),
}


def same(a, b):
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_dicts_come_back_with_every_dtype(tmp_path):
    params = {"half": TREE["half"], "deep": {"er": {"x": jnp.float16(0.1)}}, "list": [jnp.int32(3), jnp.uint8([1, 2])]}
    save_parameters(tmp_path / "parameters", params)
    same(load_parameters(tmp_path / "parameters"), params)
    same(load_parameters(str(tmp_path)), params)  # as from a run folder
    assert not [path for path in tmp_path.iterdir() if path.name != "parameters"]  # nothing temporary stays


def test_other_trees_come_back_with_like(tmp_path):
    save_parameters(tmp_path / "new", TREE)
    loaded = load_parameters(tmp_path / "new", like=jax.eval_shape(lambda: TREE))
    assert isinstance(loaded["pair"], Pair)
    same(loaded, TREE)


def test_parameters_of_a_linen_model(tmp_path):
    model = make_model("cnn", 10, channels=(2,), kernel_size=3)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    save_parameters(tmp_path / "new", params)
    loaded = load_parameters(tmp_path / "new")
    same(loaded, params)
    inputs = jnp.ones((2, 8, 8, 1))
    np.testing.assert_array_equal(model.apply(loaded, inputs), model.apply(params, inputs))


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros(4)}, r"parameter w is stored as \(3,\) float32, but `like` has \(4,\) float32"),
        ({"w": jnp.zeros(3, jnp.int32)}, "float32, but `like` has .* int32"),
        ({"v": jnp.zeros(3)}, "parameter v is only in `like`"),
        ({}, "parameter w is only stored"),
    ],
)
def test_a_tree_that_differs_is_refused(tmp_path, like, message):
    save_parameters(tmp_path / "new", {"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=message):
        load_parameters(tmp_path / "new", like=like)


def test_what_cannot_be_written_or_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no parameters"):
        load_parameters(tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        save_parameters(tmp_path, {"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"params\['w'\] has no elements"):
        save_parameters(tmp_path / "new", {"w": jnp.zeros((0, 3))})
    assert not (tmp_path / "new").exists()
