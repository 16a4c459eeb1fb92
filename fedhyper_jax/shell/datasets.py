"""From a configuration to a data set, divided over clients."""

import hashlib
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedhyper_jax import _validate
from fedhyper_jax.data import (
    LOADERS,
    PARTITIONERS,
    ClientData,
    Dataset,
    FederatedData,
    Partition,
    PartitionReport,
    hold_out,
    load,
    make_partition,
    pack,
    partition_report,
)
from fedhyper_jax.shell.config import DataConfig, any_of

_DIVISION = ("alpha", "shards_per_client", "distribution", "skew", "min_examples")
"""Settings that some partitioners take."""
_GOES_BY = {"dirichlet": "labels", "shards": "labels", "by_user": "users"}
"""What partitioners go by that not every data set has."""


class Clients(NamedTuple):
    """A data set, divided over clients.

    Attributes:
      dataset: the examples before.
      data: what clients train on.
      evaluated: what they are evaluated on one by one, or None.
      digest: hex SHA-256 of who owns what.
    """

    dataset: Dataset
    data: ClientData
    evaluated: FederatedData | None
    digest: str


def build_clients(config: DataConfig) -> Clients:
    """Loads the data set of a configuration and gives every client its examples.

    Raises:
      ValueError: unknown names, settings that the data set or the partitioner refuses.
      FileNotFoundError: files that are not there; the message says what to install.

    Example:
      >>> clients = build_clients(DataConfig(name="procedural_logistic", clients=1_000_000))
      >>> clients.data.population, clients.evaluated
      (1000000, None)
    """
    dataset, partition = build_partition(config)
    if partition is None:
        return Clients(dataset, dataset.clients, None, _digest_of(dataset.clients))
    data = evaluated = pack(dataset.train, partition.client_rows)
    if config.hold_out:
        data, evaluated = hold_out(data, config.hold_out, seed=config.partition_seed)
    return Clients(dataset, data, evaluated if config.evaluate_clients else None, partition.digest)


def build_partition(config: DataConfig) -> tuple[Dataset, Partition | None]:
    """Loads the data set of a configuration and divides its training examples; None where it makes its own clients.

    Raises:
      ValueError: unknown names, settings that the data set or the partitioner refuses.
      FileNotFoundError: files that are not there; the message says what to install.

    Example:
      >>> dataset, partition = build_partition(DataConfig(clients=20))
      >>> dataset.name, partition.num_clients
      ('digits', 20)
    """
    _validate.one_of(LOADERS, **{"data set": config.name})
    dataset = load(config.name, **_loader_settings(config))
    if dataset.clients is not None:
        _check_undivided(config)
        return dataset, None
    partitioner = config.partitioner or _natural_partitioner(dataset)
    _check_partitioner(partitioner, dataset)
    partition = make_partition(
        partitioner,
        dataset.train["y"],
        config.clients,
        client_ids=dataset.train_client_ids,
        seed=config.partition_seed,
        **_partitioner_settings(config, partitioner),
    )
    return dataset, partition


def _loader_settings(config: DataConfig) -> dict[str, Any]:
    taken = inspect.signature(LOADERS[config.name]).parameters
    settings = {}
    if config.source is not None:
        settings["source"] = config.source
    if config.folder is not None:
        # TensorFlow Datasets calls its folder data_dir
        settings["folder" if "folder" in taken and config.source != "tfds" else "data_dir"] = config.folder
    for setting, flag in (("source", "source"), ("folder", "folder"), ("data_dir", "folder")):
        if setting in settings and setting not in taken:
            raise ValueError(f"data set {config.name!r} takes no {flag}; leave it out")
    if "num_clients" in taken:  # made-up data, client by client
        settings |= {"num_clients": config.clients, "seed": config.partition_seed}
    return settings


def _check_partitioner(partitioner: str, dataset: Dataset) -> None:
    """Refuses one that is unknown, or goes by what the examples lack; offers only those that can work."""
    lacks = ([] if dataset.has_labels else ["labels"]) + (["users"] if dataset.train_client_ids is None else [])
    usable = [name for name in PARTITIONERS if _GOES_BY.get(name) not in lacks]
    if partitioner not in PARTITIONERS:
        _validate.one_of(usable, partitioner=partitioner)
    if partitioner not in usable:
        raise ValueError(
            f"partitioner {partitioner!r} goes by {_GOES_BY[partitioner]}, and examples of {dataset.name!r} have none; "
            f"use {any_of(usable)}"
        )


def _natural_partitioner(dataset: Dataset) -> str:
    if dataset.train_client_ids is not None:
        return "by_user"
    return "dirichlet" if dataset.has_labels else "iid"


def _partitioner_settings(config: DataConfig, partitioner: str) -> dict[str, Any]:
    """The settings that the partitioner takes; one that it does not take may not differ from its default."""
    taken = inspect.signature(PARTITIONERS[partitioner]).parameters
    settings = {}
    for name in _DIVISION:
        value = getattr(config, name)
        if name in taken:
            settings[name] = value
        elif value != getattr(DataConfig, name):
            raise ValueError(f"partitioner {partitioner!r} takes no {name}, got {value!r}; leave it out")
    return settings


def _check_undivided(config: DataConfig) -> None:
    """Clients that are made on demand are neither divided nor held out."""
    for name in ("partitioner", "hold_out", *_DIVISION):
        if (value := getattr(config, name)) != getattr(DataConfig, name):
            raise ValueError(f"data set {config.name!r} makes its clients itself and takes no {name}, got {value!r}")


def _digest_of(clients: Any) -> str:
    """Of clients that are made on demand: of all that they are made from."""
    sha = hashlib.sha256(f"{clients.population} {clients.max_examples}".encode())
    for leaf in jax.tree.leaves((jax.random.key_data(clients.key), clients.shared)):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def describe(dataset: Dataset, partition: Partition | None) -> PartitionReport:
    """A report of a division, see `partition_report`; of clients made on demand, their sizes.

    Example:
      >>> dataset, partition = build_partition(DataConfig(name="procedural_logistic", clients=50))
      >>> describe(dataset, partition).method
      'made on demand'
    """
    if partition is not None:
        return partition_report(partition, dataset.train["y"] if dataset.has_labels else None)
    clients = dataset.clients
    sizes = jax.jit(lambda clients: clients.sizes_of(jnp.arange(clients.population)))(clients)
    return PartitionReport(
        method="made on demand",
        settings={"num_clients": clients.population, "max_examples": clients.max_examples},
        digest=_digest_of(clients),
        moved=0,
        client_sizes=np.asarray(sizes),
    )
