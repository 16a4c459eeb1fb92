"""Reports: their numbers by hand, and pictures of every kind of partition."""

import numpy as np
import pytest

from fedhyper_jax.data import dirichlet, iid, partition_report, plot_partition, quantity_skew, shards
from fedhyper_jax.data.partition import Partition
from tests.helpers import cases

LABELS = np.random.default_rng(0).integers(0, 10, 3000)


def test_numbers_by_hand():
    labels = np.array([5, 5, 7, 7, 5, 9])
    partition = Partition(client_rows=[np.array([0, 1, 4]), np.array([2, 5])], method="own", settings={}, moved=3)
    report = partition_report(partition, labels)
    assert report.classes.tolist() == [5, 7, 9]
    assert report.label_counts.tolist() == [[3, 0, 0], [0, 1, 1]]
    assert report.size_summary == (2, 2.5, 3)
    np.testing.assert_allclose(report.effective_classes, [1.0, 2.0])
    # pool (3, 1, 1)/5; client 0 is ½(0.4 + 0.2 + 0.2) = 0.4 away, client 1 ½(0.6 + 0.3 + 0.3) = 0.6
    assert report.label_distance == pytest.approx((3 * 0.4 + 2 * 0.6) / 5)
    assert report.moved == 3 and report.digest == partition.digest


def test_effective_classes_lie_between_one_and_all():
    report = partition_report(dirichlet(LABELS, 30, alpha=0.1, seed=0), LABELS)
    assert (report.effective_classes >= 1 - 1e-12).all() and (report.effective_classes <= 10 + 1e-12).all()
    assert (report.label_counts.sum(axis=1) == report.client_sizes).all()
    assert report.label_distance > partition_report(iid(3000, 30, seed=0), LABELS).label_distance


def test_text():
    text = str(partition_report(dirichlet(LABELS, 5, alpha=0.5, seed=1), LABELS))
    assert text.startswith("dirichlet(num_clients=5, alpha=0.5, seed=1, min_examples=1)\n3,000 examples over 5 clients")
    table = text.splitlines()[5:]
    assert table[0].split() == ["client", "examples", "effective", *"0123456789"]
    assert len(table) == 6 and len({len(line) for line in table}) == 1  # aligned columns
    assert sum(int(row.split()[1]) for row in table[1:]) == 3000


@pytest.mark.parametrize("num_classes", [1, 10, 62])
def test_text_stays_readable_with_many_clients_and_classes(num_classes):
    labels = LABELS % num_classes if num_classes <= 10 else np.arange(3000) % num_classes
    text = str(partition_report(iid(3000, 500, seed=0), labels))
    assert len(text.splitlines()) < 25 and max(map(len, text.splitlines())) <= 120
    assert "12 of 500 clients" in text


def test_labels_that_do_not_fit_are_refused():
    partition = iid(10, 2, seed=0)
    for labels in (np.zeros(9, int), np.zeros(10), np.zeros((10, 1), int)):
        with pytest.raises(ValueError, match="labels must be a 1-D integer array with one label for each row up to 9"):
            partition_report(partition, labels)


PICTURES = {
    "dirichlet": (dirichlet(LABELS, 60, alpha=0.3, seed=0), LABELS),
    "many_clients": (dirichlet(LABELS, 1000, alpha=0.1, seed=0), LABELS),
    "equal_sizes": (shards(LABELS, 10, seed=0), LABELS),
    "no_labels": (iid(3000, 20, seed=0), None),
    "extreme_sizes": (quantity_skew(3000, 40, skew=3.0, seed=0), LABELS),
    "extreme_sizes_no_labels": (quantity_skew(3000, 40, skew=3.0, seed=0), None),
    "many_classes": (iid(3000, 20, seed=0), np.arange(3000) % 62),
    "one_client": (iid(3000, 1, seed=0), LABELS),
}


@pytest.mark.parametrize("name", cases(PICTURES, later=set(PICTURES) - {"many_clients", "extreme_sizes_no_labels"}))
def test_pictures(name, tmp_path):
    from PIL import Image

    partition, labels = PICTURES[name]
    path = tmp_path / "partition.png"
    plot_partition(partition_report(partition, labels), path)
    with Image.open(path) as image:
        assert image.width > 1000 and image.height > 700
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_other_formats(tmp_path):
    plot_partition(partition_report(iid(100, 3, seed=0)), tmp_path / "partition.svg")
    assert "<svg" in (tmp_path / "partition.svg").read_text()
