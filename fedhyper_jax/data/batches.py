"""How a client's examples become the batches of its local steps: exactly, with masks, inside the compiled round."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

from fedhyper_jax import _random, _validate
from fedhyper_jax.data.federated import ClientData, ClientView


@dataclasses.dataclass(frozen=True, repr=False)
class LocalWork:
    """A client's work in a round; made by `local_epochs` or `local_steps`. Static: it fixes shapes.

    Attributes:
      batch_size: examples of a local step.
      epochs: how often a client visits each of its examples; None where steps are counted.
      steps: local steps of each client; None where epochs are counted.
      with_replacement: whether each step draws its examples anew.
    """

    batch_size: int
    epochs: int | None = None
    steps: int | None = None
    with_replacement: bool = False

    def __repr__(self) -> str:
        if self.steps is None:
            return f"local_epochs({self.epochs}, batch_size={self.batch_size})"
        anew = ", with_replacement=True" if self.with_replacement else ""
        return f"local_steps({self.steps}, batch_size={self.batch_size}{anew})"

    def max_steps(self, max_examples: int) -> int:
        """Most local steps that a client of at most ``max_examples`` examples takes."""
        return self.steps if self.steps is not None else self.epochs * -(-max_examples // self.batch_size)

    def num_steps(self, num_examples: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """K_m: ``steps``, or epochs · ⌈n_m / batch_size⌉; 0 for a padded slot (n_m = 0)."""
        if self.steps is not None:
            return jnp.where(num_examples > 0, self.steps, 0).astype(jnp.int32)
        return self.epochs * self.steps_an_epoch(num_examples)

    def steps_an_epoch(self, num_examples: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """⌈n_m / batch_size⌉."""
        return _quotient_up(num_examples, self.batch_size)


def local_epochs(epochs: int, batch_size: int) -> LocalWork:
    """Each client visits each of its examples ``epochs`` times, reshuffled each epoch, the ragged last batch included.

    K_m = epochs · ⌈n_m / batch_size⌉, so clients of different sizes take different numbers of local steps.

    Example:
      >>> local_epochs(2, batch_size=32).max_steps(100)
      8
    """
    _validate.positive_integer(epochs=epochs, batch_size=batch_size)
    return LocalWork(batch_size=batch_size, epochs=epochs)


def local_steps(steps: int, batch_size: int, *, with_replacement: bool = False) -> LocalWork:
    """Each client takes ``steps`` local steps.

    They walk reshuffled epochs, the ragged last batch of each epoch included; ``with_replacement`` instead draws
    ``batch_size`` examples anew at each step (full batches even from a smaller client).

    Example:
      >>> local_steps(20, batch_size=32).max_steps(100)
      20
    """
    _validate.positive_integer(steps=steps, batch_size=batch_size)
    return LocalWork(batch_size=batch_size, steps=steps, with_replacement=with_replacement)


def _quotient_up(number: Int[Array, "*shape"], divisor: int) -> Int[Array, "*shape"]:
    """⌈number / divisor⌉ of numbers ≥ 0, without the choices that ``//`` makes for negative ones."""
    number = jnp.asarray(number, jnp.int32)
    divisor = jnp.full_like(number, divisor)
    return lax.div(number, divisor) + (lax.rem(number, divisor) > 0)


class ClientBatches(NamedTuple):
    """The batches of one client in one round. Step k uses the examples ``rows[k][mask[k]]``.

    Attributes:
      rows: int32 rows of the pool; masked entries repeat a row of the same batch.
      mask: False: padding, never an example.
      num_steps: K_m: steps with at least one example, all before the others.
    """

    rows: Int[Array, "max_steps batch"]
    mask: Bool[Array, "max_steps batch"]
    num_steps: Int[Array, ""]


class Batches(NamedTuple):
    """The same, step by step, inside a compiled round.

    Attributes:
      at: k -> rows, mask.
      num_steps: as of `ClientBatches`.
    """

    at: Callable[[Int[Array, ""]], tuple[Int[Array, " batch"], Bool[Array, " batch"]]]
    num_steps: Int[Array, ""]


def client_batches(key: Array, round_number: int, data: ClientData, client_id: int, work: LocalWork) -> ClientBatches:
    """The very batches that a client trains on in a round of the run with ``key``.

    Args:
      key: the key of the run.
      round_number: number of the round, from 0.
      data: the federated data set.
      client_id: the client, in [0, population).
      work: `local_epochs` or `local_steps`.

    Returns:
      Rows, mask and number of steps; `max_steps` is that of the largest client.

    Example:
      >>> import jax, numpy as np
      >>> from fedhyper_jax.data.federated import pack
      >>> data = pack({"x": np.arange(5.0)}, [np.array([3, 4]), np.array([0, 1, 2])])
      >>> draw = jax.jit(client_batches, static_argnames="work")
      >>> batches = jax.device_get(draw(jax.random.key(0), 0, data, 0, work=local_epochs(1, batch_size=2)))
      >>> sorted(batches.rows[batches.mask].tolist()), batches.mask.sum(axis=1).tolist(), int(batches.num_steps)
      ([3, 4], [2, 0], 1)
    """
    client, key = data.client(client_id), _random.batch_key(_random.round_keys(key, round_number).clients, client_id)
    batches = draw_batches(key, client, work, work.num_steps(client.size), max_examples=data.max_examples)
    rows, mask = jax.vmap(batches.at)(jnp.arange(work.max_steps(data.max_examples), dtype=jnp.int32))
    return ClientBatches(rows, mask, batches.num_steps)


def draw_batches(
    key: Array,
    client: ClientView,
    work: LocalWork,
    num_steps: Int[Array, ""],
    *,
    max_examples: int,
    most_steps: int | Int[Array, ""] | None = None,
) -> Batches:
    """As `client_batches`, from the client's own batch key. A padded slot (id = population) has no steps.

    Args:
      key: the client's batch key of the round.
      client: its examples.
      work: what it does.
      num_steps: K_m, how many steps it takes.
      max_examples: size of the largest client.
      most_steps: ≥ K_m, how many steps will be asked for, if that is known: the fewer, the less is shuffled.
    """
    size = client.size
    lane = jnp.arange(work.batch_size, dtype=jnp.int32)

    if work.with_replacement:
        shape = (work.max_steps(max_examples), work.batch_size)
        rows = client.rows_of(jax.random.randint(key, shape, 0, jnp.maximum(size, 1), dtype=jnp.int32))
        return Batches(lambda k: (rows[k], jnp.broadcast_to(k < num_steps, lane.shape)), num_steps)

    rows = client.rows_of(_shuffled_epochs(key, size, max_examples, work, most_steps))
    steps_an_epoch = jnp.maximum(work.steps_an_epoch(size), 1)

    def at(k):
        k = jnp.asarray(k, jnp.int32)
        epoch, batch = lax.div(k, steps_an_epoch), lax.rem(k, steps_an_epoch)  # (neither is negative)
        mask = (batch * work.batch_size + lane < size) & (k < num_steps)
        start = epoch * size + batch * work.batch_size
        return jnp.take(rows, start + jnp.where(mask, lane, 0), mode="clip"), mask

    return Batches(at, num_steps)


def all_examples(client: ClientView, batch_size: int) -> Batches:
    """Each of a client's examples once, in the order in which it owns them."""
    size = client.size
    lane = jnp.arange(batch_size, dtype=jnp.int32)

    def at(k):
        position = k * batch_size + lane
        mask = position < size
        return client.rows_of(jnp.where(mask, position, 0)), mask

    return Batches(at, _quotient_up(size, batch_size))


_SHORTEST_SHUFFLE = 64
_LONGEST_PACKED = 8192


def _shuffled_epochs(key, size, max_examples: int, work: LocalWork, most_steps) -> Int[Array, " stream"]:
    """Positions in [0, size) of epoch after epoch, each epoch a permutation: entry e·size + i is the i-th of epoch e.

    One sort by (epoch, random bits) shuffles all epochs at once. The bits of an entry depend on its index alone, so
    the length of the stream (which padding sets) changes nothing.
    """
    # K steps of at most B examples touch epochs of at most K·B + size examples in all.
    length = work.epochs * max_examples if work.epochs is not None else work.steps * work.batch_size + max_examples

    def shuffle(length: int):
        bits = jax.random.bits(key, (length,), jnp.uint32)
        return _sorted_epochs(bits, jnp.maximum(size, 1))

    if most_steps is None or work.epochs is None:
        return shuffle(length)
    # Most clients of a skewed federation are far smaller than the largest: whole epochs need epochs · n_m ≤ K_m · B
    # entries, so the shortest of a few lengths (each twice the one before) that holds as many will do.
    lengths = [_SHORTEST_SHUFFLE]
    while lengths[-1] < length:
        lengths.append(min(2 * lengths[-1], length))
    lengths[-1] = length
    enough = jnp.searchsorted(jnp.asarray(lengths[:-1]), most_steps * work.batch_size)
    branches = [lambda n=n: jnp.pad(shuffle(n), (0, length - n)) for n in lengths]
    return lax.switch(enough, branches) if len(branches) > 1 else branches[0]()


def _sorted_epochs(bits: UInt32[Array, " stream"], size: Int[Array, ""]) -> Int[Array, " stream"]:
    """Positions sorted by (epoch, random bits, position): each whole epoch of the stream a permutation of its own.

    XLA:CPU sorts one array of numbers some six times faster than three arrays by a comparison of two. So each entry is
    packed into one number: its epoch on top, its position at the bottom, random bits between. They do not fit at once;
    sorting by their lower half first and by their upper half next, as radix sort does, is the same.
    """
    length = len(bits)
    index, n = jnp.arange(length, dtype=jnp.uint32), size.astype(jnp.uint32)
    epoch, position = index // n, index % n
    if length > _LONGEST_PACKED:
        return lax.sort((epoch, bits, position), num_keys=2)[2].astype(jnp.int32)
    position_width, epoch_width = _bit_length(n - 1), _bit_length((length - 1) // n)
    width = position_width + epoch_width  # at most 16, and so is the half of the random bits that it leaves no room for
    top = jnp.where(epoch_width > 0, epoch << ((32 - epoch_width) % 32), 0)

    def order(part, position):
        return lax.sort(top | (part << position_width) | position) & ((jnp.uint32(1) << position_width) - 1)

    first = order(bits & ((jnp.uint32(1) << width) - 1), position)
    upper = jnp.take(bits, epoch * n + first, mode="clip") >> width
    second = order(upper, position)
    return jnp.take(first, epoch * n + second, mode="clip").astype(jnp.int32)


def _bit_length(number: UInt32[Array, ""]) -> UInt32[Array, ""]:
    return 32 - lax.clz(jnp.asarray(number, jnp.uint32))
