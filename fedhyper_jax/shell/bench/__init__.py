"""Speed, measured: named jobs (`JOBS`), and what a method costs on one of them (`measure`).

What `fedhyper bench` prints: compilation apart from steady rounds, client-steps a second, memory, the share of the
machine's own matrix products, and what each scheduler costs over FedAvg.
"""

from fedhyper_jax.shell.bench.jobs import JOBS, Job, Workload
from fedhyper_jax.shell.bench.measure import (
    flops_per_client_step,
    machine,
    matrix_product_ceiling,
    measure,
    peak_memory,
    spread,
)
from fedhyper_jax.shell.bench.suite import bench, check_bench, print_bench

__all__ = [
    "JOBS",
    "Job",
    "Workload",
    "bench",
    "check_bench",
    "flops_per_client_step",
    "machine",
    "matrix_product_ceiling",
    "measure",
    "peak_memory",
    "print_bench",
    "spread",
]
