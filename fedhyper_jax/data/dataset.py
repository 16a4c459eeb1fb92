"""The result of a loader: arrays in host memory, split into training and test examples."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Dataset:
    """A classification set before it is divided over clients.

    Attributes:
      name: of the set.
      train: training examples, ``"x"`` (N, *input_shape) float32 and ``"y"`` (N,) int32 in [0, num_classes).
      test: test examples, likewise.
      num_classes: number of labels.
      input_shape: shape of one input; images are height, width, channels.
      source: where these arrays came from and what was done to them.
      train_client_ids: (N,) owner of each training example, where the set knows its users; else None.
      test_client_ids: owner of each test example, likewise.
    """

    name: str
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    num_classes: int
    input_shape: tuple[int, ...]
    source: str
    train_client_ids: np.ndarray | None = None
    test_client_ids: np.ndarray | None = None

    def __repr__(self) -> str:
        return (
            f"<Dataset {self.name}: {len(self.train['y'])} training and {len(self.test['y'])} test examples of shape "
            f"{self.input_shape}, {self.num_classes} classes; {self.source}>"
        )


def pixels(images: np.ndarray, mean: float | tuple = 0.0, std: float | tuple = 1.0) -> np.ndarray:
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
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    scaled = images.astype(np.float32)
    # in place: three temporaries of 60,000 images would need 0.5 GB
    scaled /= np.float32(255)
    scaled -= mean
    scaled /= std
    return scaled
