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
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
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


LAYERS = {"layers": {index: jnp.full(2, index) for index in range(11)}}  # as NNX has a list of them


def test_numbers_as_keys_need_like_and_keep_their_order(tmp_path):
    save_parameters(tmp_path / "new", LAYERS)
    with pytest.raises(ValueError, match=r"key 0, of which .* number or a string; give `like`"):
        load_parameters(tmp_path / "new")
    loaded = load_parameters(tmp_path / "new", like=LAYERS)
    assert [int(leaf[0]) for leaf in jax.tree.leaves(loaded)] == list(range(11)) == list(loaded["layers"])


@pytest.mark.parametrize("key", [1.5, (1, 2), True, "7"])
def test_a_key_that_is_no_name_needs_like(key, tmp_path):
    save_parameters(tmp_path / "new", {key: jnp.ones(1)})
    with pytest.raises(ValueError, match="give `like`"):
        load_parameters(tmp_path / "new")
    assert list(load_parameters(tmp_path / "new", like={key: jnp.zeros(1)})) == [key]


def test_lists_and_odd_names_need_nothing(tmp_path):
    params = {"list": [jnp.full(1, index) for index in range(11)], "dense_10": jnp.ones(1), "a b": {"": jnp.ones(1)}}
    save_parameters(tmp_path / "new", params)
    same(load_parameters(tmp_path / "new"), params)


@pytest.mark.parametrize("name", ["r[1]", "r*", "r?", "a[b]/c", "r[!1]"])
def test_a_path_is_no_pattern(name, tmp_path):
    """Neither is the folder taken for others, nor others for it."""
    save_parameters(tmp_path / "r1", {"w": jnp.zeros(3)})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    save_parameters(tmp_path / name, {"w": jnp.arange(3.0)})
    same(load_parameters(tmp_path / name), {"w": jnp.arange(3.0)})
    same(load_parameters(tmp_path / "r1"), {"w": jnp.zeros(3)})
    assert not list(tmp_path.rglob("*tmp*"))
    with pytest.raises(ValueError, match="exists already"):
        save_parameters(tmp_path / name, {"w": jnp.zeros(3)})
    with pytest.raises(FileNotFoundError, match="holds no parameters"):
        load_parameters(tmp_path / name / "other")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (jnp.ones(3), "tree of arrays, got one bare array; give"),
        (0.5, "tree of arrays, got one bare array"),
        ({}, "tree of arrays, got no array"),
        (None, "tree of arrays, got no array"),
        ({"a": {"b": "word"}}, r"params\['a'\]\['b'\] must be an array, got 'word'"),
    ],
)
def test_what_is_no_tree_of_arrays_is_refused(params, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_parameters(tmp_path / "new", params)
    assert list(tmp_path.iterdir()) == []
