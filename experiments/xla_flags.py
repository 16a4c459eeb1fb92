"""Options of XLA with which programs compile quickly, where speed means nothing; to be set before JAX starts."""

import importlib.metadata

SIMPLE_LOOPS = ("cpu_use_fusion_emitters=false",) * importlib.metadata.version("jaxlib").startswith("0.10.")
"""XLA's older and simpler way to write loops, which compiles three times as fast; gone from JAX 0.11.1 on."""

QUICK = ("backend_optimization_level=0", "cpu_parallel_codegen_split_count=1", *SIMPLE_LOOPS)


def as_flags(*options: str) -> str:
    """The value of ``XLA_FLAGS``.

    Example:
      >>> as_flags("cpu_max_isa=AVX", "backend_optimization_level=0")
      '--xla_cpu_max_isa=AVX --xla_backend_optimization_level=0'
    """
    return " ".join(f"--xla_{option}" for option in options)
