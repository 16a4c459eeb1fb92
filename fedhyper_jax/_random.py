"""How keys are derived: by round number and client id, never by position; so order and chunks change nothing."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Int


class RoundKeys(NamedTuple):
    """The keys of a round, one a purpose."""

    cohort: Array
    clients: Array
    server: Array


def round_keys(key: Array, round_number: Int[Array, ""]) -> RoundKeys:
    """The keys of a round, from the key of the run."""
    key = jax.random.fold_in(key, round_number)
    cohort_key, clients_key = jax.random.split(key)
    return RoundKeys(cohort_key, clients_key, jax.random.fold_in(key, 2))


def batch_key(clients_key: Array, client_id: Int[Array, ""]) -> Array:
    """Key of a client's batches in the round that ``clients_key`` belongs to."""
    return jax.random.fold_in(jax.random.fold_in(clients_key, client_id), 0)


def failure_key(clients_key: Array, client_id: Int[Array, ""]) -> Array:
    """Key of what goes wrong with a client in that round."""
    return jax.random.fold_in(jax.random.fold_in(clients_key, client_id), 1)
