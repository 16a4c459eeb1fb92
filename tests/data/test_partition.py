"""Every partitioner: disjoint, covering, seeded, and what its name says."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhyper_jax.data import _draws
from fedhyper_jax.data.partition import (
    PARTITIONERS,
    Partition,
    by_user,
    dirichlet,
    iid,
    make_partition,
    quantity_skew,
    shards,
)

FEW = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**32 - 1)
alphas = st.sampled_from([0.01, 0.1, 1.0, 100.0, 1000.0])


def check(partition: Partition, num_examples: int, num_clients: int, min_examples: int = 1) -> None:
    rows = partition.client_rows
    assert len(rows) == partition.num_clients == num_clients
    assert np.array_equal(np.sort(np.concatenate(rows)), np.arange(num_examples))  # disjoint and covering
    assert partition.num_examples == num_examples
    assert min(map(len, rows)) >= min_examples
    assert all((np.diff(row) > 0).all() for row in rows)
    assert np.array_equal(partition.client_sizes, [len(row) for row in rows])


@st.composite
def pools(draw, floor=1):
    """Labels with gaps and any class balance, and a number of clients they can serve with ``floor`` examples each."""
    num_examples = draw(st.integers(floor, 200))
    values = draw(st.lists(st.integers(-3, 70), min_size=1, max_size=8, unique=True))
    labels = np.array(values)[np.random.default_rng(draw(seeds)).integers(0, len(values), num_examples)]
    return labels, draw(st.integers(1, num_examples // floor))


@FEW
@given(pool=pools(), seed=seeds)
def test_iid(pool, seed):
    labels, num_clients = pool
    partition = iid(len(labels), num_clients, seed=seed)
    check(partition, len(labels), num_clients)
    assert np.ptp(partition.client_sizes) <= 1
    assert partition.moved == 0


@FEW
@given(data=st.data(), floor=st.integers(1, 4), alpha=alphas, seed=seeds)
def test_dirichlet(data, floor, alpha, seed):
    labels, num_clients = data.draw(pools(floor))
    partition = dirichlet(labels, num_clients, alpha=alpha, seed=seed, min_examples=floor)
    check(partition, len(labels), num_clients, floor)
    assert 0 <= partition.moved <= num_clients * floor


@FEW
@given(data=st.data(), per_client=st.integers(1, 4), seed=seeds)
def test_shards(data, per_client, seed):
    labels, num_clients = data.draw(pools(per_client))
    partition = shards(labels, num_clients, shards_per_client=per_client, seed=seed)
    check(partition, len(labels), num_clients, per_client)
    assert np.ptp(partition.client_sizes) <= per_client  # each of its shards may have one example more


@FEW
@given(
    data=st.data(),
    floor=st.integers(1, 4),
    distribution=st.sampled_from(["lognormal", "power"]),
    skew=st.sampled_from([0.0, 0.5, 3.0, 50.0]),
    seed=seeds,
)
def test_quantity_skew(data, floor, distribution, skew, seed):
    labels, num_clients = data.draw(pools(floor))
    partition = quantity_skew(
        len(labels), num_clients, distribution=distribution, skew=skew, seed=seed, min_examples=floor
    )
    check(partition, len(labels), num_clients, floor)
    if skew == 0:
        assert np.ptp(partition.client_sizes) <= 1 or floor > 1


@FEW
@given(ids=st.lists(st.one_of(st.integers(0, 9), st.just(1000)), min_size=1, max_size=60))
def test_by_user(ids):
    ids = np.array(ids)
    partition = by_user(ids)
    check(partition, len(ids), len(set(ids.tolist())))
    for user, rows in zip(np.unique(ids), partition.client_rows, strict=True):
        assert (ids[rows] == user).all()


LABELS = np.random.default_rng(7).integers(0, 10, 1000)
SETTINGS = {"iid": {}, "dirichlet": {"alpha": 0.3}, "shards": {}, "quantity_skew": {"skew": 1.0}}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_seed_decides_the_partition(name):
    first, again = (make_partition(name, LABELS, 20, seed=3, **SETTINGS[name]) for _ in range(2))
    other = make_partition(name, LABELS, 20, seed=4, **SETTINGS[name])
    assert first.digest == again.digest != other.digest
    assert all(np.array_equal(a, b) for a, b in zip(first.client_rows, again.client_rows, strict=True))
    assert len(first.digest) == 64 and set(first.digest) <= set("0123456789abcdef")


def test_the_global_numpy_seed_decides_nothing():
    np.random.seed(0)  # noqa: NPY002  the legacy state is what this test is about
    first = dirichlet(LABELS, 20, alpha=0.3, seed=3)
    np.random.seed(1)  # noqa: NPY002
    assert dirichlet(LABELS, 20, alpha=0.3, seed=3).digest == first.digest


def test_digest_is_of_the_assignment_alone():
    rows = [np.array([0, 2]), np.array([1])]
    one = Partition(client_rows=rows, method="a", settings={})
    two = Partition(client_rows=[row.astype(np.int32) for row in rows], method="b", settings={"seed": 1}, moved=1)
    swapped = Partition(client_rows=rows[::-1], method="a", settings={})
    joined = Partition(client_rows=[np.array([0]), np.array([2, 1])], method="a", settings={})
    assert one.digest == two.digest
    assert len({one.digest, swapped.digest, joined.digest}) == 3


def test_partitions_are_the_same_on_every_machine():
    """Changes only if NumPy changes its streams or we change the split; either belongs in the changelog."""
    assert {name: make_partition(name, LABELS, 20, **SETTINGS[name]).digest[:12] for name in SETTINGS} == {
        "iid": "135fdadaed3e",
        "dirichlet": "2d4ca95cb7b0",
        "shards": "58eeae041690",
        "quantity_skew": "52bdceada24b",
    }


# --- edges ---


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("num_clients", [1, 7, 40])
def test_one_class_only(name, num_clients):
    extra = {"shards_per_client": 1} if name == "shards" else SETTINGS[name]
    check(make_partition(name, np.zeros(40, int), num_clients, **extra), 40, num_clients)


@pytest.mark.parametrize("alpha", [0.001, 0.01, 1000.0])
def test_as_many_clients_as_examples(alpha):
    labels = np.arange(50) % 10
    partition = dirichlet(labels, 50, alpha=alpha, seed=0)
    check(partition, 50, 50)
    assert (partition.client_sizes == 1).all()
    check(iid(50, 50, seed=0), 50, 50)
    check(shards(labels, 50, shards_per_client=1, seed=0), 50, 50)
    check(quantity_skew(50, 50, skew=3.0, seed=0), 50, 50)


@pytest.mark.parametrize(
    "call",
    [
        lambda: iid(49, 50, seed=0),
        lambda: dirichlet(np.zeros(49, int), 50, alpha=1.0, seed=0),
        lambda: dirichlet(np.zeros(49, int), 25, alpha=1.0, seed=0, min_examples=2),
        lambda: shards(np.zeros(49, int), 25, seed=0),
        lambda: quantity_skew(49, 50, skew=1.0, seed=0),
        lambda: quantity_skew(49, 5, skew=1.0, seed=0, min_examples=10),
    ],
)
def test_more_clients_than_examples_is_an_error(call):
    with pytest.raises(ValueError, match=r"must not exceed the number of examples, got .* > 49; use fewer clients"):
        call()


@pytest.mark.parametrize("alpha", [0, -1.0, np.nan, np.inf, "1", None, [0.1, 1.0]])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha must be"):
        dirichlet(LABELS, 5, alpha=alpha, seed=0)


@pytest.mark.parametrize("num_clients", [0, -3, 2.0, True, None])
def test_bad_number_of_clients(num_clients):
    with pytest.raises(ValueError, match="num_clients must be an integer ≥ 1, got"):
        iid(10, num_clients, seed=0)


@pytest.mark.parametrize("labels", [np.zeros((4, 1), int), np.zeros(4), np.array([]), np.array(["a", "b"]), 3])
def test_bad_labels(labels):
    for call in (lambda: dirichlet(labels, 1, alpha=1.0, seed=0), lambda: shards(labels, 1, seed=0)):
        with pytest.raises(ValueError, match="labels must be a non-empty 1-D array of integers, got shape"):
            call()


@pytest.mark.parametrize("seed", [None, -1, 0.5, True])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed must be an integer ≥ 0, got"):
        iid(10, 2, seed=seed)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="skew must be finite and ≥ 0, got -1"):
        quantity_skew(10, 2, skew=-1, seed=0)
    with pytest.raises(ValueError, match="unknown distribution 'pareto'; known: lognormal, power"):
        quantity_skew(10, 2, distribution="pareto", skew=1.0, seed=0)
    with pytest.raises(ValueError, match="min_examples must be an integer ≥ 1, got 0"):
        dirichlet(LABELS, 5, alpha=1.0, seed=0, min_examples=0)
    with pytest.raises(ValueError, match="shards_per_client must be an integer ≥ 1, got 0"):
        shards(LABELS, 5, shards_per_client=0, seed=0)
    with pytest.raises(ValueError, match="client_ids must be a non-empty 1-D array"):
        by_user(np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="client_ids must be a non-empty 1-D array"):
        by_user(np.array([0.5]))


# --- by name ---


def test_make_partition_is_the_partitioner():
    assert set(PARTITIONERS) == {"iid", "dirichlet", "shards", "quantity_skew", "by_user"}
    assert make_partition("iid", LABELS, 5, seed=2).digest == iid(1000, 5, seed=2).digest
    assert make_partition("dirichlet", LABELS, 5, alpha=0.1).digest == dirichlet(LABELS, 5, alpha=0.1, seed=0).digest
    assert make_partition("by_user", client_ids=LABELS).digest == by_user(LABELS).digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("dirichlett", LABELS, 5), {}), "unknown partitioner 'dirichlett'; did you mean dirichlet"),
        ((("dirichlet", LABELS, 5), {}), "partitioner 'dirichlet' needs the setting alpha"),
        (
            (("iid", LABELS, 5), {"alpha": 0.5}),
            "unknown setting of partitioner 'iid' 'alpha'; known: num_clients",
        ),
        ((("iid", None, 5), {}), "needs labels and num_clients"),
        ((("iid", LABELS), {}), "needs labels and num_clients"),
        ((("by_user", LABELS), {}), "needs client_ids"),
    ],
)
def test_make_partition_refuses(arguments, message):
    positional, keywords = arguments
    with pytest.raises(ValueError, match=message):
        make_partition(*positional, **keywords)


def test_settings_are_plain_numbers():
    settings_ = dirichlet(LABELS, np.int64(5), alpha=np.float32(0.5), seed=np.uint8(1)).settings
    assert settings_ == {"num_clients": 5, "alpha": 0.5, "seed": 1, "min_examples": 1}
    assert {type(value) for value in settings_.values()} == {int, float}
    assert repr(dirichlet(LABELS, 5, alpha=0.5, seed=1)).startswith("<Partition dirichlet(num_clients=5, alpha=0.5, ")


# --- what the names promise ---


def class_shares(labels, partition, num_classes):
    """(clients, classes): the share of each class that each client holds."""
    counts = np.stack([np.bincount(labels[rows], minlength=num_classes) for rows in partition.client_rows])
    return counts / counts.sum(axis=0)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_dirichlet_is_drawn_per_class(alpha):
    """Shares of a class over M clients have mean 1/M and variance (1/M)(1 − 1/M)/(Mα + 1), class by class.

    With 400 classes of 2,000 examples the rounding to whole examples adds less than 2e-7 of variance.
    """
    num_clients, num_classes = 5, 400
    labels = np.repeat(np.arange(num_classes), 2000)
    partition = dirichlet(labels, num_clients, alpha=alpha, seed=11)
    assert partition.moved == 0
    shares = class_shares(labels, partition, num_classes)
    np.testing.assert_allclose(shares.sum(axis=0), 1.0)
    mean, variance = 1 / num_clients, (1 / num_clients) * (1 - 1 / num_clients) / (num_clients * alpha + 1)
    # five standard errors of a mean over 400 independent classes
    np.testing.assert_allclose(shares.mean(axis=1), mean, atol=5 * np.sqrt(variance / num_classes))
    squares = (shares - mean) ** 2
    error = squares.mean(axis=0).std(ddof=1) / np.sqrt(num_classes)
    assert abs(squares.mean() - variance) < 5 * error + 2e-7
    # two clients of one class share a sum, hence correlation −1/(M − 1); two classes are independent
    across_clients = np.corrcoef(shares[0], shares[1])[0, 1]
    across_classes = np.corrcoef(shares[0, ::2], shares[0, 1::2])[0, 1]
    assert abs(across_clients + 1 / (num_clients - 1)) < 0.25
    assert abs(across_classes) < 0.35


def test_dirichlet_limits():
    labels = np.repeat(np.arange(10), 1000)
    even = class_shares(labels, dirichlet(labels, 10, alpha=1e6, seed=0), 10)
    np.testing.assert_allclose(even, 0.1, atol=0.002)  # one example is 0.001
    skewed = dirichlet(labels, 10, alpha=0.01, seed=0)
    largest_share = class_shares(labels, skewed, 10).max(axis=0)
    assert np.median(largest_share) > 0.95  # nearly each class belongs to one client
    classes = [len(np.unique(labels[rows])) for rows in skewed.client_rows]
    assert np.mean(classes) < 4


@pytest.mark.parametrize("alpha", [1e-3, 0.01])
def test_tiny_alpha_with_many_clients_neither_underflows_nor_warns(alpha):
    draw = _draws.dirichlet_draw(np.random.default_rng(0), alpha, 1000)
    assert np.isfinite(draw).all() and draw.sum() == pytest.approx(1.0) and draw.max() > 0.01
    for seed in range(20):  # a plain Dirichlet draw of two clients at α = 0.001 is 0/0 in a quarter of the cases
        pair = _draws.dirichlet_draw(np.random.default_rng(seed), alpha, 2)
        assert np.isfinite(pair).all() and pair.sum() == pytest.approx(1.0)


def test_small_classes_do_not_miss_the_same_clients():
    """10 classes of 50 examples over 100 clients at α → ∞: each client gets Binomial-like 5, not 0 or 10."""
    labels = np.repeat(np.arange(10), 50)
    sizes = np.stack([dirichlet(labels, 100, alpha=1e6, seed=seed).client_sizes for seed in range(20)])
    assert sizes.var() < 1.5 * 10 * 0.25
    assert np.abs(sizes.mean(axis=0) - 5).max() < 5 * np.sqrt(2.5 / 20)


def test_repair_takes_from_the_largest_and_counts():
    rng = np.random.default_rng(0)
    client = np.repeat([0, 1, 2, 4], [10, 3, 1, 6])  # client 3 has none
    before = client.copy()
    moved = _draws.repair(rng, client, 5, 3)
    assert moved == 5 == (client != before).sum()
    assert set(before[client != before]) <= {0, 4}
    # 10 and 6 give 5, down to one level
    assert np.bincount(client).tolist() in ([5, 3, 3, 3, 6], [6, 3, 3, 3, 5])
    assert _draws.repair(rng, client, 5, 3) == 0


def test_shards_of_an_even_pool_give_few_classes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
    partition = shards(labels, 100, seed=0)
    assert (partition.client_sizes == 60).all()
    assert max(len(np.unique(labels[rows])) for rows in partition.client_rows) <= 2


def test_quantity_skew_follows_its_law():
    sizes = quantity_skew(200_000, 400, distribution="lognormal", skew=1.0, seed=0).client_sizes
    assert np.log(sizes).std() == pytest.approx(1.0, abs=0.12)  # standard error 1/√800
    power = np.sort(quantity_skew(100_000, 50, distribution="power", skew=1.2, seed=0).client_sizes)[::-1]
    expected = np.arange(1, 51) ** -1.2
    np.testing.assert_allclose(power, 100_000 * expected / expected.sum(), atol=1.0)
    labels = np.random.default_rng(1).integers(0, 2, 200_000)
    largest = max(quantity_skew(200_000, 400, skew=1.0, seed=0).client_rows, key=len)
    assert labels[largest].mean() == pytest.approx(0.5, abs=0.05)


def test_iid_is_a_uniform_sample():
    labels = np.arange(20_000) >= 10_000  # sorted: a split without shuffling would give one class each
    partition = iid(20_000, 10, seed=0)
    means = [labels[rows].mean() for rows in partition.client_rows]
    np.testing.assert_allclose(means, 0.5, atol=5 * 0.5 / np.sqrt(2000))


def test_ten_thousand_clients_over_a_million_examples_take_seconds():
    labels = np.random.default_rng(0).integers(0, 10, 1_000_000)
    start = time.process_time()
    partition = dirichlet(labels, 10_000, alpha=0.01, seed=0, min_examples=5)
    check(partition, 1_000_000, 10_000, 5)
    assert partition.moved > 0
    assert time.process_time() - start < 10.0  # measured 0.5; an O(clients × examples) loop takes minutes


def test_cutting_rounds_without_bias():
    """One example over shares ½, ¼, ¼ goes to them with just these probabilities; plain flooring gives ⅓ each."""
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.25, 0.25])
    owners = np.array([_draws.cut(rng, shares, 1)[0] for _ in range(4000)])
    np.testing.assert_allclose(np.bincount(owners) / 4000, shares, atol=5 * 0.5 / np.sqrt(4000))
    for length in (1, 7, 100):
        counts = np.bincount(_draws.cut(rng, shares, length), minlength=3)
        assert counts.sum() == length and (np.abs(counts - shares * length) < 1).all()
