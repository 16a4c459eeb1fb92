"""IDX, the file format of MNIST and its successors, read strictly; gzip or plain.

A file is: two zero bytes, a type code, the number of axes, each axis as a big-endian 32-bit count, then the numbers.
Reference: LeCun, Cortes, Burges, "The MNIST database of handwritten digits" (the format's description).
"""

import gzip
import math
import os
import pathlib
import zlib
from typing import IO

import numpy as np

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads one IDX file, compressed or not, whatever its name says.

    Args:
      path: the file.

    Returns:
      The array, in the machine's byte order.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged compression, wrong magic bytes, or more or fewer bytes than the header announces.
    """
    path = pathlib.Path(path)
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or magic[3] == 0:
                raise ValueError(f"{path} is not an IDX file: it begins with {magic.hex(' ')!r}; fetch it again")
            header = file.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise ValueError(f"{path} is truncated inside its header; fetch it again")
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
            dtype = np.dtype(_TYPES[magic[2]])
            expected = math.prod(shape) * dtype.itemsize
            body = _read_up_to(file, expected)
            extra = len(file.read(1))
    except (EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise
        raise ValueError(f"{path} is damaged or truncated ({error}); fetch it again") from error
    if len(body) != expected or extra:
        found = "more" if extra else f"{len(body):,}"
        raise ValueError(
            f"{path} should hold {expected:,} bytes after its header for shape {shape}, has {found}; fetch it again"
        )
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _read_up_to(file: IO[bytes], length: int) -> bytearray:
    """At most ``length`` bytes, in pieces: a damaged header may claim more bytes than there is memory."""
    content = bytearray()
    while len(content) < length and (piece := file.read(min(length - len(content), 1 << 24))):
        content += piece
    return content


def find_files(folder: pathlib.Path) -> tuple[dict[str, pathlib.Path], list[str]]:
    """The four files of an MNIST-like set in a folder, plain or ``.gz``, and the names of those that are missing."""
    found, missing = {}, []
    for key, name in FILES.items():
        names = (name, name.replace("-idx", ".idx"))  # the second as unpacked by some archives
        candidates = [folder / f"{stem}{suffix}" for stem in names for suffix in ("", ".gz")]
        present = [path for path in candidates if path.is_file()]
        if present:
            found[key] = present[0]
        else:
            missing.append(f"{name}[.gz]")
    return found, missing


def read_image_set(files: dict[str, pathlib.Path], num_classes: int) -> dict[str, np.ndarray]:
    """Reads and cross-checks the four files: ``{"train_images": (N, H, W) uint8, "train_labels": (N,) uint8, ...}``.

    Raises:
      ValueError: a damaged file, images or labels of a wrong type or number of axes, different numbers of images and
        labels, no example, labels out of range.
    """
    arrays = {key: read_idx(path) for key, path in files.items()}
    for key, array in arrays.items():
        axes = 3 if key.endswith("images") else 1
        if array.ndim != axes or array.dtype != np.uint8 or array.size == 0:
            raise ValueError(
                f"{files[key]} must hold unsigned bytes with {axes} axes, got shape {array.shape} and dtype "
                f"{array.dtype}; it seems to be another file"
            )
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if len(images) != len(labels):
            raise ValueError(
                f"{files[f'{split}_images']} has {len(images):,} images but {files[f'{split}_labels']} has "
                f"{len(labels):,} labels; take both from one set"
            )
        if labels.max() >= num_classes:
            raise ValueError(f"{files[f'{split}_labels']} has label {labels.max()}; labels must be below {num_classes}")
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise ValueError(f"{files['train_images']} and {files['test_images']} hold images of different sizes")
    return arrays
