"""Clients that only count, for the seam between strategies and rounds: ``strategy.map_reduce``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedhyper_jax.engine.strategies import Assignment, Slots, parse_strategy

POPULATION = 9
"""Also the id of a padded slot."""


class Toy(NamedTuple):
    """A cohort; ``common_steps`` where all clients take as many steps, known when the program is made."""

    ids: tuple[int, ...]
    steps: tuple[int, ...]
    common_steps: int | None = None


TOYS = {
    "ragged": Toy((4, 1, 7, 3, 0), (5, 1, 3, 1, 2)),
    "one takes most": Toy((2, 8, 5, 6), (1, 40, 2, 1)),
    "padded": Toy((POPULATION, 4, 1, POPULATION, 7, 3, POPULATION), (0, 5, 1, 0, 3, 1, 0)),
    "some never start": Toy((4, 1, 7, 3, 0), (0, 2, 0, 3, 0)),
    "nobody starts": Toy((4, 1), (0, 0)),
    "one client": Toy((3,), (4,)),
    "equal steps": Toy((4, 1, 7, 3, 0), (3, 3, 3, 3, 3), 3),
    "equal steps, padded": Toy((4, POPULATION, 7, 3), (3, 3, 3, 3), 3),
}


def client_fn(shared, client, num_steps, loop):
    """Adds up ``shared["factor"] ** k · (id + 1)`` over its steps; masks the others, if there may be others.

    It leaves out of the sums what is not to count (padded slots, and clients that take no step), as a round does.
    """
    masks = not isinstance(num_steps, int)

    def step(k, carry):
        total, count = carry
        new = total + shared["factor"] ** k * (client.client_id + 1), count + 1
        return jax.tree.map(lambda a, b: jnp.where(k < client.num_steps, a, b), new, carry) if masks else new

    zero = jnp.zeros((), shared["factor"].dtype)
    total, count = loop(num_steps, step, (zero, jnp.zeros((), jnp.int32)))
    counts = (client.num_steps > 0) & (client.client_id < POPULATION)
    summand = {
        "float": jnp.where(counts, total, 0),
        "int": jnp.where(counts, 2**24 + count, 0),
        "vector": jnp.where(counts, shared["rows"][client.client_id], 0),
    }
    kept = {"row": jnp.outer(shared["rows"][client.client_id], jnp.ones(2)), "count": count, "counts": counts}
    return summand, kept


def shared(factor=0.5, dtype=jnp.float32):
    """Arrays that clients are handed: a factor, and a row each; the last one is what a padded slot finds."""
    rows = np.arange(3.0 * (POPULATION + 1)).reshape(-1, 3) - 7
    return {"factor": jnp.asarray(factor, dtype), "rows": jnp.asarray(rows, dtype)}


def slots(toy: Toy) -> Slots:
    """As a round hands them to a strategy."""
    assignment = Assignment(jnp.asarray(toy.ids, jnp.int32), jnp.asarray(toy.steps, jnp.int32))
    return Slots(assignment, toy.common_steps, padding_id=POPULATION)


def run(strategy, toy: Toy, given):
    """The sums and what is kept, compiled where the strategy may be."""
    strategy = parse_strategy(strategy)

    def program(given, clients):
        return strategy.map_reduce(client_fn, given, slots(toy)._replace(clients=clients))

    return (jax.jit(program) if strategy.compiles else program)(given, slots(toy).clients)


def expected(toy: Toy, factor=0.5):
    """In NumPy."""
    rows = np.asarray(shared()["rows"])
    ids, steps = np.array(toy.ids), np.array(toy.steps)
    counts = (steps > 0) & (ids < POPULATION)
    totals = np.array([sum(factor**k * (m + 1) for k in range(n)) for m, n in zip(ids, steps, strict=True)])
    sums = {
        "float": totals[counts].sum(),
        "int": (2**24 + steps)[counts].sum(),
        "vector": rows[ids][counts].sum(axis=0),
    }
    kept = {"row": np.repeat(rows[ids][:, :, None], 2, axis=2), "count": steps, "counts": counts}
    return sums, kept


def assert_agrees(given, toy: Toy, factor=0.5):
    """Floats to rounding; integers, and what is kept in the order of slots, exactly; in the types that were given."""
    (sums, kept), (expected_sums, expected_kept) = given, expected(toy, factor)
    np.testing.assert_allclose(sums["float"], expected_sums["float"], rtol=1e-6)
    np.testing.assert_allclose(sums["vector"], expected_sums["vector"], rtol=1e-6)
    assert int(sums["int"]) == expected_sums["int"]
    for name, values in kept.items():
        np.testing.assert_array_equal(values, expected_kept[name], err_msg=name)
    assert (sums["float"].dtype, sums["int"].dtype, kept["counts"].dtype) == (jnp.float32, jnp.int32, jnp.dtype(bool))
