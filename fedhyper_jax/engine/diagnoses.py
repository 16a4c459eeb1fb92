"""Warnings of what makes a run slow or empty, each said once: diagnoses that remember, apart from pure functions."""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr

from fedhyper_jax.base import NOT_FINITE, LossFunction, ServerState
from fedhyper_jax.data import ClientData, LocalWork
from fedhyper_jax.engine.convolutions import NAIVE_MULTIPLY_ADDS_PER_SECOND, PlainConvolution, plain_convolutions
from fedhyper_jax.engine.cores import number_of_cores
from fedhyper_jax.tasks import losses_of, takes_key


class SlowConvolutionWarning(UserWarning):
    """A training loop on CPU holds convolutions that XLA runs 5 to 40 times slower than it could."""


def warn_of_slow_convolutions(loss_fn: LossFunction, work: LocalWork, state: ServerState, data: ClientData) -> None:
    """Emits `SlowConvolutionWarning`, once a loss function, where its gradient has `plain_convolutions` in a loop."""

    def gradients_in_a_loop(params, data):
        rows = jnp.zeros(work.batch_size, jnp.int32)
        batch, key = data.client(jnp.int32(0)).fetch(rows), jax.random.key(0) if takes_key(loss_fn) else None
        gradient = jax.grad(lambda w: jnp.sum(losses_of(loss_fn, w, batch, work.batch_size, key)))
        return lax.fori_loop(0, 2, lambda k, w: gradient(w), params)

    warn_of_plain_convolutions(gradients_in_a_loop, state.params, data, loss_fn=loss_fn)


def warn_of_plain_convolutions(program: ClosedJaxpr | Jaxpr | Callable, *arguments: Any, loss_fn: Any = None) -> None:
    """Emits `SlowConvolutionWarning` if the program has `plain_convolutions` and this process runs on CPU.

    Each ``loss_fn`` is looked at once per process; a second call for it does not trace.

    Args:
      program: a traced program, or a function to trace with ``jax.make_jaxpr``.
      arguments: of the function; ``jax.ShapeDtypeStruct``s will do.
      loss_fn: whose program it is: without it the function's own, or for a traced program that of its convolutions.

    Example:
      >>> warn_of_plain_convolutions(lambda x: x + 1, 1.0)  # nothing to warn of
    """
    if jax.default_backend() != "cpu":
        return
    traced = isinstance(program, ClosedJaxpr | Jaxpr)
    owner = loss_fn if loss_fn is not None or traced else program
    owner = getattr(owner, "__func__", owner)  # a bound method is another object each time
    try:
        if owner in _seen_owners:
            return
        _seen_owners.add(owner)
        seen = False
    except TypeError:  # None, or something that neither hashes nor takes weak references
        seen = None
    found = plain_convolutions(program if traced else jax.make_jaxpr(program)(*arguments))
    if seen is None:
        seen = found in _seen_programs
        _seen_programs.add(found)
    if found and not seen:
        warnings.warn(_message(found), SlowConvolutionWarning, stacklevel=2)


_seen_owners = weakref.WeakSet()
_seen_programs = set()


def _message(found: tuple[PlainConvolution, ...]) -> str:
    counts = Counter(map(str, found))
    lines = [f"  {text}" + (f" ({count} times)" if count > 1 else "") for text, count in counts.items()]
    if len(lines) > 8:
        lines = [*lines[:8], f"  and {len(lines) - 8} more"]
    seconds = sum(convolution.multiply_adds for convolution in found) / NAIVE_MULTIPLY_ADDS_PER_SECOND
    return "\n".join(
        [
            "XLA:CPU will run these convolutions as naive loops, 5 to 40 times slower than it could, since they are "
            "inside a loop and not of the form of its fast kernel:",
            *lines,
            f"One pass over them takes about {seconds:.2g} s of one core. Use fedhyper_jax.models.Conv for "
            "flax.linen.Conv (same parameters, same results) or fedhyper_jax.models.convolution for "
            "jax.lax.conv_general_dilated; docs/layers.md says why. To silence this, filter SlowConvolutionWarning.",
        ]
    )


class IdleCoresWarning(UserWarning):
    """A long run on one CPU device while the machine has more cores."""


_PATIENCE = 60.0
"""Seconds of training that are not worth a word."""

_warned = False


def watch_idle_cores() -> Callable[[Any], None]:
    """A callback for the host loop of a run: emits `IdleCoresWarning`, once per process, when the run gets long.

    Example:
      >>> from types import SimpleNamespace
      >>> watch_idle_cores()(SimpleNamespace(seconds=1.0))  # not long yet
    """
    seconds = 0.0

    def watch(progress: Any) -> None:
        global _warned
        nonlocal seconds
        seconds += progress.seconds
        if _warned or seconds < _PATIENCE or jax.default_backend() != "cpu" or jax.device_count() > 1:
            return
        cores = number_of_cores()
        if cores > 1:
            _warned = True
            warnings.warn(
                f"{seconds:.0f} s of training so far on one CPU device, which makes little use of more than one of the "
                f"{cores} cores. Call fedhyper_jax.use_all_cores() before JAX is first used and divide the cohorts: "
                "strategy='sharded(chunked(5))', or 'sharded(sequential)' for convolutions; or use the commands, which "
                "start a process a core. docs/scaling.md says more. To silence this, filter IdleCoresWarning.",
                IdleCoresWarning,
                stacklevel=4,
            )

    return watch


class LeftOutWarning(UserWarning):
    """Many clients are left out of round after round, because what they made is not finite."""


_SHARE, _ROUNDS = 0.1, 3
"""A round loses many clients from this share on, and so many such rounds are worth a word."""


def watch_left_out() -> Callable[[Any], None]:
    """A callback for the host loop of a run or a sweep: emits `LeftOutWarning`, once, with the first reason and client.

    Example:
      >>> import numpy as np
      >>> from types import SimpleNamespace
      >>> nobody, all_ten = np.zeros(5, int), np.full(5, 10)
      >>> info = SimpleNamespace(left_out=nobody, participants=all_ten)
      >>> watch_left_out()(SimpleNamespace(history=SimpleNamespace(info=info)))  # nothing to tell
    """
    rounds_so_far, first, told = 0, None, False

    def watch(progress: Any) -> None:
        nonlocal rounds_so_far, first, told
        info = progress.history.info
        many = info.left_out >= np.maximum(_SHARE * (info.left_out + info.participants), 1)  # (..., rounds)
        if told or not many.any():
            return
        if first is None:
            at = tuple(np.argwhere(many)[0])
            first = {name: int(getattr(info, name)[at]) for name in _TOLD}
        rounds_so_far = rounds_so_far + many.sum(-1)
        if np.max(rounds_so_far) < _ROUNDS:
            return
        told = True
        runs = f", in {np.sum(rounds_so_far > 0)} of {np.size(rounds_so_far)} runs" if np.ndim(rounds_so_far) else ""
        client = f"client {first['first_left_out']}" if first["first_left_out"] >= 0 else "all"
        warnings.warn(
            f"Many clients are left out of round after round{runs}: the first time {first['left_out']} of "
            f"{first['left_out'] + first['participants']}, in round {first['round']}; of {client} "
            f"{NOT_FINITE[first['left_out_because']]} was not finite. Look at the client's examples (labels that are "
            "no class, numbers out of all range), or start from a smaller rate; history.info.left_out counts them. To "
            "silence this, filter LeftOutWarning.",
            LeftOutWarning,
            stacklevel=4,
        )

    return watch


_TOLD = ("round", "left_out", "participants", "first_left_out", "left_out_because")
