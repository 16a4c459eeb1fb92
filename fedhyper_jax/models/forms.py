"""Which form a layer takes on which platform: what was fastest there or, until somebody has measured, what is assumed.

Every form computes the same up to rounding. ``experiments/on_accelerator.py`` times them on the machine at hand and
prints the line of `FORMS` that follows from it.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
from jax import lax
from jaxtyping import Array


class Forms(NamedTuple):
    """The forms of the layers on a platform.

    Attributes:
      clients: under ``vmap`` over kernels, one convolution after the other or all of them as one grouped convolution.
      gradients: both of a convolution. "derived" by JAX; or written out in the form of XLA:CPU's fast kernel, the one
        towards the kernel "at_once" or "in_parts" of the batch.
      im2col_channels: images of at most so many channels are convolved by one matrix product with their patches.
      norm: who computes GroupNorm.
      rnn: who computes LSTMs.
      measured: where the measurement stands; None where there is none.
    """

    clients: Literal["one_by_one", "at_once"]
    gradients: Literal["in_parts", "at_once", "derived"]
    im2col_channels: int
    norm: Literal["own", "flax"]
    rnn: Literal["own", "flax"]
    measured: str | None


ASSUMED = Forms("at_once", "at_once", im2col_channels=3, norm="flax", rnn="flax", measured=None)
"""Where nobody has measured: loops of small kernels are what accelerators are slow at."""

FORMS: dict[str, Forms] = {
    "cpu": Forms("one_by_one", "in_parts", im2col_channels=3, norm="own", rnn="own", measured="docs/layers.md"),
    "gpu": ASSUMED,
    "tpu": ASSUMED,
}
"""By platform, as ``jax.default_backend()`` calls it."""

_COMPILED_FOR = {"cpu": ("cpu",), "gpu": ("cuda", "rocm"), "tpu": ("tpu",)}


def forms_here() -> Forms:
    """Those of the default platform, for choices that are made while tracing.

    Example:
      >>> forms_here() == FORMS.get(jax.default_backend(), ASSUMED)
      True
    """
    return FORMS.get(jax.default_backend(), ASSUMED)


def by_platform(choose: Callable[[Forms], Callable[..., Array]], *operands: Array) -> Array:
    """``choose(forms)(*operands)`` with the forms of the platform that the program is compiled for.

    Args:
      choose: picks one of some functions; where two platforms get the same one it must be the same object.
      operands: its arguments.

    Example:
      >>> ways = {"own": lambda x: x + 1, "flax": lambda x: x + 2}
      >>> by_platform(lambda forms: ways[forms.norm], jax.numpy.zeros(())).shape
      ()
    """
    default = choose(ASSUMED)
    chosen = {name: choose(forms) for platform, forms in FORMS.items() for name in _COMPILED_FOR[platform]}
    others = {name: branch for name, branch in chosen.items() if branch is not default}
    return lax.platform_dependent(*operands, **others, default=default) if others else default(*operands)
