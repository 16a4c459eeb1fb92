"""Classification sets of TensorFlow Datasets, read at random access so that reading needs no TensorFlow.

Only the *first preparation* of some sets (MNIST, Fashion-MNIST, CIFAR) needs TensorFlow, because their builders parse
the downloads with it; the prepared ``array_record`` files are read with the array_record and pillow packages alone.
"""

import importlib.util
import os
from typing import Any

import numpy as np

from fedhyper_jax import _validate
from fedhyper_jax.data.dataset import Dataset, pixels


def load_tfds(
    name_or_builder: Any,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_key: str = "image",
    label_key: str = "label",
    splits: tuple[str, str] = ("train", "test"),
    mean: float | tuple[float, ...] = 0.0,
    std: float | tuple[float, ...] = 1.0,
) -> Dataset:
    """Loads an image classification set of TensorFlow Datasets.

    Args:
      name_or_builder: a registered name such as ``"cifar10"`` or ``"emnist/balanced"``, or a builder of one's own
        (made with ``file_format="array_record"``).
      data_dir: where prepared sets live; None is TFDS's own choice ($TFDS_DATA_DIR or ``~/tensorflow_datasets``).
      image_key: feature that holds the 8-bit image.
      label_key: feature that holds the class.
      splits: names of the training and the test split; TFDS's slicing syntax works.
      mean: subtracted from the pixels, on a scale of 0 to 1; a number or one a channel.
      std: divides them; with the defaults pixels stay in [0, 1].

    Returns:
      A `Dataset`. A set not yet prepared is downloaded and prepared first, where that is possible.

    Raises:
      FileNotFoundError: the set is not prepared and TensorFlow, which its preparation needs, is not installed, or the
        preparation failed.
      ModuleNotFoundError: TensorFlow Datasets, array_record or pillow is not installed.
      ValueError: unknown name, split or feature, images not 8-bit or of varying size, or a set prepared in a format
        without random access.

    Reference: TensorFlow Datasets, a collection of ready-to-use datasets, https://www.tensorflow.org/datasets
    """
    _validate.installed("load_tfds", "tensorflow_datasets", "array_record", "PIL")
    import tensorflow_datasets as tfds

    builder = _builder(tfds, name_or_builder, data_dir)
    features = builder.info.features
    for key in (image_key, label_key):
        if key not in features:
            hint = _validate.did_you_mean(key, features)
            raise ValueError(f"{builder.name} has no feature {key!r}; {hint}it has {', '.join(sorted(features))}")
    if not isinstance(features[label_key], tfds.features.ClassLabel):
        raise ValueError(f"feature {label_key!r} of {builder.name} is not a class label but {features[label_key]!r}")
    parts = []
    for split in splits:
        images, labels = _read(_data_source(tfds, builder, split), image_key, label_key, f"{builder.name}[{split}]")
        parts.append({"x": pixels(images, mean, std), "y": labels})
    train, test = parts
    return Dataset(
        name=builder.name,
        train=train,
        test=test,
        num_classes=features[label_key].num_classes,
        input_shape=train["x"].shape[1:],
        source=f"TensorFlow Datasets {builder.info.full_name}",
    )


def _builder(tfds: Any, name_or_builder: Any, data_dir: Any) -> Any:
    if isinstance(name_or_builder, tfds.core.DatasetBuilder):
        if data_dir is not None:
            raise ValueError(f"a builder has a data_dir of its own, got data_dir={data_dir!r} as well; leave it out")
        return name_or_builder
    try:
        return tfds.builder(name_or_builder, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"TensorFlow Datasets has no set {name_or_builder!r}; see tfds.list_builders()") from error
    except ValueError as error:
        if "File format is already set" not in str(error):
            raise
        raise ValueError(_other_format(name_or_builder)) from error


def _other_format(name: str) -> str:
    return (
        f"{name} is prepared in a file format without random access; prepare it again under another data_dir with "
        "file_format='array_record'"
    )


def _data_source(tfds: Any, builder: Any, split: str) -> Any:
    """The split, prepared first if need be. Reading is tried first: `tfds.testing.mock_data` serves unprepared sets."""
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        if builder.is_prepared():
            raise ValueError(_other_format(builder.name)) from error
    except (KeyError, ValueError) as error:
        if builder.is_prepared():
            known = ", ".join(builder.info.splits)
            raise ValueError(f"{builder.name} has no examples in split {split!r}; its splits are {known}") from error
    # a set of the user's own may need no TensorFlow; those that ship with TFDS and were asked for here do need it
    own = not type(builder).__module__.startswith("tensorflow_datasets.")
    place = f"looked in {builder.data_path}"
    if not own and importlib.util.find_spec("tensorflow") is None:
        raise FileNotFoundError(
            f"{builder.name} is not prepared ({place}), and its first preparation needs TensorFlow: "
            "pip install 'fedhyper-jax[tensorflow]' and load it once with network access; later reads need neither"
        )
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise FileNotFoundError(f"{builder.name} is not prepared ({place}); preparing it failed: {error}") from error
    return builder.as_data_source(split=split)


def _read(source: Any, image_key: str, label_key: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    if len(source) == 0:
        raise ValueError(f"{where} is empty; choose another split")
    images, labels = None, np.empty(len(source), np.int32)
    for row in range(len(source)):
        example = source[row]
        image = example[image_key]
        if images is None:
            images = np.empty((len(source), *image.shape), image.dtype)
        if image.shape != images.shape[1:]:
            shapes = f"{images.shape[1:]} and {image.shape}"
            raise ValueError(f"{where} has images of varying size, {shapes}; resize them first")
        images[row] = image
        labels[row] = example[label_key]
    return images, labels
