"""Batches and cohorts: every example once an epoch, by identity, whatever the padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhyper_jax.data import client_batches, hold_out, local_epochs, local_steps, pack, sample_cohort
from fedhyper_jax.data.batches import _sorted_epochs
from fedhyper_jax.data.cohorts import _integers


def federation(sizes, extra=0):
    count = sum(sizes)
    rows = np.split(np.random.default_rng(0).permutation(count), np.cumsum(sizes)[:-1])
    return pack({"x": np.arange(count + extra)}, [*rows, np.arange(count, count + extra)] if extra else rows), rows


draw = jax.jit(client_batches, static_argnames="work")


def drawn(key, round_number, data, client, work):
    batches = jax.tree.map(np.asarray, draw(key, round_number, data, client, work=work))
    steps = [batches.rows[k][batches.mask[k]] for k in range(len(batches.rows))]
    return batches, steps


@st.composite
def some_sizes(draw):
    """Four clients, of 1 to 23 examples and 46 in all: shapes that are compiled once."""
    first, second = draw(st.lists(st.integers(1, 22), min_size=2, max_size=2, unique=True).map(sorted))
    return draw(st.permutations([23, first, second - first, 23 - second]))


@pytest.mark.parametrize("work", [local_epochs(3, 4), local_epochs(1, 9), local_epochs(2, 1)], ids=str)
@settings(max_examples=5, deadline=None)
@given(sizes=some_sizes(), seed=st.integers(0, 2**31))
def test_each_epoch_visits_each_example_once(work, sizes, seed):
    data, rows = federation(sizes)
    epochs, batch_size = work.epochs, work.batch_size
    for client, own in enumerate(rows):
        batches, steps = drawn(jax.random.key(seed), 3, data, client, work)
        an_epoch = -(-len(own) // batch_size)
        assert int(batches.num_steps) == epochs * an_epoch
        for epoch in range(epochs):
            visited = np.concatenate(steps[epoch * an_epoch : (epoch + 1) * an_epoch])
            assert sorted(visited) == sorted(own)
        assert all(len(step) for step in steps[: epochs * an_epoch])
        assert not any(len(step) for step in steps[epochs * an_epoch :])
        # Padding repeats rows of the client itself, so a masked gather cannot bring in foreign numbers.
        assert set(batches.rows.ravel()) <= set(own)


def test_a_federation_of_one_example(key):
    data, _ = federation([1])
    batches, steps = drawn(key, 0, data, 0, local_epochs(2, 3))
    assert int(batches.num_steps) == 2 and [step.tolist() for step in steps] == [[0], [0]]
    assert not batches.rows.any()


@pytest.mark.parametrize("work", [local_steps(9, 4), local_steps(2, 7)], ids=str)
@settings(max_examples=5, deadline=None)
@given(sizes=some_sizes())
def test_local_steps_walk_reshuffled_epochs(work, sizes):
    data, rows = federation(sizes)
    steps, batch_size = work.steps, work.batch_size
    for client, own in enumerate(rows):
        batches, taken = drawn(jax.random.key(0), 0, data, client, work)
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


@pytest.mark.parametrize("work", [local_epochs(3, 4), local_steps(9, 4)])
def test_padding_changes_no_batch(key, work):
    small, _ = federation([7, 3, 23, 13])
    large, _ = federation([7, 3, 23, 13], extra=90)
    for client in range(4):
        _, expected = drawn(key, 1, small, client, work)
        _, steps = drawn(key, 1, large, client, work)
        for a, b in zip(expected, steps, strict=False):
            np.testing.assert_array_equal(a, b)


def test_batches_depend_on_seed_round_and_client_and_epochs_differ(key):
    sizes, work = [9, 9, 23, 5], local_epochs(3, 4)
    data, rows = federation(sizes)

    def orders(key, round_number, client):
        """Positions of its examples in the order of the first epoch, and of the second."""
        visited = np.concatenate(drawn(key, round_number, data, client, work)[1])
        positions = [list(rows[client]).index(row) for row in visited]
        return tuple(positions[:9]), tuple(positions[9:18])

    first, second = orders(key, 0, 0)
    assert first != second
    assert len({first, orders(key, 1, 0)[0], orders(jax.random.key(1), 0, 0)[0]}) == 3
    assert orders(key, 0, 1)[0] != first


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
    data, _ = federation([9, 9, 23, 5])
    for client in (4, 2**31 - 2):
        batches, steps = drawn(key, 0, data, client, local_epochs(3, 4))
        assert int(batches.num_steps) == 0
        assert not any(len(step) for step in steps)


def cohorts_of(keys, population, size):
    """Their cohorts, which are distinct clients of the population."""
    cohorts = np.asarray(jax.jit(jax.vmap(lambda k: sample_cohort(k, population, size)))(keys))
    assert cohorts.shape == (len(keys), size)
    assert cohorts.min() >= 0
    assert cohorts.max() < population
    assert (np.diff(np.sort(cohorts)) > 0).all()
    return cohorts


@pytest.mark.parametrize(("population", "size"), [(1, 1), (5, 5), (40, 20), (1_000_000, 100)])
def test_cohorts_are_distinct_and_in_range(key, population, size):
    cohorts_of(jax.random.split(key, 50), population, size)


@pytest.mark.parametrize("stop", [1, 3, 100, 2**16 - 1, 2**16, 2**16 + 1, 1_000_000, 2**31 - 1])
def test_cohorts_are_made_of_the_integers_of_jax(stop):
    for seed in range(5):
        own = _integers(jax.random.key(seed), 36, stop)
        np.testing.assert_array_equal(own, jax.random.randint(jax.random.key(seed), (36,), 0, stop, dtype=np.int32))


@pytest.mark.parametrize(("population", "size"), [(6, 2), (6, 5)])
def test_cohorts_are_uniform(key, population, size):
    """Each client takes part with probability S/P, each ordered pair of first two clients equally often."""
    cohorts = cohorts_of(jax.random.split(key, 6000), population, size)
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
