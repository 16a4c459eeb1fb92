"""Batches and cohorts: every example once an epoch, by identity, whatever the padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhyper_jax.data import client_batches, hold_out, local_epochs, local_steps, pack, sample_cohort
from fedhyper_jax.data.batches import _sorted_epochs


def federation(sizes, extra=0):
    count = sum(sizes)
    rows = np.split(np.random.default_rng(0).permutation(count), np.cumsum(sizes)[:-1])
    return pack({"x": np.arange(count + extra)}, [*rows, np.arange(count, count + extra)] if extra else rows), rows


draw = jax.jit(client_batches, static_argnames="work")


def drawn(key, round_number, data, client, work):
    batches = jax.tree.map(np.asarray, draw(key, round_number, data, client, work=work))
    steps = [batches.rows[k][batches.mask[k]] for k in range(len(batches.rows))]
    return batches, steps


@settings(max_examples=5, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_each_epoch_visits_each_example_once(sizes, epochs, batch_size, seed):
    data, rows = federation(sizes)
    for client, own in enumerate(rows):
        batches, steps = drawn(jax.random.key(seed), 3, data, client, local_epochs(epochs, batch_size))
        an_epoch = -(-len(own) // batch_size)
        assert int(batches.num_steps) == epochs * an_epoch
        for epoch in range(epochs):
            visited = np.concatenate(steps[epoch * an_epoch : (epoch + 1) * an_epoch])
            assert sorted(visited) == sorted(own)
        assert all(len(step) for step in steps[: epochs * an_epoch])
        assert not any(len(step) for step in steps[epochs * an_epoch :])
        # Padding repeats rows of the client itself, so a masked gather cannot bring in foreign numbers.
        assert set(batches.rows.ravel()) <= set(own)


@settings(max_examples=5, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 23), min_size=1, max_size=4), steps=st.integers(1, 12), batch_size=st.integers(1, 9)
)
def test_local_steps_walk_reshuffled_epochs(sizes, steps, batch_size):
    data, rows = federation(sizes)
    for client, own in enumerate(rows):
        batches, taken = drawn(jax.random.key(0), 0, data, client, local_steps(steps, batch_size))
        assert int(batches.num_steps) == steps == len(taken)
        an_epoch = -(-len(own) // batch_size)
        for start in range(0, steps, an_epoch):
            visited = np.concatenate(taken[start : start + an_epoch])
            assert len(set(visited)) == len(visited)
            assert set(visited) <= set(own)
            if start + an_epoch <= steps:
                assert sorted(visited) == sorted(own)


def test_with_replacement_draws_full_batches_even_from_small_clients(key):
    data, rows = federation([2, 50])
    work = local_steps(400, batch_size=16, with_replacement=True)
    for client, own in enumerate(rows):
        batches, _ = drawn(key, 0, data, client, work)
        assert batches.mask.all()
        counts = np.bincount(batches.rows.ravel(), minlength=52)[own]
        assert counts.sum() == 6400
        expected = 6400 / len(own)
        assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


@pytest.mark.parametrize("work", [local_epochs(2, 4), local_steps(9, 4)])
def test_padding_changes_no_batch(key, work):
    small, _ = federation([7, 3, 12])
    large, _ = federation([7, 3, 12], extra=90)
    for client in range(3):
        _, expected = drawn(key, 1, small, client, work)
        _, steps = drawn(key, 1, large, client, work)
        for a, b in zip(expected, steps, strict=False):
            np.testing.assert_array_equal(a, b)


def test_batches_depend_on_seed_round_and_client_and_epochs_differ(key):
    data, _ = federation([12, 12])
    work = local_epochs(2, 12)
    _, (first, second) = drawn(key, 0, data, 0, work)
    assert not np.array_equal(first, second)
    positions = {tuple(first)}
    for other in (drawn(key, 1, data, 0, work), drawn(jax.random.key(1), 0, data, 0, work)):
        positions.add(tuple(other[1][0]))
    assert len(positions) == 3
    order = np.asarray(data.order)
    own = [list(order[:12]).index(row) for row in first]
    neighbour = [list(order[12:]).index(row) for row in drawn(key, 0, data, 1, work)[1][0]]
    assert own != neighbour


@pytest.mark.parametrize(
    ("size", "length"),
    [(40, 240), (1, 20), (7, 64), (240, 240), (3, 7), (4097, 8192), (1, 8192), (8192, 8192), (9, 9000)],
)
@pytest.mark.parametrize("ties", [False, True])
def test_packed_sorts_are_the_sort_they_stand_for(size, length, ties):
    """By epoch, then random bits, then position; NumPy's own sort of the three."""
    bits = np.random.default_rng(size).integers(2**32, size=length, dtype=np.uint32)
    bits = bits & 0x80030001 if ties else bits
    index = np.arange(length)
    expected = (index % size)[np.lexsort((index % size, bits, index // size))]
    given = np.asarray(jax.jit(_sorted_epochs)(jnp.asarray(bits), jnp.int32(size)))
    whole = length // size * size
    np.testing.assert_array_equal(given[:whole], expected[:whole])


def test_shuffles_are_uniform(key):
    """Each of the 24 orders of four examples, over 2,400 rounds: χ² with 23 degrees of freedom is below 60."""
    data, _rows = federation([4])
    work = local_epochs(1, 4)
    orders = np.asarray(jax.jit(jax.vmap(lambda t: client_batches(key, t, data, 0, work).rows[0]))(jnp.arange(2400)))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 100) ** 2 / 100).sum() < 60


def test_a_padded_slot_has_no_steps(key):
    data, _ = federation([4, 5])
    for client in (2, 2**31 - 2):
        batches, steps = drawn(key, 0, data, client, local_epochs(1, 2))
        assert int(batches.num_steps) == 0
        assert not any(len(step) for step in steps)


@pytest.mark.parametrize(("population", "size"), [(1, 1), (5, 5), (5, 3), (7, 2), (40, 20), (1_000_000, 100)])
def test_cohorts_are_distinct_and_in_range(key, population, size):
    cohorts = np.asarray(jax.jit(jax.vmap(lambda k: sample_cohort(k, population, size)))(jax.random.split(key, 50)))
    assert cohorts.shape == (50, size)
    assert cohorts.min() >= 0
    assert cohorts.max() < population
    assert all(len(set(cohort)) == size for cohort in cohorts)


@pytest.mark.parametrize(("population", "size"), [(6, 2), (6, 5)])
def test_cohorts_are_uniform(key, population, size):
    """Each client takes part with probability S/P, each ordered pair of first two clients equally often."""
    cohorts = np.asarray(jax.jit(jax.vmap(lambda k: sample_cohort(k, population, size)))(jax.random.split(key, 6000)))
    share = np.bincount(cohorts.ravel(), minlength=population) / 6000
    assert np.abs(share - size / population).max() < 5 * np.sqrt(0.25 / 6000)
    _, counts = np.unique(cohorts[:, :2], axis=0, return_counts=True)
    assert len(counts) == 30
    assert ((counts - 200) ** 2 / 200).sum() < 75  # χ², 29 degrees of freedom


def test_a_cohort_costs_no_memory_of_the_population():
    """No array of the compiled draw from a million clients is larger than a few cohorts."""
    text = jax.make_jaxpr(lambda k: sample_cohort(k, 1_000_000, 10))(jax.random.key(0))
    assert "[1000000]" not in str(text)


@pytest.mark.parametrize(("size", "message"), [(6, "cohort_size=6 and population=5"), (0, "integer ≥ 1")])
def test_impossible_cohorts_are_refused(key, size, message):
    with pytest.raises(ValueError, match=message):
        sample_cohort(key, 5, size)


def test_hold_out_splits_each_client(key):
    data, rows = federation([10, 3, 1])
    train, held = hold_out(data, 0.34, seed=1)
    assert train.client_sizes.tolist() == [7, 2, 1]
    assert held.client_sizes.tolist() == [3, 1, 0]
    for client, own in enumerate(rows):
        parts = [np.asarray(d.order[d.offsets[client] : d.offsets[client + 1]]) for d in (train, held)]
        assert sorted(np.concatenate(parts)) == sorted(own)
    with pytest.raises(ValueError, match="holds out no example"):
        hold_out(data, 0.01)
    with pytest.raises(ValueError, match=r"fraction must lie strictly between 0 and 1, got 1\.0"):
        hold_out(data, 1.0)
