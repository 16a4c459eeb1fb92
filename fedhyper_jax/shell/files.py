"""Files that are written as a whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str], mode: str = "w") -> Iterator[Any]:
    """A file beside ``path`` to write into, which takes its place at the end: readers see the old one or the new one.

    Where an exception ends the block, what stood there stays.

    Args:
      path: of the file; its folder exists.
      mode: "w" for text in UTF-8, "wb" for bytes.

    Yields:
      The open file; it has reached the disk before it takes its place.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "a.txt")
      ...     with written_whole(path) as file:
      ...         _ = file.write("half")
      ...         there = path.exists()
      ...     there, path.read_text()
      (False, 'half')
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
