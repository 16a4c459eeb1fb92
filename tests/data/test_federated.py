"""Packing: whatever the clients, the packed arrays say which example is whose; bad input is refused."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhyper_jax.data import check_examples, dirichlet, from_client_ids, pack, quantity_skew


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
    data = pack({"x": np.arange(num_examples), "y": labels}, rows)
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
    ],
)
def test_bad_client_rows_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        pack(GOOD, rows)


@pytest.mark.parametrize("ids", [np.array([0, 1]), np.array([[0], [1], [2]])])
def test_bad_client_ids_are_refused(ids):
    with pytest.raises(ValueError, match=r"client_ids must have shape \(3,\)"):
        from_client_ids(GOOD, ids)
