"""Named data sets: scikit-learn's, Fashion-MNIST and MNIST from IDX files or TFDS, CIFAR from TFDS, made-up ones."""

import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from fedhyper_jax import _validate
from fedhyper_jax.data import _idx
from fedhyper_jax.data._tfds import load_tfds
from fedhyper_jax.data.dataset import Dataset, pixels
from fedhyper_jax.data.procedural import load_procedural_logistic
from fedhyper_jax.data.synthetic import synthetic_logistic
from fedhyper_jax.data.text import synthetic_text

# variable: of the environment, names the folder; title: torchvision's folder; mean, std: of the training pixels
_SPECIFIC = {
    "fashion_mnist": {
        "variable": "FASHION_MNIST",
        "title": "FashionMNIST",
        "places": ("/usr/share/datasets/fashion-mnist", "~/.keras/datasets/fashion-mnist"),
        "mean": 0.286,
        "std": 0.353,
        "hint": "apt-get install dataset-fashion-mnist",
    },
    "mnist": {
        "variable": "MNIST",
        "title": "MNIST",
        "places": (),
        "mean": 0.1307,
        "std": 0.3081,
        "hint": "put its four IDX files into a folder and name it in $MNIST",
    },
}


def load_digits() -> Dataset:
    """The 1,797 handwritten digits that ship with scikit-learn: 8 × 8 grey pixels in [0, 1], no network needed.

    The split is fixed and stratified, whatever the seed of a run: of each class, in the file's order, every fifth
    example is a test example. That makes 1,442 for training and 355 for testing.

    Returns:
      A `Dataset` with inputs (8, 8, 1).

    Example:
      >>> load_digits()
      <Dataset digits: 1442 training and 355 test examples of shape (8, 8, 1), 10 classes; ...>

    Reference: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (1998);
      its test part, as shipped by scikit-learn.
    """
    images, labels = _digits()
    in_test = np.zeros(len(labels), bool)
    for label in range(10):
        in_test[np.flatnonzero(labels == label)[4::5]] = True
    x = (images.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    y = labels.astype(np.int32)
    return Dataset(
        name="digits",
        train={"x": x[~in_test], "y": y[~in_test]},
        test={"x": x[in_test], "y": y[in_test]},
        num_classes=10,
        input_shape=(8, 8, 1),
        source="scikit-learn's digits, pixels / 16",
    )


def _table(name: str, delimiter: str | None = None) -> np.ndarray | None:
    """A table of scikit-learn's, if its file is where it was; importing scikit-learn takes longer than reading it."""
    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = pathlib.Path(folder) / "datasets" / "data" / name
        if file.is_file():
            return np.loadtxt(file, delimiter=delimiter)
    return None


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels."""
    table = _table("digits.csv.gz", ",")
    if table is not None:
        return table[:, :-1], table[:, -1]
    _validate.installed("the data set digits", "sklearn")
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def load_diabetes() -> Dataset:
    """The 442 patients of the diabetes study that ship with scikit-learn, no network needed: a regression.

    Ten measurements (age, sex, body mass index, blood pressure, six of blood serum) predict how far the disease has
    gone a year later. Inputs and target are standardised by mean and standard deviation of the training patients. The
    split is fixed whatever the seed of a run: every fifth patient in the file's order is a test example.

    Returns:
      A `Dataset` for the task "regression" with inputs (10,) and targets (1,).

    Example:
      >>> load_diabetes()
      <Dataset diabetes: 354 training and 88 test examples of shape (10,), numbers to predict; ...>

    Reference: Efron, Hastie, Johnstone, Tibshirani, "Least Angle Regression", Annals of Statistics 32 (2004)
    """
    x, y = _diabetes()
    in_test = np.arange(len(y)) % 5 == 4

    def standardised(array: np.ndarray) -> np.ndarray:
        mean, std = array[~in_test].mean(axis=0), array[~in_test].std(axis=0)
        return ((array - mean) / std).astype(np.float32)

    x, y = standardised(x), standardised(y[:, None])
    return Dataset(
        name="diabetes",
        train={"x": x[~in_test], "y": y[~in_test]},
        test={"x": x[in_test], "y": y[in_test]},
        num_classes=None,
        input_shape=(10,),
        source="scikit-learn's diabetes, standardised",
        task="regression",
    )


def _diabetes() -> tuple[np.ndarray, np.ndarray]:
    """Measurements and how far the disease has gone."""
    x, y = _table("diabetes_data_raw.csv.gz"), _table("diabetes_target.csv.gz")
    if x is not None and y is not None:
        return x, y
    _validate.installed("the data set diabetes", "sklearn")
    from sklearn.datasets import load_diabetes

    return load_diabetes(return_X_y=True, scaled=False)


def load_fashion_mnist(
    source: str = "auto",
    folder: str | os.PathLike[str] | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    standardise: bool = True,
) -> Dataset:
    """Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28 × 28, ten classes.

    Pixels are (x/255 − 0.286)/0.353, the training set's mean and standard deviation, or x/255.

    Args:
      source: ``"idx"`` reads the original files, ``"tfds"`` TensorFlow Datasets, ``"auto"`` the first, else the second.
      folder: of the IDX files (plain or ``.gz``). None looks at $FASHION_MNIST if it is set, else into torchvision's
        raw folders below ``.``, ``./data``, ``~`` and ``~/data``, Debian's ``dataset-fashion-mnist`` and Keras' cache.
      data_dir: of TensorFlow Datasets, see `load_tfds`.
      standardise: whether pixels are standardised.

    Returns:
      A `Dataset` with inputs (28, 28, 1).

    Raises:
      FileNotFoundError: not found; names every place searched and what to install.
      ValueError: unknown source, or a damaged file, which is named.

    Reference: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
      Algorithms", arXiv 1708.07747
    """
    return _load_mnist_like("fashion_mnist", source, folder, data_dir, standardise)


def load_mnist(
    source: str = "auto",
    folder: str | os.PathLike[str] | None = None,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    standardise: bool = True,
) -> Dataset:
    """MNIST: 60,000 + 10,000 handwritten digits, 28 × 28 grey pixels, ten classes.

    Pixels are (x/255 − 0.1307)/0.3081, the training set's mean and standard deviation, or x/255.

    Args:
      source: ``"idx"`` reads the original files, ``"tfds"`` TensorFlow Datasets, ``"auto"`` the first, else the second.
      folder: of the IDX files (plain or ``.gz``). None looks at $MNIST if it is set, else into torchvision's raw
        folders below ``.``, ``./data``, ``~`` and ``~/data``.
      data_dir: of TensorFlow Datasets, see `load_tfds`.
      standardise: whether pixels are standardised.

    Returns:
      A `Dataset` with inputs (28, 28, 1).

    Raises:
      FileNotFoundError: not found; names every place searched and what to install.
      ValueError: unknown source, or a damaged file, which is named.

    Reference: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", Proceedings of
      the IEEE 86 (1998)
    """
    return _load_mnist_like("mnist", source, folder, data_dir, standardise)


def _load_mnist_like(name: str, source: str, folder: Any, data_dir: Any, standardise: bool) -> Dataset:
    _validate.one_of(("auto", "idx", "tfds"), source=source)
    facts = _SPECIFIC[name]
    scale = {"mean": facts["mean"], "std": facts["std"]} if standardise else {}
    searched = []
    if source != "tfds":
        files, searched = locate_files(name, folder)
        if files:
            arrays = _idx.read_image_set(files, num_classes=10)
            train, test = (
                {"x": pixels(arrays[f"{split}_images"], **scale), "y": arrays[f"{split}_labels"].astype(np.int32)}
                for split in ("train", "test")
            )
            return Dataset(
                name=name,
                train=train,
                test=test,
                num_classes=10,
                input_shape=train["x"].shape[1:],
                source=f"IDX files in {files['train_images'].parent}",
            )
    # a folder named by the user that lacks the files is a mistake to report, not to paper over with another source
    if source == "tfds" or (source == "auto" and not _explicit(name, folder)):
        try:
            return load_tfds(name, data_dir=data_dir, **scale)
        except (FileNotFoundError, ImportError) as error:
            searched.append(f"TensorFlow Datasets: {error}")
    raise FileNotFoundError(
        f"{name} was not found. To get it: {facts['hint']}; or, for its first preparation by TensorFlow Datasets, "
        "pip install 'fedhyper-jax[tensorflow]'. Searched:" + "".join(f"\n  {place}" for place in searched)
    )


def _explicit(name: str, folder: Any) -> str | None:
    return os.fspath(folder) if folder is not None else os.environ.get(_SPECIFIC[name]["variable"]) or None


def locate_files(name: str, folder: Any) -> tuple[dict[str, pathlib.Path] | None, list[str]]:
    """The four IDX files of the first folder that has them all, and a line about every folder searched until then."""
    title = _SPECIFIC[name]["title"]
    explicit = _explicit(name, folder)
    if explicit is not None:
        roots = [explicit, f"{explicit}/raw", f"{explicit}/{title}/raw"]
    else:
        roots = [f"{root}/{title}/raw" for root in (".", "./data", "~", "~/data")] + list(_SPECIFIC[name]["places"])
    searched = []
    for root in roots:
        place = pathlib.Path(root).expanduser()
        files, missing = _idx.find_files(place)
        if not missing:
            return files, searched
        searched.append(f"{place} (lacks {', '.join(missing)})" if files else f"{place}")
    return None, searched


LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": load_digits,
    "fashion_mnist": load_fashion_mnist,
    "mnist": load_mnist,
    "cifar10": functools.partial(load_tfds, "cifar10", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": functools.partial(load_tfds, "cifar100", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    "diabetes": load_diabetes,
    "synthetic_logistic": synthetic_logistic,
    "synthetic_text": synthetic_text,
    "procedural_logistic": load_procedural_logistic,
}
"""Loaders by name; each returns a `Dataset`. Those that take ``num_clients`` make their clients, whatever number."""


def load(name: str, **settings: Any) -> Dataset:
    """Loads a data set by name.

    Args:
      name: a key of `LOADERS`.
      **settings: arguments of that loader.

    Returns:
      The `Dataset`.

    Raises:
      ValueError: an unknown name; lists the known ones.

    Example:
      >>> load("digits").num_classes
      10
    """
    _validate.one_of(LOADERS, **{"data set": name})
    return LOADERS[name](**settings)
