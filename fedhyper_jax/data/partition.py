"""Which client owns which example: partitioners in pure NumPy, seeded, always terminating, disjoint and covering.

Every partitioner costs O(N log N + clients), per-class Dirichlet O(classes × clients) more; none loops until a draw
happens to please. Where a draw leaves a client short of ``min_examples``, examples are moved to it from the largest
clients, and `Partition.moved` says how many.
"""

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedhyper_jax import _validate
from fedhyper_jax.data import _draws


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Partition:
    """An assignment of N examples to clients, and how it came about.

    Attributes:
      client_rows: for each client the rows it owns, ascending int64; what `fedhyper_jax.data.pack` takes.
      method: name of the partitioner.
      settings: its arguments, the seed among them.
      moved: number of examples moved between clients so that each has ``min_examples``.
    """

    client_rows: list[np.ndarray]
    method: str
    settings: Mapping[str, Any]
    moved: int = 0

    def __post_init__(self) -> None:
        # NumPy scalars would not survive the way into a TOML or JSON record
        plain = {name: v.item() if isinstance(v, np.generic) else v for name, v in self.settings.items()}
        object.__setattr__(self, "settings", plain)

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.client_rows)

    @property
    def num_examples(self) -> int:
        """Number of examples over all clients."""
        return int(self.client_sizes.sum())

    @property
    def client_sizes(self) -> np.ndarray:
        """(clients,) number of examples of each client."""
        return np.array([len(rows) for rows in self.client_rows], np.int64)

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the assignment: the same rows for the same clients give the same digest on any machine."""
        sha = hashlib.sha256(self.client_sizes.astype("<i8").tobytes())
        for rows in self.client_rows:
            sha.update(np.asarray(rows).astype("<i8").tobytes())
        return sha.hexdigest()

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return (
            f"<Partition {self.method}({settings}): {self.num_examples} examples over {self.num_clients} clients, "
            f"{self.moved} moved, digest {self.digest[:12]}>"
        )


def iid(num_examples: int, num_clients: int, *, seed: int) -> Partition:
    """Deals shuffled examples out evenly: sizes differ by at most one.

    Args:
      num_examples: N, examples in the pool.
      num_clients: M ≤ N.
      seed: of the shuffle.

    Returns:
      A `Partition` in which every client's examples are a uniform sample of the pool.

    Raises:
      ValueError: fewer examples than clients, counts or seed out of range.

    Example:
      >>> iid(7, 3, seed=0).client_sizes.tolist()
      [3, 2, 2]

    Reference: McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
      Decentralized Data", arXiv 1602.05629 (the IID split).
    """
    _check_counts(num_examples, num_clients, 1)
    client = np.empty(num_examples, np.int64)
    client[_generator(seed).permutation(num_examples)] = np.arange(num_examples) % num_clients
    return _partition(client, num_clients, "iid", {"num_clients": num_clients, "seed": seed})


def dirichlet(labels: np.ndarray, num_clients: int, *, alpha: float, seed: int, min_examples: int = 1) -> Partition:
    """Label skew: the examples of *each class* are divided over the clients by a Dirichlet draw.

    For each class c on its own: p_c ~ Dirichlet(α·1_M), and client m gets ⌊n_c p_cm⌋ or ⌈n_c p_cm⌉ of the n_c shuffled
    examples of the class, n_c p_cm in expectation. So E[p_cm] = 1/M and Var[p_cm] = (1/M)(1 − 1/M)/(Mα + 1). Large α
    approaches an even split of every class; small α leaves most classes to few clients. (Drawing the label
    distribution of each *client* from a Dirichlet is another split, which gives all clients one size; this one is the
    field's default and skews sizes too.)

    Args:
      labels: (N,) integers.
      num_clients: M, with M · min_examples ≤ N.
      alpha: concentration α > 0; tested from 0.01 to 1000.
      seed: of the draws.
      min_examples: examples every client has at least; the missing ones move from the largest clients.

    Returns:
      A `Partition`; ``moved`` counts the examples moved.

    Raises:
      ValueError: α not finite or ≤ 0, labels not 1-D integers, more clients than the examples can serve.

    Example:
      >>> labels = np.repeat(np.arange(3), 40)
      >>> partition = dirichlet(labels, 4, alpha=0.5, seed=0)
      >>> partition.num_clients, partition.num_examples
      (4, 120)

    Reference: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
      Classification", arXiv 1909.06335; per class as in Yurochkin et al., "Bayesian Nonparametric Federated Learning of
      Neural Networks", arXiv 1905.12022.
    """
    labels = _check_labels(labels)
    _validate.positive(alpha=alpha)
    _check_counts(len(labels), num_clients, min_examples)
    rng = _generator(seed)
    client = np.empty(len(labels), np.int64)
    class_index, class_sizes = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    rows_by_class = np.split(np.argsort(class_index, kind="stable"), np.cumsum(class_sizes)[:-1])
    for rows in rows_by_class:
        proportions = _draws.dirichlet_draw(rng, float(alpha), num_clients)
        client[rng.permutation(rows)] = _draws.cut(rng, proportions, len(rows))
    moved = _draws.repair(rng, client, num_clients, min_examples)
    settings = {"num_clients": num_clients, "alpha": float(alpha), "seed": seed, "min_examples": min_examples}
    return _partition(client, num_clients, "dirichlet", settings, moved)


def shards(labels: np.ndarray, num_clients: int, *, shards_per_client: int = 2, seed: int) -> Partition:
    """The pathological split: sort by label, cut into equal shards, deal a few of them to each client.

    With s shards a client, the sorted pool is cut at ⌊iN/(Ms)⌋, i = 0 … Ms, so every example is dealt even where Ms
    does not divide N. A shard of at most the smallest class' size spans at most two classes.

    Args:
      labels: (N,) integers.
      num_clients: M, with M · shards_per_client ≤ N.
      shards_per_client: s; 2 in the original.
      seed: of the order inside each class and of the dealing.

    Returns:
      A `Partition`.

    Raises:
      ValueError: labels not 1-D integers, more shards than examples.

    Example:
      >>> labels = np.repeat(np.arange(4), 10)
      >>> [len(set(labels[rows].tolist())) for rows in shards(labels, 4, shards_per_client=1, seed=0).client_rows]
      [1, 1, 1, 1]

    Reference: McMahan et al., arXiv 1602.05629, section 3 (the non-IID split of MNIST).
    """
    labels = _check_labels(labels)
    _validate.positive_integer(shards_per_client=shards_per_client)
    _check_counts(len(labels), num_clients, shards_per_client, per_client="shards_per_client")
    rng = _generator(seed)
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    num_shards = num_clients * shards_per_client
    shard_sizes = np.diff(np.arange(num_shards + 1) * len(labels) // num_shards)
    owner_of_shard = rng.permutation(num_shards) // shards_per_client
    client = np.empty(len(labels), np.int64)
    client[by_label] = np.repeat(owner_of_shard, shard_sizes)
    settings = {"num_clients": num_clients, "shards_per_client": shards_per_client, "seed": seed}
    return _partition(client, num_clients, "shards", settings)


def quantity_skew(
    num_examples: int,
    num_clients: int,
    *,
    distribution: str = "lognormal",
    skew: float,
    seed: int,
    min_examples: int = 1,
) -> Partition:
    """Size skew without label skew: shuffled examples, cut into clients of very different sizes.

    Client m gets a share w_m / Σ w of the pool, with w_m = exp(σ z_m), z_m ~ N(0, 1) for ``"lognormal"`` and
    w_m = r_m^{−s}, r a random order of 1 … M, for ``"power"`` (Zipf's law); σ or s is ``skew``; 0 gives equal sizes.

    Args:
      num_examples: N, examples in the pool.
      num_clients: M, with M · min_examples ≤ N.
      distribution: ``"lognormal"`` or ``"power"``.
      skew: σ or s, ≥ 0.
      seed: of the draws.
      min_examples: examples every client has at least; the missing ones move from the largest clients.

    Returns:
      A `Partition`.

    Raises:
      ValueError: unknown distribution, skew negative or not finite, more clients than the examples can serve.

    Example:
      >>> sorted(quantity_skew(100, 4, distribution="power", skew=1.0, seed=0).client_sizes.tolist())
      [12, 16, 24, 48]

    Reference: Li, Diao, Chen, He, "Federated Learning on Non-IID Data Silos: An Experimental Study", arXiv 2102.02079
      (quantity skew, there by a Dirichlet draw).
    """
    _validate.one_of(("lognormal", "power"), distribution=distribution)
    if not (np.isscalar(skew) and np.isfinite(skew) and skew >= 0):
        raise ValueError(f"skew must be finite and ≥ 0, got {skew!r}; 0 gives equal sizes, 1 a marked skew")
    _check_counts(num_examples, num_clients, min_examples)
    rng = _generator(seed)
    if distribution == "lognormal":
        log_weights = float(skew) * rng.standard_normal(num_clients)
    else:
        log_weights = -float(skew) * np.log1p(rng.permutation(num_clients))
    client = np.empty(num_examples, np.int64)
    client[rng.permutation(num_examples)] = _draws.cut(rng, _draws.normalised(log_weights), num_examples)
    moved = _draws.repair(rng, client, num_clients, min_examples)
    settings = {
        "num_clients": num_clients,
        "distribution": distribution,
        "skew": float(skew),
        "seed": seed,
        "min_examples": min_examples,
    }
    return _partition(client, num_clients, "quantity_skew", settings, moved)


def by_user(client_ids: np.ndarray) -> Partition:
    """The natural split: each example belongs to the user who made it.

    Args:
      client_ids: (N,) integers or strings, the owner of each example. Clients are numbered by sorted distinct id.

    Returns:
      A `Partition`; nothing is random and nothing is moved.

    Raises:
      ValueError: ids not 1-D, empty, or neither integers nor strings.

    Example:
      >>> [rows.tolist() for rows in by_user(np.array(["eve", "bob", "eve"])).client_rows]
      [[1], [0, 2]]
    """
    ids = np.asarray(client_ids)
    if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iuUS":
        raise ValueError(
            f"client_ids must be a non-empty 1-D array of integers or strings, got shape {ids.shape} and dtype "
            f"{ids.dtype}; give one id an example"
        )
    distinct, client = np.unique(ids, return_inverse=True)
    return _partition(client, len(distinct), "by_user", {"num_clients": len(distinct)})


PARTITIONERS: dict[str, Callable[..., Partition]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "quantity_skew": quantity_skew,
    "by_user": by_user,
}
"""Partitioners by name; `make_partition` calls them with one common signature."""


def make_partition(
    name: str,
    labels: np.ndarray | None = None,
    num_clients: int | None = None,
    *,
    client_ids: np.ndarray | None = None,
    seed: int = 0,
    **settings: Any,
) -> Partition:
    """Calls a partitioner by name, as a configuration file does.

    Args:
      name: a key of `PARTITIONERS`.
      labels: (N,) integers; partitioners that ignore labels use their number.
      num_clients: M; not for ``"by_user"``.
      client_ids: (N,) owners, only for ``"by_user"``.
      seed: fixed at 0 unless named, so that other seeds of a run leave the split as it is.
      **settings: what the partitioner takes besides, e.g. ``alpha``.

    Returns:
      The `Partition`.

    Raises:
      ValueError: an unknown name or setting, a missing one, or whatever the partitioner refuses.

    Example:
      >>> make_partition("dirichlet", np.arange(100) % 10, 5, alpha=0.5).num_clients
      5
    """
    _validate.one_of(PARTITIONERS, partitioner=name)
    function = PARTITIONERS[name]
    parameters = inspect.signature(function).parameters
    if "client_ids" in parameters:
        if client_ids is None:
            raise ValueError(f"partitioner {name!r} needs client_ids, got None; choose another where users are unknown")
        pool = {"client_ids": client_ids}
    else:
        if labels is None or num_clients is None:
            raise ValueError(
                f"partitioner {name!r} needs labels and num_clients, got "
                f"labels={'None' if labels is None else '...'} and num_clients={num_clients}"
            )
        pool = {"labels": labels} if "labels" in parameters else {"num_examples": len(labels)}
        settings = {"num_clients": num_clients, "seed": seed, **settings}
    own = [setting for setting in parameters if setting not in pool]
    for setting in settings:
        _validate.one_of(own, **{f"setting of partitioner {name!r}": setting})
    for setting in own:
        if setting not in settings and parameters[setting].default is inspect.Parameter.empty:
            raise ValueError(f"partitioner {name!r} needs the setting {setting}; give it, e.g. {setting}=0.5")
    return function(**pool, **settings)


def check_seed(seed: int) -> None:
    """Refuses a seed that is not an integer ≥ 0, None among them.

    Raises:
      ValueError: as said.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be an integer ≥ 0, got {seed!r}; unseeded draws cannot be repeated")


def _generator(seed: int) -> np.random.Generator:
    check_seed(seed)
    return np.random.default_rng(seed)


def _check_counts(num_examples: int, num_clients: int, floor: int, per_client: str = "min_examples") -> None:
    _validate.positive_integer(num_examples=num_examples, num_clients=num_clients, **{per_client: floor})
    if num_clients * floor > num_examples:
        raise ValueError(
            f"num_clients × {per_client} must not exceed the number of examples, got {num_clients} × {floor} > "
            f"{num_examples}; use fewer clients, a smaller {per_client}, or more data"
        )


def _check_labels(labels: np.ndarray) -> np.ndarray:
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be a non-empty 1-D array of integers, got shape {array.shape} and dtype {array.dtype}; "
            "use labels.ravel() for a column, argmax for one-hot rows, astype(int) for whole floats"
        )
    return array


def _partition(client: np.ndarray, num_clients: int, method: str, settings: dict, moved: int = 0) -> Partition:
    """From the owner of each row to the rows of each owner; a stable sort leaves rows ascending."""
    ends = np.cumsum(np.bincount(client, minlength=num_clients))
    rows = np.split(np.argsort(client, kind="stable"), ends[:-1])
    return Partition(client_rows=rows, method=method, settings=settings, moved=moved)
