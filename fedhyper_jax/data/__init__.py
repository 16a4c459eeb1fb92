"""Federated data sets: loading, partitioning over clients, packing ragged clients, sampling.

A pool of examples comes from a loader (`load`) or from your own arrays, a `Partition` says which client owns which
rows, and `pack` joins the two:

  >>> dataset = load("digits")
  >>> partition = dirichlet(dataset.train["y"], 20, alpha=0.5, seed=0)
  >>> data = pack(dataset.train, partition.client_rows)
  >>> data.population
  20
"""

from fedhyper_jax.data import sources
from fedhyper_jax.data._tfds import load_tfds
from fedhyper_jax.data.batches import (
    Batches,
    ClientBatches,
    LocalWork,
    all_examples,
    client_batches,
    draw_batches,
    local_epochs,
    local_steps,
)
from fedhyper_jax.data.cohorts import Cohort, check_client_ids, check_cohort_size, make_cohort, sample_cohort
from fedhyper_jax.data.dataset import Dataset
from fedhyper_jax.data.federated import (
    ClientData,
    ClientView,
    FederatedData,
    check_examples,
    from_client_ids,
    hold_out,
    pack,
)
from fedhyper_jax.data.partition import (
    PARTITIONERS,
    Partition,
    by_user,
    dirichlet,
    iid,
    make_partition,
    quantity_skew,
    shards,
)
from fedhyper_jax.data.procedural import (
    ProceduralData,
    Recipe,
    examples_of_strangers,
    load_procedural_logistic,
    procedural_clients,
    procedural_logistic,
)
from fedhyper_jax.data.report import PartitionReport, partition_report, plot_partition
from fedhyper_jax.data.sources import LOADERS, load, load_diabetes, load_digits, load_fashion_mnist, load_mnist
from fedhyper_jax.data.synthetic import QuadraticProblem, quadratic_clients, quadratic_loss, synthetic_logistic
from fedhyper_jax.data.text import synthetic_text

__all__ = [
    "LOADERS",
    "PARTITIONERS",
    "Batches",
    "ClientBatches",
    "ClientData",
    "ClientView",
    "Cohort",
    "Dataset",
    "FederatedData",
    "LocalWork",
    "Partition",
    "PartitionReport",
    "ProceduralData",
    "QuadraticProblem",
    "Recipe",
    "all_examples",
    "by_user",
    "check_client_ids",
    "check_cohort_size",
    "check_examples",
    "client_batches",
    "dirichlet",
    "draw_batches",
    "examples_of_strangers",
    "from_client_ids",
    "hold_out",
    "iid",
    "load",
    "load_diabetes",
    "load_digits",
    "load_fashion_mnist",
    "load_mnist",
    "load_procedural_logistic",
    "load_tfds",
    "local_epochs",
    "local_steps",
    "make_cohort",
    "make_partition",
    "pack",
    "partition_report",
    "plot_partition",
    "procedural_clients",
    "procedural_logistic",
    "quadratic_clients",
    "quadratic_loss",
    "quantity_skew",
    "sample_cohort",
    "shards",
    "sources",
    "synthetic_logistic",
    "synthetic_text",
]
