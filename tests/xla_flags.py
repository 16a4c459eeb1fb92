"""Options of XLA that programs compile quickly with, and always the same way; to be set before JAX is imported."""

import importlib.metadata

SIMPLE_LOOPS = ("cpu_use_fusion_emitters=false",) * importlib.metadata.version("jaxlib").startswith("0.10.")
"""XLA's older and simpler way to write loops, which compiles three times as fast; gone from JAX 0.11.1 on."""


def as_flags(*options: str) -> str:
    """The value of ``XLA_FLAGS``."""
    return " ".join(f"--xla_{option}" for option in options)
