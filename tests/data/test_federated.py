"""Packing: whatever the clients, the packed arrays say which example is whose; bad input is refused."""

import pickle

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhyper_jax.data import check_examples, dirichlet, from_client_ids, hold_out, iid, pack, quantity_skew


def rows_of(data, client):
    offsets = np.asarray(data.offsets)
    return np.asarray(data.order)[offsets[client] : offsets[client + 1]]


@settings(deadline=None, max_examples=25)
@given(
    num_examples=st.integers(1, 120),
    share=st.floats(0, 1),
    alpha=st.sampled_from([0.01, 1.0, 1000.0]),
    seed=st.integers(0, 10**6),
)
def test_pack_keeps_every_row_with_its_client(num_examples, share, alpha, seed):
    labels = np.random.default_rng(seed).integers(0, 5, num_examples)
    num_clients = max(1, round(share * num_examples))
    rows = dirichlet(labels, num_clients, alpha=alpha, seed=seed).client_rows
    data = jax.device_get(pack({"x": np.arange(num_examples), "y": labels}, rows))
    assert data.population == num_clients
    assert data.order.dtype == data.offsets.dtype == np.int32
    assert data.offsets.shape == (num_clients + 1,) and data.offsets[-1] == num_examples
    for client, own in enumerate(rows):
        assert np.array_equal(rows_of(data, client), own)
    sizes = np.asarray(data.client_sizes)
    assert sizes.tolist() == [len(own) for own in rows] and data.max_examples == sizes.max()
    assert np.array_equal(np.sort(np.asarray(data.order)), np.arange(num_examples))
    assert np.array_equal(data.examples["y"], labels)


def test_packing_copies_no_example_however_skewed():
    sizes = quantity_skew(5000, 100, skew=3.0, seed=0)
    data = pack({"x": np.zeros((5000, 4), np.float32)}, sizes.client_rows)
    assert data.examples["x"].shape == (5000, 4) and data.order.shape == (5000,)


def test_packed_data_is_a_pytree():
    data = pack({"x": np.arange(4.0)}, [np.array([3]), np.array([0, 1])])
    leaves, structure = jax.tree.flatten(data)
    assert len(leaves) == 3
    assert jax.tree.unflatten(structure, leaves).max_examples == 2
    assert jax.jit(lambda d: d.examples["x"][d.order].sum())(data) == 4.0


@settings(deadline=None, max_examples=25)
@given(ids=st.lists(st.sampled_from(["ann", "bob", "eve", "ω"]), min_size=1, max_size=30))
def test_from_client_ids(ids):
    data = from_client_ids({"x": np.arange(len(ids))}, np.array(ids))
    assert data.population == len(set(ids))
    for client, name in enumerate(sorted(set(ids))):
        assert [ids[row] for row in rows_of(data, client)] == [name] * ids.count(name)


GOOD = {"x": np.ones((3, 2)), "y": np.array([0, 1, 1])}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({}, "must be a dict of arrays"),
        ([1, 2], "must be a dict of arrays"),
        ({"x": 1.0}, r"examples\['x'\] must have a leading example axis"),
        ({"x": np.ones((3, 2)), "y": np.ones(4)}, "must have one common length"),
        ({"x": np.array([[1.0, 2.0], [np.nan, 1.0]])}, r"examples\['x'\] has NaN or infinite values, first in row 1"),
        ({"x": np.array([np.inf])}, "has NaN or infinite values"),
        ({"x": np.array(["a"])}, "must be numeric"),
        ({"x": np.array([None])}, "must be numeric"),
        ({"x": np.ones((0, 2))}, "examples are empty"),
    ],
)
def test_bad_examples_are_refused(examples, message):
    with pytest.raises(ValueError, match=message):
        check_examples(examples)
    with pytest.raises(ValueError, match=message):
        pack(examples, [np.array([0])])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "needs at least one client"),
        ([np.array([0]), np.array([], int)], "client 1 has no examples"),
        ([np.array([0, 3])], r"must lie in \[0, 3\)"),
        ([np.array([-1])], r"must lie in \[0, 3\)"),
        ([np.array([0, 1]), np.array([1])], "owned twice"),
        ([np.array([0.0, 1.0])], "must hold integer rows"),
        ([0, 1], "must hold integer rows, a list of them for each client, got 0 for client 0; give e.g."),
        ({"eve": 0}, "got 0 for client 'eve'"),
        ({"eve": [0], "bob": []}, "client 'bob' has no examples"),
        ([np.array([[0], [1]])], "must hold integer rows"),
        ([np.array([True, False, True]), np.array([2])], r"got array\(\[ True, False,  True\]\) for client 0"),
        ([[[0], [1, 2]]], "must hold integer rows"),
        ([{0, "a"}], "must hold integer rows"),
        ({0, 1}, "client_rows must be a list or dict of the rows of each client, got set"),
        (3, "got int; give e.g."),
        ("ab", "got str"),
        (iid(3, 2, seed=0), "got Partition; .* the client_rows of a Partition"),
    ],
)
def test_bad_client_rows_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        pack(GOOD, rows)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"eve": [2], "bob": (0, 1)}, [[2], [0, 1]]),  # in the order of the dict
        ({1: [2], 0: [0, 1]}, [[0, 1], [2]]),  # numbered already
        ({7: [2], 3: [0, 1]}, [[2], [0, 1]]),
        ([{2, 0}, frozenset({1})], [[0, 2], [1]]),
        ((own for own in ([2], range(2))), [[2], [0, 1]]),
        ([np.array([2], np.uint64), np.array([1, 0])], [[2], [1, 0]]),
    ],
)
def test_containers_of_client_rows(rows, expected):
    data = pack(GOOD, rows)
    assert [rows_of(data, client).tolist() for client in range(data.population)] == expected


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([0, 1]), r"client_ids must have shape \(3,\)"),
        (np.array([[0], [1], [2]]), r"client_ids must have shape \(3,\)"),
        ({"eve": [0], "bob": [1, 2]}, r"client_ids must have shape \(3,\)"),
        ([0.0, np.nan, np.nan], "client_ids has nan in row 1"),
        (np.array(["eve", None, 3], object), "must be all numbers or all strings, got NoneType, int, str"),
    ],
)
def test_bad_client_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        from_client_ids(GOOD, ids)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([2**32 + 7]), r"examples\['x'\] has 4294967303 in row 0, which int32 cannot hold"),
        (np.array([[0, 1], [5, -(2**31) - 1]]), r"has -2147483649 in row 1, which int32"),
        (np.array([3, 2**32], np.uint64), "has 4294967296 in row 1, which uint32"),
        (np.array([0.5, -1e300]), r"has -1e\+300 in row 1, which float32 cannot hold; scale it"),
        (np.array([0.5, 2.0**24 + 1]), r"has 16777217.0 in row 1, a whole number that float32 rounds; .*np.float32"),
        (np.array([[1.0, -123456789.0]]), "has -123456789.0 in row 0"),
        (np.array([0.5], np.longdouble), "must be of at most 64 bits, got dtype"),
    ],
)
def test_numbers_that_a_conversion_would_change_are_refused(array, message):
    rows = [np.arange(len(array))]
    for refused in (pack, from_client_ids):
        with pytest.raises(ValueError, match=message):
            refused({"x": array}, rows if refused is pack else np.zeros(len(array)))
    if array.dtype != np.longdouble:
        with jax.enable_x64(True):
            assert np.array_equal(pack({"x": array}, rows).examples["x"], array)


@pytest.mark.parametrize(
    "array",
    [
        np.array([-(2**31), 2**31 - 1]),
        np.array([2**32 - 1], np.uint64),
        np.array([0.1, 1e-300, 3.4e38]),
        np.array([2.0**24, 2.0**40]),  # whole, and representable
        np.array([2.0**24 + 1, 123456789.25]),  # measurements, of which one happens to be whole
        np.array([1e17, 0.5]),  # beyond 2^53 every float64 is whole
        np.array([2.0**24 + 1], np.float64).astype(np.float32),
    ],
)
def test_ordinary_rounding_is_none_of_them(array):
    given = np.asarray(pack({"x": array}, [np.arange(len(array))]).examples["x"], array.dtype)
    np.testing.assert_allclose(given, array, rtol=1e-7, atol=1e-38)


def test_clients_keep_their_names():
    ids = np.array(["eve", "bob", "eve", "ada"])
    data = from_client_ids({"x": np.arange(4.0)}, ids)
    assert data.names == ("ada", "bob", "eve") and [rows_of(data, m).tolist() for m in range(3)] == [[3], [1], [0, 2]]
    assert pack({"x": np.arange(3.0)}, {"eve": [2], 7: [0, 1]}).names == ("eve", 7)
    assert pack({"x": np.arange(3.0)}, {1: [2], 0: [0, 1]}).names is None  # numbered already
    assert pack({"x": np.arange(3.0)}, [[2], [0, 1]]).names is None
    assert hold_out(data, 0.5)[0].names == hold_out(data, 0.5)[1].names == data.names
    assert jax.tree.map(lambda leaf: leaf + 1, data).names == data.names
    assert hash(data.names) == hash(("ada", "bob", "eve"))
    again = pickle.loads(pickle.dumps(data.names))
    assert again == data.names and type(again) is type(data.names) and not vars(again)  # (no hash of another process)


def test_equal_names_are_one_program():
    traced = []

    @jax.jit
    def sizes(data):
        traced.append(data.names)
        return data.client_sizes

    for ids in (["eve", "bob"], ["eve", "bob"], ["eve", "ada"]):
        sizes(from_client_ids({"x": np.arange(2.0)}, np.array(ids)))
    assert traced == [("bob", "eve"), ("ada", "eve")]


def test_weights_are_sums_over_a_clients_examples_over_their_mean():
    examples = {"x": np.arange(5.0), "tokens": np.array([5, 60, 10, 5, 10])}
    data = from_client_ids(examples, np.array(["eve", "bob", "eve", "eve", "bob"]), weigh_by="tokens")
    np.testing.assert_allclose(data.weights, np.array([70, 20]) / 45, rtol=1e-6)
    np.testing.assert_allclose(data.weights_of(np.array([1, 0, 2])), np.array([20, 70, 0]) / 45, rtol=1e-6)
    for part in hold_out(data, 0.5):  # of what is left
        sums = np.array([examples["tokens"][rows_of(part, m)].sum() for m in range(2)])
        np.testing.assert_allclose(part.weights, sums / sums.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.array([1, -1, 2]), r"examples\['tokens'\] must be one number ≥ 0 an example to weigh clients by, got -1"),
        (np.ones((3, 2)), r"must be one number ≥ 0 an example to weigh clients by, got shape \(3, 2\)"),
        (np.array([0, 0, 2]), "client 'eve' has no tokens .1 of 2 clients weigh nothing.; leave such clients out"),
        (None, "unknown weigh_by 'tokens'; known: x"),
    ],
)
def test_weights_that_are_none_are_refused(weights, message):
    examples = {"x": np.arange(3.0)} | ({} if weights is None else {"tokens": weights})
    with pytest.raises(ValueError, match=message):
        pack(examples, {"eve": [0, 1], "bob": [2]}, weigh_by="tokens")


def test_what_is_held_out_may_weigh_nothing():
    examples = {"x": np.arange(4.0), "tokens": np.array([5, 5, 0, 0])}
    train, held_out = hold_out(pack(examples, [[0, 2], [1, 3]], weigh_by="tokens"), 0.5, seed=0)
    assert not held_out.examples["tokens"][held_out.order].any()
    np.testing.assert_array_equal(train.weights, [1, 1])
    np.testing.assert_array_equal(held_out.weights, [0, 0])
