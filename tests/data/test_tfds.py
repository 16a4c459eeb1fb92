"""TensorFlow Datasets without TensorFlow: mocked sets by their real names, and a real one made here and read back."""

import importlib.util
import io
import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from fedhyper_jax.data import load, load_fashion_mnist, load_mnist, load_tfds

SHAPE = (6, 5, 3)


def raw(split: str, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, len(split)]).integers(0, 256, (23, *SHAPE), dtype=np.uint8)


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """PNG bytes, so that nothing here needs TensorFlow."""

    # A class of a package makes TFDS 4.9.10 import importlib_resources, which it declares for Python < 3.9 only.
    __module__ = "tiny_images"

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=SHAPE),
            "label": tfds.features.ClassLabel(num_classes=4),
            "number": np.int64,
            "mask": tfds.features.Image(shape=(None, None, 1)),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

    def _generate_examples(self, split):
        for number, image in enumerate(raw(split)):
            mask = np.zeros((2 + number % 2, 2), np.uint8)
            yield number, {"image": png(image), "label": number % 4, "number": number, "mask": png(mask)}


def png(image):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    buffer.seek(0)
    return buffer


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    builder = TinyImages(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return builder


def test_no_tensorflow_here():
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("load_it", [load_mnist, load_fashion_mnist])
def test_mocked_sets_by_their_real_names(load_it):
    with tfds.testing.mock_data(num_examples=7):
        dataset = load_it(source="tfds")
        plain = load_it(source="tfds", standardise=False)
    assert dataset.train["x"].shape == dataset.test["x"].shape == (7, 28, 28, 1)
    assert dataset.train["x"].dtype == np.float32 and dataset.train["y"].dtype == np.int32
    assert dataset.num_classes == 10 and dataset.input_shape == (28, 28, 1)
    assert dataset.source.startswith("TensorFlow Datasets ")
    mean, std = {"mnist": (0.1307, 0.3081), "fashion_mnist": (0.286, 0.353)}[dataset.name]
    assert plain.train["x"].min() >= 0 and plain.train["x"].max() <= 1
    np.testing.assert_allclose(dataset.train["x"], (plain.train["x"] - mean) / std, rtol=1e-5, atol=1e-6)


def test_mocked_cifar():
    with tfds.testing.mock_data(num_examples=3):
        ten, hundred = load("cifar10"), load("cifar100")
    assert ten.input_shape == hundred.input_shape == (32, 32, 3)
    assert (ten.num_classes, hundred.num_classes) == (10, 100)


def test_a_prepared_set_comes_back_pixel_by_pixel(prepared):
    dataset = load_tfds(prepared)
    assert dataset.name == "tiny_images" and dataset.num_classes == 4 and dataset.input_shape == SHAPE
    for split, examples in (("train", dataset.train), ("test", dataset.test)):
        # TFDS shuffles while it prepares; the feature "number" says what is where
        order = [example["number"] for example in prepared.as_data_source(split=split)]
        assert sorted(order) == list(range(23))
        np.testing.assert_array_equal(examples["y"], np.array(order) % 4)
        np.testing.assert_array_equal(np.round(examples["x"] * 255).astype(np.uint8), raw(split)[order])
        assert examples["x"].dtype == np.float32
    assert "tensorflow" not in sys.modules


def test_reading_from_the_folder_alone(prepared):
    again = load_tfds(tfds.builder_from_directory(prepared.data_dir))
    np.testing.assert_array_equal(again.train["x"], load_tfds(prepared).train["x"])


def test_standardising_per_channel(prepared):
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    plain, standard = load_tfds(prepared), load_tfds(prepared, mean=mean, std=std)
    np.testing.assert_allclose(standard.test["x"], (plain.test["x"] - np.array(mean)) / np.array(std), atol=1e-6)


def test_splits_and_keys(prepared):
    halves = load_tfds(prepared, splits=("train[:50%]", "train[50%:]"))
    assert len(halves.train["y"]) + len(halves.test["y"]) == 23
    with pytest.raises(
        ValueError, match="tiny_images has no examples in split 'validation'; its splits are train, test"
    ):
        load_tfds(prepared, splits=("train", "validation"))
    with pytest.raises(ValueError, match="tiny_images has no feature 'pixels'; it has image, label, mask, number"):
        load_tfds(prepared, image_key="pixels")
    with pytest.raises(ValueError, match="feature 'number' of tiny_images is not a class label"):
        load_tfds(prepared, label_key="number")
    with pytest.raises(ValueError, match="has images of varying size"):
        load_tfds(prepared, image_key="mask")
    with pytest.raises(ValueError, match=r"tiny_images has no examples in split 'train\[:0\]'"):
        load_tfds(prepared, splits=("train[:0]", "test"))


def test_an_unprepared_builder_is_prepared(tmp_path):
    builder = TinyImages(data_dir=tmp_path, file_format="array_record")
    assert len(load_tfds(builder).train["y"]) == 23
    assert builder.is_prepared()


def test_a_preparation_that_fails_is_reported(tmp_path, monkeypatch):
    builder = TinyImages(data_dir=tmp_path, file_format="array_record")
    monkeypatch.setattr(TinyImages, "_split_generators", lambda self, dl_manager: 1 / 0)
    message = r"tiny_images is not prepared .*preparing it failed: .*division by zero"
    with pytest.raises(FileNotFoundError, match=message):
        load_tfds(builder)


def test_a_set_prepared_without_random_access(tmp_path):
    builder = TinyImages(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    facts = tmp_path / "tiny_images" / "1.0.0" / "dataset_info.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="without random access; prepare it again under another data_dir"):
        load_tfds(TinyImages(data_dir=tmp_path))


def test_unknown_names_and_superfluous_arguments(prepared, tmp_path):
    with pytest.raises(ValueError, match="TensorFlow Datasets has no set 'fashion_mist'"):
        load_tfds("fashion_mist")
    with pytest.raises(ValueError, match="a builder has a data_dir of its own"):
        load_tfds(prepared, data_dir=tmp_path)


def test_an_unprepared_set_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorflow" else found(name))
    with pytest.raises(FileNotFoundError, match=r"mnist is not prepared .*pip install 'fedhyper-jax\[tensorflow\]'"):
        load_tfds("mnist", data_dir=tmp_path)
