"""The random parts of the partitioners: safe draws, unbiased cuts, and the repair of clients left short."""

import numpy as np


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """exp(log_weights) / its sum; subtracting the largest keeps at least one weight at 1, so 0/0 cannot happen."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def dirichlet_draw(rng: np.random.Generator, alpha: float, size: int) -> np.ndarray:
    """One draw of Dirichlet(α·1), safe for tiny α.

    Gamma(α) variates underflow to zero for small α (about one in 1,800 at α = 0.01, half of them at 0.001), and all of
    them together give 0/0. But Gamma(α) = Gamma(α + 1) · U^{1/α} in law, whose logarithm never underflows.
    """
    uniform = 1.0 - rng.random(size)  # in (0, 1]
    return normalised(np.log(rng.standard_gamma(alpha + 1.0, size)) + np.log(uniform) / alpha)


def cut(rng: np.random.Generator, proportions: np.ndarray, length: int) -> np.ndarray:
    """Owners of ``length`` shuffled examples, ⌊length·p_m⌋ or ⌈length·p_m⌉ of them client m's.

    Cutting at ⌊length·cumsum(p) + u⌋, u ~ U(0, 1), gives client m length·p_m examples in expectation; plain rounding
    would not. The clients are cut in random order, else where a class is smaller than the number of clients (every
    length·p_m < 1) all clients an even number of places apart would get or miss the class together.
    """
    order = rng.permutation(len(proportions))
    ends = np.floor(np.cumsum(proportions[order]) * length + rng.random()).astype(np.int64)
    ends[-1] = length  # a sum of floats may miss it
    counts = np.diff(np.minimum(ends, length), prepend=0)
    return np.repeat(order, counts)


def repair(rng: np.random.Generator, client: np.ndarray, num_clients: int, min_examples: int) -> int:
    """Moves examples, in place, from the largest clients to those short of ``min_examples``; returns how many.

    The outcome is that of taking one random example at a time from whichever client is largest then: all donors end
    at one level L or L + 1. The level is found by bisection and everything moved at once. Since M · min_examples ≤ N,
    the excess over min_examples covers the need, so L ≥ min_examples and one pass ends it.
    """
    sizes = np.bincount(client, minlength=num_clients)
    missing = np.maximum(min_examples - sizes, 0)
    need = int(missing.sum())
    if need == 0:
        return 0
    low, high = min_examples, int(sizes.max())  # the largest level whose excess still covers the need
    while low < high:
        middle = (low + high + 1) // 2
        if np.maximum(sizes - middle, 0).sum() >= need:
            low = middle
        else:
            high = middle - 1
    taken = np.maximum(sizes - low, 0)
    donors = np.flatnonzero(taken)
    taken[rng.choice(donors, int(taken.sum()) - need, replace=False)] -= 1

    shuffled = rng.permutation(len(client))
    by_client = shuffled[np.argsort(client[shuffled], kind="stable")]
    rank = np.arange(len(client)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    given = by_client[rank < np.repeat(taken, sizes)]
    client[rng.permutation(given)] = np.repeat(np.arange(num_clients), missing)
    return need
