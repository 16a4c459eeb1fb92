"""The strategy for looking closely: plain Python loops, errors with names."""

import warnings

import jax
import jax.numpy as jnp

from fedhyper_jax import _tree, _validate
from fedhyper_jax.engine.strategies.contract import Slots, Strategy, add


class ClientError(RuntimeError):
    """An error inside a client's local training; the message names client and step, `__cause__` is the error itself."""


def _debug(client_fn, shared, slots: Slots):
    if _validate.is_traced(slots.steps):
        raise ValueError("the strategy 'debug' runs without jit; call round eagerly, or use run(..., compiles=False)")
    total, kept = None, []
    for index, client_steps in enumerate(slots.steps):
        client = jax.tree.map(lambda leaf, index=index: leaf[index], slots.clients)

        def loop(num_steps, body, carry, client_id=client.client_id):
            warned = False
            for k in range(int(num_steps)):
                try:
                    carry = body(jnp.asarray(k), carry)
                except Exception as error:
                    raise ClientError(f"client {int(client_id)}, local step {k}: {error}") from error
                if not warned and not _tree.is_finite(carry):
                    warned = True
                    warnings.warn(
                        f"client {int(client_id)}, local step {k}: parameters, loss or rate are no longer finite; "
                        "the client will be left out of the average",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            return carry

        summand, own = client_fn(shared, client, client_steps, loop)
        total = summand if total is None else add(total, summand)
        kept.append(own)
    return total, jax.tree.map(lambda *values: jnp.stack(values), *kept)


debug: Strategy = Strategy("debug", _debug, compiles=False)
"""Plain Python loops without jit; errors name client and step, and a client that turns non-finite is named."""
