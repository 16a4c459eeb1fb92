"""The IDX reader, against bytes written by hand."""

import gzip
import struct

import numpy as np
import pytest

from fedhyper_jax.data._idx import find_files, read_idx, read_image_set

# zero, zero, unsigned byte, three axes; 2 images of 2 × 3
IMAGES = b"\0\0\x08\x03" + b"\0\0\0\x02" + b"\0\0\0\x02" + b"\0\0\0\x03" + bytes(range(12))
LABELS = b"\0\0\x08\x01" + b"\0\0\0\x02" + b"\x09\x00"


def write(path, content, packed=False):
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["images", "images.gz"])  # the bytes decide, not the name
def test_images(tmp_path, packed, name):
    array = read_idx(write(tmp_path / name, IMAGES, packed))
    assert array.dtype == np.uint8
    assert array.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


@pytest.mark.parametrize(
    ("code", "form", "values", "dtype"),
    [
        (0x09, ">2b", (-1, 127), np.int8),
        (0x0B, ">2h", (-2, 300), np.int16),
        (0x0C, ">2i", (-3, 70000), np.int32),
        (0x0D, ">2f", (0.5, -2.0), np.float32),
        (0x0E, ">2d", (0.1, -1e300), np.float64),
    ],
)
def test_other_types_are_big_endian(tmp_path, code, form, values, dtype):
    content = bytes([0, 0, code, 1]) + struct.pack(">I", 2) + struct.pack(form, *values)
    array = read_idx(write(tmp_path / "file", content))
    assert array.dtype == dtype and array.dtype.isnative and array.tolist() == list(values)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file"),
        (IMAGES[:3], "is not an IDX file"),
        (b"\x89PNG" + IMAGES[4:], "is not an IDX file: it begins with '89 50 4e 47'"),
        (b"\0\0\x07\x03" + IMAGES[4:], "is not an IDX file: it begins with '00 00 07 03'"),
        (b"\0\0\x08\x00", "is not an IDX file"),
        (b"\0\x01\x08\x03" + IMAGES[4:], "is not an IDX file"),
        (IMAGES[:10], "is truncated inside its header"),
        (IMAGES[:-1], r"should hold 12 bytes after its header for shape \(2, 2, 3\), has 11"),
        (IMAGES[:16], "has 0"),
        (IMAGES + b"\0", "has more"),
        (b"\0\0\x08\x03" + b"\xff" * 12 + bytes(12), "has 12"),  # a header that claims 10^28 bytes
    ],
)
def test_damaged_files_are_named(tmp_path, content, message, packed):
    path = write(tmp_path / "broken-file", content, packed)
    with pytest.raises(ValueError, match=f"broken-file.*{message}"):
        read_idx(path)


def test_damaged_compression_is_named(tmp_path):
    whole = gzip.compress(IMAGES * 50)
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 0xFF
    checksum = bytearray(gzip.compress(IMAGES))
    checksum[-5] ^= 0xFF
    for number, content in enumerate((whole[:-12], whole[:12], bytes(flipped), bytes(checksum), b"\x1f\x8b")):
        path = tmp_path / f"broken-{number}.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"broken-{number}.gz"):
            read_idx(path)


def test_a_missing_file_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        read_idx(tmp_path / "nothing-here")


def image_set(folder, **changes):
    parts = {"train-images-idx3-ubyte": IMAGES, "train-labels-idx1-ubyte": LABELS}
    parts |= {"t10k-images-idx3-ubyte": IMAGES, "t10k-labels-idx1-ubyte": LABELS}
    for number, (name, content) in enumerate((parts | changes).items()):
        if content is not None:
            # plain and packed files mixed, and the dotted names some archives use
            stem = name.replace("-idx", ".idx") if number == 3 else name
            write(folder / (stem + ".gz" if number % 2 else stem), content, bool(number % 2))
    return find_files(folder)


def test_an_image_set(tmp_path):
    files, missing = image_set(tmp_path)
    assert missing == [] and len(files) == 4
    arrays = read_image_set(files, num_classes=10)
    assert arrays["train_images"].shape == (2, 2, 3) and arrays["test_labels"].tolist() == [9, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train-images-idx3-ubyte": LABELS}, "train-images.* must hold unsigned bytes with 3 axes, got shape"),
        ({"t10k-labels-idx1-ubyte": IMAGES}, "t10k-labels.* must hold unsigned bytes with 1 axes, got shape"),
        ({"t10k-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x01\x09"}, "has 2 images but .* has 1 labels"),
        ({"train-labels-idx1-ubyte": b"\0\0\x08\x01\0\0\0\x02\x0a\0"}, "has label 10; labels must be below 10"),
        ({"train-images-idx3-ubyte": b"\0\0\x08\x03" + b"\0\0\0\0" * 3}, "must hold unsigned bytes"),
        (
            {"t10k-images-idx3-ubyte": b"\0\0\x08\x03\0\0\0\x02\0\0\0\x01\0\0\0\x01ab"},
            "hold images of different sizes",
        ),
    ],
)
def test_a_wrong_image_set_is_refused(tmp_path, changes, message):
    files, _ = image_set(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_image_set(files, num_classes=10)


def test_missing_files_are_listed(tmp_path):
    files, missing = image_set(tmp_path, **{"t10k-labels-idx1-ubyte": None})
    assert missing == ["t10k-labels-idx1-ubyte[.gz]"] and len(files) == 3
