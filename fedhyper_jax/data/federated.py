"""A federated data set: one flat pool of examples and, client after client, which of them are whose (CSR)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fedhyper_jax import _repr, _validate
from fedhyper_jax.base import Batch, Examples


class ClientNames(tuple[Any, ...]):
    """Names of the clients, by their numbers: a tuple that is told in a line and hashed once.

    Example:
      >>> names = ClientNames(["bob", "eve"])
      >>> names, names[1], names.index("eve")
      (<2 names: 'bob', 'eve'>, 'eve', 1)
    """

    def __repr__(self) -> str:
        return f"<{len(self):,} names: {_repr.few(self)}>"

    @functools.cached_property
    def _hash(self) -> int:
        return tuple.__hash__(self)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return ClientNames, (tuple(self),)  # (hashes of strings are those of a process)


class ClientView(NamedTuple):
    """One client's examples, inside a compiled round.

    Attributes:
      size: n_m; 0 for a padded slot.
      rows_of: ``rows_of(positions)``: what `fetch` calls the examples at positions in [0, n_m).
      fetch: ``fetch(rows)``: the examples themselves, a dict of arrays with one leading axis.
    """

    size: Int[Array, ""]
    rows_of: Callable[[Int[Array, "*shape"]], Int[Array, "*shape"]]
    fetch: Callable[[Int[Array, " batch"]], Batch]


class ClientData(Protocol):
    """A federated data set inside a round: `FederatedData` keeps its examples, `ProceduralData` makes them."""

    @property
    def max_examples(self) -> int:
        """Number of examples of the largest client, or more; static."""
        ...

    @property
    def population(self) -> int:
        """Number of clients; static."""
        ...

    @property
    def mean_size(self) -> Float[Array, ""]:
        """Mean number of examples over all clients."""
        ...

    def sizes_of(self, client_ids: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """Number of examples of some clients; 0 for the population, which marks a padded slot."""
        ...

    def client(self, client_id: Int[Array, ""]) -> ClientView:
        """One client's examples."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class FederatedData:
    """Examples of all clients without padding, however skewed the clients are.

    Client ``m`` owns the pool rows ``order[offsets[m]:offsets[m + 1]]``. The pool reaches compiled programs as an
    argument (this class is a pytree), never as a constant.

    Attributes:
      examples: dict of arrays with one leading axis of N examples; by convention ``"x"`` inputs, ``"y"`` targets.
      order: (M,) int32 rows of the pool, client after client; M ≤ N.
      offsets: (population + 1,) int32, where each client begins.
      max_examples: size of the largest client; static, since it bounds the shapes of batches.
      weights: (population,) what each client counts for with ``weighting="weights"``, over their mean; or None.
      weigh_by: the array of ``examples`` whose sums over clients the weights are; static.
      names: what the clients are called, by their numbers; None where these are their names; static.
    """

    examples: Batch
    order: Int[Array, " examples"]
    offsets: Int[Array, " population+1"]
    max_examples: int = dataclasses.field(metadata={"static": True})
    weights: Float[Array, " population"] | None = None
    weigh_by: str | None = dataclasses.field(default=None, metadata={"static": True})
    names: ClientNames | None = dataclasses.field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        offsets = _repr.known(self.offsets)
        sizes = "" if offsets is None else f", {_repr.number(np.diff(offsets))} a client"
        weighed = f"; weights by {self.weigh_by}" if self.weigh_by else ""
        names = f" ({_repr.few(self.names)})" if self.names else ""
        return (
            f"<FederatedData: {_repr.length(self.offsets, -1)} clients{names} with {_repr.length(self.order)} "
            f"examples{sizes}: {_repr.arrays(self.examples)}{weighed}>"
        )

    @property
    def population(self) -> int:
        """Number of clients."""
        return self.offsets.shape[0] - 1

    @property
    def client_sizes(self) -> Int[Array, " population"]:
        """Number of examples of each client."""
        return self.offsets[1:] - self.offsets[:-1]

    @property
    def mean_size(self) -> Float[Array, ""]:
        """Mean number of examples over all clients."""
        return self.offsets[-1].astype(float) / self.population

    def sizes_of(self, client_ids: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """Number of examples of some clients; 0 for the population, which marks a padded slot."""
        # offsets[population + 1] does not exist; clipped gathers make that offsets[-1] - offsets[-1] = 0.
        return jnp.take(self.offsets, client_ids + 1, mode="clip") - jnp.take(self.offsets, client_ids, mode="clip")

    def weights_of(self, client_ids: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        """What some clients count for with ``weighting="weights"``; 0 for the population, which marks a padded slot."""
        return jnp.take(self.weights, client_ids, mode="fill", fill_value=0)

    def client(self, client_id: Int[Array, ""]) -> ClientView:
        """One client's examples."""
        first = jnp.take(self.offsets, client_id, mode="clip")
        return ClientView(
            size=self.sizes_of(client_id),
            rows_of=lambda positions: jnp.take(self.order, first + positions, mode="clip"),
            fetch=lambda rows: jax.tree.map(lambda array: array[rows], self.examples),
        )


def check_examples(examples: Examples) -> int:
    """Checks a dict of example arrays and returns their common length.

    Raises:
      ValueError: not a dict of arrays, lengths that differ, no example, NaN or infinite entries, numbers that the
        conversion to JAX's dtype would change.
    """
    if not isinstance(examples, dict) or not examples:
        raise ValueError(
            f"examples must be a dict of arrays such as {{'x': ..., 'y': ...}}, got {type(examples).__name__}"
        )
    shapes = {name: np.shape(array) for name, array in examples.items()}
    scalars = [name for name, shape in shapes.items() if not shape]
    if scalars:
        raise ValueError(
            f"examples[{scalars[0]!r}] must have a leading example axis, got a scalar; reshape it to (N, ...)"
        )
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"arrays of examples must have one common length, got shapes {shapes}; cut them to the same N")
    for name, array in examples.items():
        array = np.asarray(array)
        if array.dtype.kind not in "fiub":
            raise ValueError(f"examples[{name!r}] must be numeric, got dtype {array.dtype}; encode it as numbers first")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
            raise ValueError(
                f"examples[{name!r}] has NaN or infinite values, first in row {row}; remove or impute them"
            )
        _validate.fits(array, name=f"examples[{name!r}]")
    (length,) = {shape[0] for shape in shapes.values()}
    if length == 0:
        raise ValueError("examples are empty (length 0); give at least one example")
    return length


def pack(
    examples: Examples, client_rows: Iterable[Any] | Mapping[Any, Any], *, weigh_by: str | None = None
) -> FederatedData:
    """Packs a pool and the rows of each client into `FederatedData`.

    Args:
      examples: dict of arrays with a common leading axis N.
      client_rows: for each client the rows that it owns (an array, list or set of integers), each in [0, N), none
        owned twice. Of a dict, such as ``{"eve": [0], "bob": [1, 2]}``, clients are numbered in its order and its keys
        are their ``names``, unless they are the numbers 0 … M − 1: these are kept.
      weigh_by: name of an array of ``examples`` of N numbers ≥ 0, such as their tokens: with ``weighting="weights"`` an
        algorithm weighs a client by their sum over its examples.

    Returns:
      The data set, on the default device.

    Raises:
      ValueError: bad examples (see `check_examples`), a client without rows, rows outside the pool or owned twice,
        weights that are negative or all zero at a client.

    Example:
      >>> import numpy as np
      >>> data = pack({"x": np.ones((3, 2)), "y": np.array([0, 1, 1])}, [np.array([2]), np.array([0, 1])])
      >>> data.population, data.client_sizes.tolist(), data.max_examples
      (2, [1, 2], 2)
    """
    length = check_examples(examples)
    rows = _rows_by_client(client_rows)
    if not rows:
        raise ValueError("client_rows is empty; a federation needs at least one client")
    sizes = np.array([len(own) for own in rows.values()])
    if (sizes == 0).any():
        empty = np.flatnonzero(sizes == 0)
        raise ValueError(
            f"client {list(rows)[empty[0]]!r} has no examples ({len(empty)} of {len(sizes)} clients are empty); "
            "leave empty clients out, use fewer clients, or a partitioner with min_examples ≥ 1"
        )
    order = np.concatenate(list(rows.values()))
    if order.min() < 0 or order.max() >= length:
        raise ValueError(f"client_rows must lie in [0, {length}), got rows from {order.min()} to {order.max()}")
    if len(np.unique(order)) < len(order):
        raise ValueError("a row of the pool is owned twice; client_rows must be disjoint")
    if length >= 2**31:
        raise ValueError(f"a pool holds fewer than 2**31 examples, got {length}; split it")
    names = None if list(rows) == list(range(len(rows))) else ClientNames(rows)
    if weigh_by is not None:
        _check_weights(examples, weigh_by, order, sizes, list(rows))
    return FederatedData(
        examples={name: jnp.asarray(array) for name, array in examples.items()},
        order=jnp.asarray(order, jnp.int32),
        offsets=jnp.asarray(np.concatenate([[0], np.cumsum(sizes)]), jnp.int32),
        max_examples=int(sizes.max()),
        weights=None if weigh_by is None else _weights(examples[weigh_by], order, sizes),
        weigh_by=weigh_by,
        names=names,
    )


def _sums(values: Any, order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Of each client's examples."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return np.bincount(owner, weights=np.asarray(values, float)[order], minlength=len(sizes))


def _weights(values: Any, order: np.ndarray, sizes: np.ndarray) -> Float[Array, " population"]:
    """What clients count for, over their mean: so the unit of the values is none of the algorithm's business."""
    sums = _sums(values, order, sizes)
    return jnp.asarray(sums / (sums.mean() or 1))  # (what is held out may weigh nothing)


def _check_weights(examples: Examples, weigh_by: str, order: np.ndarray, sizes: np.ndarray, clients: list) -> None:
    """Raises ValueError for weights that are not one number ≥ 0 an example, with a sum > 0 at each client."""
    _validate.one_of(examples, weigh_by=weigh_by)
    values = np.asarray(examples[weigh_by])
    if values.ndim != 1 or values.dtype.kind == "b" or values.min() < 0:
        wrong = f"shape {values.shape}" if values.ndim != 1 else f"{values.min()}"
        raise ValueError(f"examples[{weigh_by!r}] must be one number ≥ 0 an example to weigh clients by, got {wrong}")
    empty = np.flatnonzero(_sums(values, order, sizes) == 0)
    if len(empty):
        raise ValueError(
            f"client {clients[empty[0]]!r} has no {weigh_by} ({len(empty)} of {len(sizes)} clients weigh nothing); "
            "leave such clients out"
        )


def _rows_by_client(client_rows: Iterable[Any] | Mapping[Any, Any]) -> dict[Any, np.ndarray]:
    """The rows of each client as 1-D arrays of integers, by its name or number, in the order of the federation."""
    if isinstance(client_rows, set | frozenset | str) or not isinstance(client_rows, Iterable):
        raise ValueError(
            f"client_rows must be a list or dict of the rows of each client, got {type(client_rows).__name__}; "
            "give e.g. [[0, 2], [1]] or {'eve': [0, 2], 'bob': [1]}, or the client_rows of a Partition"
        )
    named = client_rows if isinstance(client_rows, Mapping) else dict(enumerate(client_rows))
    if named is client_rows and set(named) == set(range(len(named))):
        named = {number: named[number] for number in range(len(named))}
    return {client: _as_rows(client, rows) for client, rows in named.items()}


def _as_rows(client: Any, rows: Any) -> np.ndarray:
    """The rows of one client."""
    try:
        array = np.sort(list(rows)) if isinstance(rows, set | frozenset) else np.asarray(rows)
    except (TypeError, ValueError):  # of different types or lengths
        array = np.empty((), object)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"client_rows must hold integer rows, a list of them for each client, got {rows!r:.60} for client "
            f"{client!r}; give e.g. [[0, 2], [1]]"
        )
    return array


def from_client_ids(examples: Examples, client_ids: np.ndarray, *, weigh_by: str | None = None) -> FederatedData:
    """Packs one's own arrays, each example labelled with the client that owns it.

    Clients are numbered by the sorted order of their distinct ids, which may be strings and are their ``names``.

    Args:
      examples: dict of arrays with a common leading axis N.
      client_ids: (N,) numbers or strings: who owns each example.
      weigh_by: as of `pack`.

    Returns:
      The data set, on the default device.

    Raises:
      ValueError: whatever `pack` refuses, ids of another length, of several types or not finite.

    Example:
      >>> import numpy as np
      >>> examples = {"x": np.arange(4.0), "tokens": np.array([5, 60, 10, 5])}
      >>> data = from_client_ids(examples, np.array(["eve", "bob", "eve", "eve"]), weigh_by="tokens")
      >>> data.client_sizes.tolist(), data.names, data.weights.tolist()
      ([1, 3], <2 names: 'bob', 'eve'>, [1.5, 0.5])
    """
    length = check_examples(examples)
    ids = np.asarray(client_ids)
    if ids.shape != (length,):
        raise ValueError(f"client_ids must have shape ({length},), one id an example, got {ids.shape}")
    if ids.dtype.kind == "f" and not np.isfinite(ids).all():
        row = int(np.flatnonzero(~np.isfinite(ids))[0])
        raise ValueError(f"client_ids has {ids[row]} in row {row}, which names no client; leave such examples out")
    try:
        names, client, counts = np.unique(ids, return_inverse=True, return_counts=True)
    except TypeError:
        kinds = ", ".join(sorted({type(name).__name__ for name in ids.tolist()}))
        raise ValueError(f"client_ids must be all numbers or all strings, got {kinds}; use astype(str)") from None
    rows = np.split(np.argsort(client, kind="stable"), np.cumsum(counts)[:-1])
    return pack(examples, dict(zip(names.tolist(), rows, strict=True)), weigh_by=weigh_by)


def hold_out(data: FederatedData, fraction: float, *, seed: int = 0) -> tuple[FederatedData, FederatedData]:
    """Sets a fraction of each client's examples aside for evaluation.

    ⌊fraction · n_m⌋ random examples of client m are held out, so every client keeps at least one to train on; small
    clients may hold out none, and then do not count in per-client summaries.

    Args:
      data: the federated data set.
      fraction: in (0, 1).
      seed: of the choice.

    Returns:
      (training data, held-out data) over the same pool, with the same clients; weights are those of what is left.

    Example:
      >>> import numpy as np
      >>> data = pack({"x": np.arange(8.0)}, [np.arange(6), np.array([6, 7])])
      >>> train, held_out = hold_out(data, 0.34)
      >>> train.client_sizes.tolist(), held_out.client_sizes.tolist()
      ([4, 2], [2, 0])
    """
    _validate.fraction(fraction=fraction)
    order, offsets = np.asarray(data.order), np.asarray(data.offsets)
    sizes = np.diff(offsets)
    held = np.floor(fraction * sizes + 1e-9).astype(int)  # 0.29 · 100 is 28.999… in binary
    owner = np.repeat(np.arange(len(sizes)), sizes)
    shuffled = order[np.lexsort((np.random.default_rng(seed).random(len(order)), owner))]
    aside = np.arange(len(order)) - offsets[owner] < held[owner]

    def part(chosen, counts):
        rows, weighed = shuffled[chosen], data.weigh_by is not None
        return dataclasses.replace(
            data,
            order=jnp.asarray(rows, jnp.int32),
            offsets=jnp.asarray(np.concatenate([[0], np.cumsum(counts)]), jnp.int32),
            max_examples=int(counts.max()),
            weights=_weights(data.examples[data.weigh_by], rows, counts) if weighed else None,
        )

    if not held.any():
        raise ValueError(
            f"fraction={fraction!r} holds out no example: the largest client has {sizes.max()}; use a larger fraction"
        )
    return part(~aside, sizes - held), part(aside, held)
