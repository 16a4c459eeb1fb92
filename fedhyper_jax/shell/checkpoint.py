"""Parameters on disk, with orbax: atomic, any dtype of JAX, no pickle."""

import ast
import contextlib
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fedhyper_jax.base import Params
from fedhyper_jax.shell.records import PARAMETERS


def save_parameters(folder: str | os.PathLike[str], params: Params) -> None:
    """Writes parameters into a folder of their own, as a whole or not at all.

    Args:
      folder: to be made; must not exist.
      params: a dict, list or other tree of arrays.

    Raises:
      ValueError: the folder exists; params are a bare array, hold none or something else; an array has no elements,
        which orbax does not store.

    Example:
      >>> import jax.numpy as jnp, pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as parent:
      ...     save_parameters(parent + "/weights", {"w": jnp.array([1.0, 2.0])})
      ...     load_parameters(parent + "/weights")["w"].tolist()
      [1.0, 2.0]
    """
    import orbax.checkpoint as ocp

    folder = pathlib.Path(folder).absolute()
    if folder.exists():
        raise ValueError(f"{folder} exists already; parameters are written to a new folder")
    _check_arrays(params)
    with _plainly_named(folder, new=True) as place, _checkpointer() as checkpointer:
        checkpointer.save(place, args=ocp.args.StandardSave(params))


def _check_arrays(params: Params) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    if not leaves or leaves[0][0] == ():
        what = "one bare array" if leaves else "no array"
        raise ValueError(f'params must be a dict, a list or another tree of arrays, got {what}; give {{"w": array}}')
    for path, leaf in leaves:
        name = f"params{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            raise ValueError(f"{name} must be an array, got {leaf!r}; leave it out")
        if np.size(leaf) == 0:
            raise ValueError(f"{name} has no elements and cannot be stored; leave it out")


def load_parameters(folder: str | os.PathLike[str], like: Params | None = None) -> Params:
    """Reads parameters back, onto the default device.

    Args:
      folder: what `save_parameters` wrote, or a run folder.
      like: a tree of arrays (or of `jax.ShapeDtypeStruct`) of the same structure, shapes and dtypes, for trees that
        are more than lists and dicts by name: a named tuple comes back as one, and numbers as keys, only with it.

    Returns:
      The parameters.

    Raises:
      FileNotFoundError: no parameters there; a killed run leaves none.
      ValueError: ``like`` differs from what is stored; names the first difference. Or there is none, and a key may
        have been a number.
    """
    import orbax.checkpoint as ocp

    folder = pathlib.Path(folder).absolute()
    if (folder / PARAMETERS).is_dir():
        folder = folder / PARAMETERS
    # told where to put the arrays, orbax needs not find the devices that they were saved from
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if not (folder / "_CHECKPOINT_METADATA").is_file():
        raise FileNotFoundError(f"{folder} holds no parameters; a run writes them when it ends")
    with _plainly_named(folder) as place, _checkpointer() as checkpointer:
        stored = checkpointer.metadata(place).item_metadata.tree
        if like is None:
            _check_keys(stored)
        else:
            _check_like(like, stored)
        wanted = jax.tree.map(target, stored if like is None else like)
        return checkpointer.restore(place, args=ocp.args.StandardRestore(wanted))


@contextlib.contextmanager
def _plainly_named(folder: pathlib.Path, *, new: bool = False) -> Iterator[pathlib.Path]:
    """The folder where orbax can read it or, if ``new``, write it: it takes the path for a pattern of paths.

    A path in which ``[``, ``*`` or ``?`` stand is another folder to it, or several; such a one is copied.
    """
    if not glob.has_magic(os.fspath(folder)):
        yield folder
        return
    with tempfile.TemporaryDirectory() as parent:
        place = pathlib.Path(parent) / PARAMETERS
        if not new:
            shutil.copytree(folder, place)
        yield place
        if new:
            # as orbax does it: under another name first, so that the folder is there as a whole or not at all
            temporary = folder.with_name(f"{folder.name}.orbax-checkpoint-tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(place, temporary)
            temporary.replace(folder)


def _checkpointer():
    """A checkpointer for this process alone, be it one of many: it waits for no other."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def _check_keys(stored: Any) -> None:
    """Orbax makes strings of all keys, in whose order 10 comes before 2."""
    for path, _ in jax.tree_util.tree_flatten_with_path(stored)[0]:
        for key in (key.key for key in path if isinstance(key, jax.tree_util.DictKey)):
            if _may_be_a_number(key):
                raise ValueError(
                    f"parameters have the key {key}, of which it is not stored whether it was a number or a string; "
                    "give `like`, a tree of the same structure, e.g. model.init(key, inputs)"
                )


def _may_be_a_number(key: str) -> bool:
    """Or anything else that is written as it is read, such as a tuple."""
    try:
        ast.literal_eval(key)
    except (ValueError, SyntaxError):
        return False
    return True


def _check_like(like: Params, stored: Any) -> None:
    wanted, found = (
        {
            tuple(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        }
        for tree in (like, stored)
    )
    for path in [*wanted, *found]:
        name = ".".join(path)
        if path not in found or path not in wanted:
            where = "stored" if path in found else "in `like`"
            raise ValueError(f"parameter {name} is only {where}; load without `like` to see what is stored")
        given, kept = ((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in (wanted[path], found[path]))
        if given != kept:
            raise ValueError(f"parameter {name} is stored as {kept[0]} {kept[1]}, but `like` has {given[0]} {given[1]}")
