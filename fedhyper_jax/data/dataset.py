"""The result of a loader: arrays in host memory, split into training and test examples."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from fedhyper_jax.data.federated import ClientData


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Dataset:
    """A set of examples before it is divided over clients.

    Attributes:
      name: of the set.
      train: training examples, ``"x"`` (N, *input_shape) and ``"y"``: for classification (N,) int32 in
        [0, num_classes); for next_symbol (N, length) int32 likewise, each the symbol after that of ``"x"``; for
        regression (N, outputs) float32.
      test: test examples, likewise.
      num_classes: number of labels or of symbols; None for regression.
      input_shape: shape of one input; images are height, width, channels.
      source: where these arrays came from and what was done to them.
      task: what is learned: "classification", "next_symbol" or "regression".
      train_client_ids: (N,) owner of each training example, where the set knows its users; else None.
      test_client_ids: owner of each test example, likewise.
      clients: the clients themselves where they are made on demand, and are not to be divided; ``train`` then holds a
        few examples of such clients, for their shapes.
    """

    name: str
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    num_classes: int | None
    input_shape: tuple[int, ...]
    source: str
    task: str = "classification"
    train_client_ids: np.ndarray | None = None
    test_client_ids: np.ndarray | None = None
    clients: ClientData | None = None

    @property
    def has_labels(self) -> bool:
        """Whether every training example has one integer label, by which it can be divided."""
        return self.train["y"].ndim == 1 and self.train["y"].dtype.kind in "iu"

    def __repr__(self) -> str:
        number = f"{len(self.train['y'])} training" if self.clients is None else f"{self.clients.population} clients'"
        kinds = {"classification": "classes", "next_symbol": "symbols"}
        targets = f"{self.num_classes} {kinds[self.task]}" if self.task in kinds else "numbers to predict"
        return (
            f"<Dataset {self.name}: {number} and {len(self.test['y'])} test examples of shape "
            f"{self.input_shape}, {targets}; {self.source}>"
        )


def pixels(images: np.ndarray, mean: ArrayLike = 0.0, std: ArrayLike = 1.0) -> np.ndarray:
    """Standardises 8-bit images, (x/255 − mean)/std, as float32 with a channel axis.

    Args:
      images: (N, height, width) or (N, height, width, channels) uint8.
      mean: of the pixels on a scale of 0 to 1, one number or one a channel.
      std: likewise, > 0.

    Returns:
      (N, height, width, channels) float32.

    Raises:
      ValueError: images of another dtype or number of axes.

    Example:
      >>> pixels(np.full((1, 2, 2), 255, np.uint8), mean=0.5, std=0.25).ravel()
      array([2., 2., 2., 2.], dtype=float32)
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(f"images must be uint8 with 3 or 4 axes, got shape {images.shape} and dtype {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    scaled = images.astype(np.float32)
    # in place: three temporaries of 60,000 images would need 0.5 GB
    scaled /= np.float32(255)
    scaled -= np.asarray(mean, np.float32)
    scaled /= np.asarray(std, np.float32)
    return scaled
