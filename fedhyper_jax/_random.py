"""How keys are derived: by round number and client id, never by position; so order and chunks change nothing."""

import jax
from jaxtyping import Array, Int


def round_keys(key: Array, round_number: Int[Array, ""]) -> tuple[Array, Array]:
    """(cohort key, clients key) of a round, from the key of the run."""
    cohort_key, clients_key = jax.random.split(jax.random.fold_in(key, round_number))
    return cohort_key, clients_key


def batch_key(clients_key: Array, client_id: Int[Array, ""]) -> Array:
    """Key of a client's batches in the round that ``clients_key`` belongs to."""
    return jax.random.fold_in(jax.random.fold_in(clients_key, client_id), 0)
