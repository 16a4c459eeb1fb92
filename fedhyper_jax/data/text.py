"""Made-up texts: every client writes with a Markov chain of its own, near a common one."""

import numpy as np

from fedhyper_jax import _validate
from fedhyper_jax.data.dataset import Dataset
from fedhyper_jax.data.partition import check_seed

_CHANCES = np.array([0.7, 0.1, 0.1, 0.1])
"""Of the symbols that may follow another."""


def synthetic_text(
    num_clients: int = 100,
    *,
    vocabulary: int = 32,
    length: int = 20,
    examples_per_client: int = 40,
    heterogeneity: float = 0.25,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Texts for next-symbol prediction that need no file.

    Each symbol is followed by one of four, with probabilities 0.7, 0.1, 0.1 and 0.1. Which four is common to all
    clients, but each client has followers of its own for some of the symbols. So 70 % is about the best accuracy, a
    little less the more the clients differ.

    Args:
      num_clients: M.
      vocabulary: number of symbols, ≥ 2.
      length: predicted symbols of an example.
      examples_per_client: training and test examples of each client together, ≥ 2.
      heterogeneity: chance in [0, 1] that a client has followers of its own for a symbol.
      test_fraction: share of each client's examples held out, rounded, at least one and never all.
      seed: of everything. Client k's texts depend on the seed and k alone, not on the number of clients.

    Returns:
      A `Dataset` for the task "next_symbol" with the owners of its examples.

    Raises:
      ValueError: numbers out of range.

    Example:
      >>> dataset = synthetic_text(3, examples_per_client=10, length=5)
      >>> dataset.train["x"].shape, dataset.test["y"].shape, np.bincount(dataset.train_client_ids).tolist()
      ((27, 5), (3, 5), [9, 9, 9])
    """
    _validate.positive_integer(num_clients=num_clients, length=length)
    for name, value in (("vocabulary", vocabulary), ("examples_per_client", examples_per_client)):
        _validate.positive_integer(**{name: value})
        if value < 2:
            raise ValueError(f"{name} must be ≥ 2, got {value}; give e.g. 40")
    _validate.fraction(test_fraction=test_fraction)
    if not 0 <= heterogeneity <= 1:
        raise ValueError(f"heterogeneity must lie in [0, 1], got {heterogeneity!r}; 0 makes all clients alike")
    check_seed(seed)
    shared, *streams = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(num_clients + 1))
    common = shared.integers(0, vocabulary, size=(vocabulary, len(_CHANCES)))
    texts = []
    for rng in streams:
        own = rng.integers(0, vocabulary, size=common.shape)
        followers = np.where(rng.random((vocabulary, 1)) < heterogeneity, own, common)
        texts.append(_written(rng, followers, examples_per_client, length + 1))
    held_out = min(max(round(test_fraction * examples_per_client), 1), examples_per_client - 1)
    split = {"test": [text[:held_out] for text in texts], "train": [text[held_out:] for text in texts]}
    examples = {
        name: {"x": np.concatenate([t[:, :-1] for t in parts]), "y": np.concatenate([t[:, 1:] for t in parts])}
        for name, parts in split.items()
    }
    owners = {name: np.repeat(np.arange(num_clients), len(parts[0])) for name, parts in split.items()}
    return Dataset(
        name="synthetic_text",
        train=examples["train"],
        test=examples["test"],
        num_classes=vocabulary,
        input_shape=(length,),
        source=f"Markov chains of {vocabulary} symbols, heterogeneity {heterogeneity:g}, seed {seed}",
        task="next_symbol",
        train_client_ids=owners["train"],
        test_client_ids=owners["test"],
    )


def _written(rng: np.random.Generator, followers: np.ndarray, number: int, length: int) -> np.ndarray:
    """Texts of a chain, (number, length) int32, from symbols drawn uniformly."""
    text = [rng.integers(0, len(followers), size=number)]
    for choice in rng.choice(len(_CHANCES), p=_CHANCES, size=(length - 1, number)):
        text.append(followers[text[-1], choice])
    return np.stack(text, axis=1).astype(np.int32)
