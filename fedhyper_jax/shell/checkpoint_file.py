"""One checkpoint, one file: a tree of arrays with notes, bit by bit, that is there as a whole or not at all.

The first line has the SHA-256 of all that follows it: a line of JSON (the notes; names, shapes and types of the arrays)
and the bytes of the arrays. It is written under another name, reaches the disk, and is then renamed, so that a kill at
any moment leaves the old files or the new one. No pickle: nothing in it can be run.
"""

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedhyper_jax.base import PyTree
from fedhyper_jax.shell.files import written_whole

_MAGIC = b"fedhyper checkpoint 1"


class DamagedCheckpoint(ValueError):
    """A file that is not, or no longer, what `write_checkpoint` wrote."""


class Checkpoint(NamedTuple):
    """A checkpoint as it was read."""

    notes: dict[str, Any]
    arrays: dict[str, Any]  # by their names in the tree: NumPy arrays, or keys of JAX
    weak: frozenset[str]  # names of arrays whose type gives way in promotions


def write_checkpoint(path: str | os.PathLike[str], state: PyTree, notes: dict[str, Any]) -> None:
    """Writes a tree of arrays and its notes; when this returns, the file has reached the disk.

    Args:
      path: of the file; replaced if there.
      state: arrays of any type of JAX, keys included; arrays of several processes must be whole in each.
      notes: anything that JSON can hold.

    Example:
      >>> import tempfile
      >>> state = {"rate": jnp.bfloat16(0.1), "key": jax.random.key(3)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_checkpoint(folder + "/one", state, {"round": 7})
      ...     read = read_checkpoint(folder + "/one")
      >>> read.notes, bool((restore(read, state)["key"] == state["key"]).all())
      ({'round': 7}, True)
    """
    path = pathlib.Path(path)
    entries, chunks = [], []
    for name, leaf in _named(state):
        entry, values = _entry(leaf)
        entries.append({"name": name, **entry})
        chunks.append(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    header = json.dumps({"notes": notes, "arrays": entries}, ensure_ascii=False).encode() + b"\n"
    digest = hashlib.sha256(header)
    for chunk in chunks:
        digest.update(chunk)
    with written_whole(path, "wb") as file:
        file.write(b"%s %s\n" % (_MAGIC, digest.hexdigest().encode()))
        file.write(header)
        for chunk in chunks:
            file.write(chunk)
    sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes names in a folder reach the disk, where a folder can be opened (not on Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
      DamagedCheckpoint: the file is truncated, altered or something else; says which.
    """
    content = pathlib.Path(path).read_bytes()
    body = content.find(b"\n") + 1
    header_end = content.find(b"\n", body) + 1
    magic, _, expected = content[: body - 1].rpartition(b" ") if body else (b"", b"", b"")
    if magic != _MAGIC:
        raise DamagedCheckpoint("its first line is not that of a checkpoint")
    view = memoryview(content)
    if hashlib.sha256(view[body:]).hexdigest().encode() != expected:
        raise DamagedCheckpoint("its content is not what was written (SHA-256 differs)")
    table, rest = json.loads(content[body:header_end]), view[header_end:]
    arrays, position = {}, 0
    for entry in table["arrays"]:
        dtype, shape = jnp.dtype(entry["dtype"]), tuple(entry["shape"])
        end = position + math.prod(shape) * dtype.itemsize
        # (copied, since nothing aligns it in the file)
        values = np.array(np.frombuffer(rest[position:end], np.uint8)).view(dtype).reshape(shape)
        key = entry.get("key")
        arrays[entry["name"]] = values if key is None else jax.random.wrap_key_data(jnp.asarray(values), impl=key)
        position = end
    return Checkpoint(table["notes"], arrays, frozenset(entry["name"] for entry in table["arrays"] if entry["weak"]))


def restore(checkpoint: Checkpoint, like: PyTree) -> PyTree:
    """The tree of a checkpoint, as arrays of JAX.

    Args:
      checkpoint: see `read_checkpoint`.
      like: a tree of arrays, or of `jax.ShapeDtypeStruct`, of the same structure, shapes and types.

    Raises:
      ValueError: ``like`` has other arrays; names the first difference.
    """
    wanted = dict(_named(like))
    for name in [*wanted, *checkpoint.arrays]:
        if name not in wanted or name not in checkpoint.arrays:
            where = "in the checkpoint" if name in checkpoint.arrays else "in the state"
            raise ValueError(f"array {name} is only {where}: it is of another algorithm or model")
        found, given = ((tuple(x.shape), x.dtype) for x in (checkpoint.arrays[name], wanted[name]))
        if found != given:
            raise ValueError(f"array {name} is {found[0]} {found[1]} in the checkpoint, not {given[0]} {given[1]}")
    leaves = [_on_device(checkpoint.arrays[name], name in checkpoint.weak) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named(tree: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path), leaf


def _entry(leaf: Any) -> tuple[dict[str, Any], np.ndarray]:
    """How an array is described, and its values on the host."""
    weak = bool(getattr(leaf, "weak_type", False))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = leaf.addressable_data(0)  # whole here, see `strategies.place`
    key = {}
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        key, leaf = {"key": str(jax.random.key_impl(leaf))}, jax.random.key_data(leaf)
    values = np.asarray(leaf)
    return {"shape": list(values.shape), "dtype": values.dtype.name, "weak": weak, **key}, values


def _on_device(values: Any, weak: bool) -> jax.Array:
    if not weak:
        return jnp.array(values)
    # An update in place keeps the type of what is updated; there is no plainer public way to a weak type.
    return jnp.broadcast_to(jnp.asarray(values.dtype.type(0).item()), values.shape).at[...].set(values)
