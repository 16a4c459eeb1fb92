"""Parameters on disk, with orbax: atomic, any dtype of JAX, no pickle."""

import os
import pathlib
from typing import Any

import jax
import numpy as np

from fedhyper_jax.base import Params
from fedhyper_jax.shell.records import PARAMETERS


def save_parameters(folder: str | os.PathLike, params: Params) -> None:
    """Writes parameters into a folder of their own, as a whole or not at all.

    Args:
      folder: to be made; must not exist.
      params: a pytree of arrays.

    Raises:
      ValueError: the folder exists, or an array has no elements, which orbax does not store.

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
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if np.size(leaf) == 0:
            raise ValueError(f"params{jax.tree_util.keystr(path)} has no elements and cannot be stored; leave it out")
    with _checkpointer() as checkpointer:
        checkpointer.save(folder, args=ocp.args.StandardSave(params))


def load_parameters(folder: str | os.PathLike, like: Params | None = None) -> Params:
    """Reads parameters back, onto the default device.

    Args:
      folder: what `save_parameters` wrote, or a run folder.
      like: a tree of arrays (or of `jax.ShapeDtypeStruct`) of the same structure, shapes and dtypes, for trees that
        are more than dicts and lists: a named tuple comes back as one only with it.

    Returns:
      The parameters.

    Raises:
      FileNotFoundError: no parameters there; a killed run leaves none.
      ValueError: ``like`` differs from what is stored; names the first difference.
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
    with _checkpointer() as checkpointer:
        stored = checkpointer.metadata(folder).item_metadata.tree
        if like is not None:
            _check_like(like, stored)
        wanted = jax.tree.map(target, stored if like is None else like)
        return checkpointer.restore(folder, args=ocp.args.StandardRestore(wanted))


def _checkpointer():
    """A checkpointer for this process alone, be it one of many: it waits for no other."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
    )
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


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
