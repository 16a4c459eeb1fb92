"""Bounds of the rates of FedHyper, by name or as numbers."""

from fedhyper_jax import _validate
from fedhyper_jax.base import Range, Scalar

BOUND_KINDS = ("relative", "absolute")

Bounds = str | Range
"""'relative', 'absolute' or a pair of numbers (lower, upper)."""


def resolve_bounds(bounds: Bounds, rate: Scalar, gamma: Scalar, *, name: str) -> Range:
    """Bounds as numbers: 'relative' is (rate / γ, rate · γ), 'absolute' is (1 / γ, γ), a pair stays.

    Args:
      bounds: a name or a pair of numbers that hold the rate.
      rate: where the rate starts.
      gamma: γ ≥ 1 of named bounds.
      name: what messages call the bounds.

    Raises:
      ValueError: unknown names, γ < 1, a rate that lies outside.

    Example:
      >>> resolve_bounds("relative", 0.5, 10.0, name="local_bounds")
      (0.05, 5.0)
    """
    if not isinstance(bounds, str):
        return _validate.bounds(bounds, initial_rate=rate, name=name, rate_name=name.replace("bounds", "rate"))
    _validate.one_of(BOUND_KINDS, **{name: bounds})
    gamma_name = name.replace("bounds", "gamma")
    _validate.positive(**{gamma_name: gamma})
    if not _validate.is_traced(gamma) and float(gamma) < 1:
        raise ValueError(f"{gamma_name} must be ≥ 1, got {gamma!r}; the paper uses 3 (global) and 10 (local)")
    if bounds == "relative":
        return rate / gamma, rate * gamma
    lower, upper = 1 / gamma, gamma
    if not _validate.is_traced(rate, gamma) and not lower <= float(rate) <= upper:
        rate_name = name.replace("bounds", "rate")
        raise ValueError(
            f"{rate_name}={float(rate)!r} lies outside the absolute bounds [{lower!r}, {upper!r}]; "
            f"use {name}='relative'"
        )
    return lower, upper
