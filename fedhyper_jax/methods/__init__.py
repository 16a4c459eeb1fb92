"""Methods: values that add up, and the table of them all.

A method is one function in a file of its family (`families`): its keyword arguments are its options, its decorator says
what it is, and it returns what it gives to an algorithm. From these functions come the names under ``fedhyper_jax``,
those that configurations and the command line know, ``fedhyper methods`` and docs/methods.md.

``scaffold(population=100) + fedexp(epsilon=0.01)`` and ``method_by_name("scaffold+fedexp", …)`` are the same value;
called with a loss it is an algorithm.
"""

from fedhyper_jax.methods import families
from fedhyper_jax.methods.bounds import resolve_bounds
from fedhyper_jax.methods.families import *  # noqa: F403
from fedhyper_jax.methods.joint import Family, method_families
from fedhyper_jax.methods.pieces import Pieces, Start
from fedhyper_jax.methods.table import (
    KINDS,
    METHODS,
    make_method,
    method_by_name,
    method_options,
    method_table,
    parse_method,
)
from fedhyper_jax.methods.values import Method, method

__all__ = [
    "KINDS",
    "METHODS",
    "Family",
    "Method",
    "Pieces",
    "Start",
    "families",
    "make_method",
    "method",
    "method_by_name",
    "method_families",
    "method_options",
    "method_table",
    "parse_method",
    "resolve_bounds",
]
__all__ += families.__all__
