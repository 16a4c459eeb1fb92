"""Named sets: the fixed split of digits, Fashion-MNIST as installed, and what a missing set says."""

import gzip
import hashlib
import os
import struct

import numpy as np
import pytest

from fedhyper_jax.data import LOADERS, load, load_digits, load_fashion_mnist, load_mnist, sources
from fedhyper_jax.data.dataset import pixels


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A working directory, a home and TFDS folders with nothing in them, and no Debian package."""
    for name in ("FASHION_MNIST", "MNIST"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    work = tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    from fedhyper_jax.data import sources

    monkeypatch.setitem(sources._SPECIFIC["fashion_mnist"], "places", (f"{tmp_path}/no-package",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return tmp_path


def write_set(folder, number=5, suffix=".gz"):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(number)
    images, labels = rng.integers(0, 256, (number, 28, 28), np.uint8), rng.integers(0, 10, number, np.uint8)
    pack = gzip.compress if suffix else bytes
    for split in ("train", "t10k"):
        head = struct.pack(">4B3I", 0, 0, 8, 3, number, 28, 28)
        (folder / f"{split}-images-idx3-ubyte{suffix}").write_bytes(pack(head + images.tobytes()))
        head = struct.pack(">4BI", 0, 0, 8, 1, number)
        (folder / f"{split}-labels-idx1-ubyte{suffix}").write_bytes(pack(head + labels.tobytes()))
    return images, labels


def test_digits_split_is_fixed_and_stratified():
    dataset = load_digits()
    train, test = dataset.train, dataset.test
    assert train["x"].shape == (1442, 8, 8, 1) and test["x"].shape == (355, 8, 8, 1)
    assert train["x"].dtype == np.float32 and train["y"].dtype == np.int32
    assert train["x"].min() == 0 and train["x"].max() == 1
    assert np.bincount(train["y"]).tolist() == [143, 146, 142, 147, 145, 146, 145, 144, 140, 144]
    assert np.bincount(test["y"]).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    # pixels are whole sixteenths, so the digest is exact on every machine; another split would change every table
    sha = hashlib.sha256()
    for part in (train, test):
        sha.update((part["x"] * 16).astype(np.uint8).tobytes())
        sha.update(part["y"].astype(np.uint8).tobytes())
    assert sha.hexdigest() == "eb16a5b9fcc31197ecd8be8456b687084ffc10eb4cc2efbd406de3cc793713c8"


def test_digits_parts_are_disjoint_and_complete():
    from sklearn.datasets import load_digits as original

    dataset = load_digits()
    images = np.concatenate([dataset.train["x"], dataset.test["x"]]).reshape(1797, 64) * 16
    expected = original().data
    assert sorted(map(bytes, images.astype(np.uint8))) == sorted(map(bytes, expected.astype(np.uint8)))


def test_digits_are_those_of_scikit_learn_wherever_its_file_is(monkeypatch):
    from sklearn.datasets import load_digits as original

    for hidden in (False, True):
        if hidden:
            monkeypatch.setattr(sources, "_table", lambda *where: None)
        for ours, theirs in zip(sources._digits(), original(return_X_y=True), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_patients_are_those_of_scikit_learn_wherever_its_files_are(monkeypatch):
    from sklearn.datasets import load_diabetes as original

    for hidden in (False, True):
        if hidden:
            monkeypatch.setattr(sources, "_table", lambda *where: None)
        for ours, theirs in zip(sources._diabetes(), original(return_X_y=True, scaled=False), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def installed_fashion_mnist():
    try:
        return load_fashion_mnist(source="idx")
    except FileNotFoundError as error:
        if os.environ.get("FEDHYPER_REQUIRE_FASHION_MNIST"):
            raise
        pytest.skip(str(error).splitlines()[0])


def test_fashion_mnist_as_installed():
    dataset = installed_fashion_mnist()
    assert dataset.train["x"].shape == (60000, 28, 28, 1) and dataset.test["x"].shape == (10000, 28, 28, 1)
    assert dataset.train["x"].dtype == np.float32 and dataset.train["y"].dtype == np.int32
    assert np.bincount(dataset.train["y"]).tolist() == [6000] * 10
    assert np.bincount(dataset.test["y"]).tolist() == [1000] * 10
    assert dataset.train["y"][:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert float(dataset.train["x"].mean()) == pytest.approx(0.0, abs=2e-3)  # the constants have three digits
    assert float(dataset.train["x"].std()) == pytest.approx(1.0, abs=2e-3)
    back = np.round((dataset.train["x"][:2] * 0.353 + 0.286) * 255).astype(int)
    assert back.sum(axis=(1, 2, 3)).tolist() == [76247, 84598]
    assert (dataset.num_classes, dataset.input_shape, dataset.name) == (10, (28, 28, 1), "fashion_mnist")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_a_folder_of_ones_own(tmp_path, suffix, below):
    images, labels = write_set(tmp_path / "set" / below, suffix=suffix)
    dataset = load_fashion_mnist(folder=tmp_path / "set", standardise=False)
    np.testing.assert_allclose(dataset.train["x"], images[..., None] / 255, atol=1e-7)
    np.testing.assert_array_equal(dataset.train["y"], labels)
    standard = load_fashion_mnist(folder=tmp_path / "set")
    np.testing.assert_allclose(standard.test["x"], (images[..., None] / 255 - 0.286) / 0.353, atol=1e-5)
    assert str(tmp_path) in dataset.source


@pytest.mark.parametrize("place", ["work/FashionMNIST/raw", "work/data/FashionMNIST/raw", "home/data/FashionMNIST/raw"])
def test_torchvision_folders_are_found(nowhere, place):
    write_set(nowhere / place, suffix="")
    assert len(load_fashion_mnist().train["y"]) == 5


def test_debian_and_keras_are_among_the_places():
    from fedhyper_jax.data import sources

    places = sources._SPECIFIC["fashion_mnist"]["places"]
    assert places == ("/usr/share/datasets/fashion-mnist", "~/.keras/datasets/fashion-mnist")


def test_the_environment_names_the_folder(nowhere, monkeypatch):
    write_set(nowhere / "mine", number=3)
    write_set(nowhere / "work/data/MNIST/raw", number=4)
    assert len(load_mnist().train["y"]) == 4
    monkeypatch.setenv("MNIST", str(nowhere / "mine"))
    assert len(load_mnist().train["y"]) == 3
    assert len(load_mnist(folder=nowhere / "work/data/MNIST/raw").train["y"]) == 4  # the argument comes first


def test_a_missing_set_says_what_to_install_and_where_it_looked(nowhere):
    with pytest.raises(FileNotFoundError) as caught:
        load_fashion_mnist()
    message = str(caught.value)
    assert "apt-get install dataset-fashion-mnist" in message
    assert "pip install 'fedhyper-jax[tensorflow]'" in message
    for place in ("FashionMNIST/raw", "data/FashionMNIST/raw", str(nowhere / "home/data"), "no-package", "TensorFlow"):
        assert place in message.split("Searched:")[1]
    with pytest.raises(FileNotFoundError, match=r"mnist was not found.*\$MNIST"):
        load_mnist(source="idx")


def test_a_named_folder_that_lacks_a_file_is_not_papered_over(nowhere, monkeypatch):
    write_set(nowhere / "mine")
    write_set(nowhere / "work/data/FashionMNIST/raw")  # another copy, which must not be taken instead
    (nowhere / "mine" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"mine \(lacks t10k-labels-idx1-ubyte\[.gz\]\)"):
        load_fashion_mnist(folder=nowhere / "mine")
    monkeypatch.setenv("FASHION_MNIST", str(nowhere / "absent"))
    with pytest.raises(FileNotFoundError, match="absent"):
        load_fashion_mnist()


def test_a_damaged_file_is_named(tmp_path):
    write_set(tmp_path / "set")
    path = tmp_path / "set" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged or truncated"):
        load_fashion_mnist(folder=tmp_path / "set")


def test_names():
    with pytest.raises(ValueError, match=r"unknown data set 'digit'; did you mean digits\? known: digits"):
        load("digit")
    with pytest.raises(ValueError, match="unknown source 'web'; known: auto, idx, tfds"):
        load_mnist(source="web")
    assert {"digits", "fashion_mnist", "mnist", "synthetic_logistic"} <= set(LOADERS)
    assert load("synthetic_logistic", num_clients=2, examples_per_client=5).num_classes == 10


def test_pixels_refuses_other_arrays():
    for images in (np.zeros((2, 3, 3)), np.zeros((3, 3), np.uint8)):
        with pytest.raises(ValueError, match="images must be uint8 with 3 or 4 axes"):
            pixels(images)
