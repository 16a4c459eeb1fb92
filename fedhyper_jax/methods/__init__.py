"""The table of methods: every method by name, what it is, and how names compose.

From this one table come the names that configurations and the command line know, ``fedhyper methods`` and the page
docs/methods.md. Names are joined by '+': 'fedprox+G', 'scaffold+fedexp', 'G+SL+CL'.
"""

from fedhyper_jax.methods._compose import make_method, method_options, parse_method
from fedhyper_jax.methods._table import KINDS, METHODS, Method, method_table
from fedhyper_jax.methods.algorithms import *  # noqa: F403
from fedhyper_jax.methods.fedhyper import resolve_bounds  # noqa: F401

__all__ = ["KINDS", "METHODS", "Method", "make_method", "method_options", "method_table", "parse_method"]
