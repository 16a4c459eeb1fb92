"""Evaluation: jitted, masked, exact whatever the batch size; on the server's test set and client by client."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fedhyper_jax import _repr, _validate
from fedhyper_jax.base import Examples, Params
from fedhyper_jax.tasks.losses import check_per_example
from fedhyper_jax.tasks.metrics import Mean, MetricsFunction


class ClientExamples(Protocol):
    """Clients' examples, as `FederatedData` has them: one pool, and client after client the rows that it owns."""

    @property
    def examples(self) -> Examples:
        """The pool."""
        ...

    @property
    def order(self) -> Int[Array, " examples"]:
        """Its rows, client after client."""
        ...

    @property
    def offsets(self) -> Int[Array, " population+1"]:
        """Where each client's begin in `order`, and where the last one's end."""
        ...

    @property
    def client_sizes(self) -> Int[Array, " population"]:
        """Number of examples of each client."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class EvaluationData:
    """Data that parameters are evaluated on; an argument of compiled programs, never a constant.

    Attributes:
      test: the server's test examples, or None.
      clients: each client's examples (its own, or those `data.hold_out` set aside), or None.
    """

    test: Examples | None = None
    clients: ClientExamples | None = None

    def __repr__(self) -> str:
        test = "no test examples"
        if isinstance(self.test, Mapping):
            lengths = [_repr.length(array) for array in self.test.values()]
            test = f"{lengths[0] if lengths else 0} test examples: {_repr.arrays(self.test)}"
        return f"<EvaluationData: {test}; {'no clients' if self.clients is None else self.clients}>"


Evaluation = Callable[[Params, EvaluationData], dict[str, Float[Array, ""]]]
"""``evaluate(params, data)``: named scalars."""


def make_evaluation(
    metrics_fn: MetricsFunction, *, batch_size: int = 500, lower_is_better: Collection[str] | None = None
) -> Evaluation:
    """Makes the evaluation of parameters on `EvaluationData`.

    Args:
      metrics_fn: ``(params, batch) -> named values per example``, e.g. `metrics.classification(model)`.
      batch_size: examples at a time; the last batch is masked, so the result does not depend on it.
      lower_is_better: names of the metrics of which the highest are the worst, such as errors; of the others the
        lowest are. Known without it are loss, cross_entropy, perplexity, error, squared_error, absolute_error, mse,
        rmse and mae, and in the other direction accuracy, precision, recall, f1 and auc.

    Returns:
      ``evaluate(params, data)``. For each metric of ``metrics_fn``, e.g. "accuracy", and as far as the data has them:
      "test_accuracy", the mean over the test set; over clients with examples, each client's own mean counting once,
      "client_accuracy_mean", "client_accuracy_std" (population standard deviation) and "client_accuracy_worst_decile",
      the mean of the lowest tenth of the clients (rounded up; the highest tenth where lower is better).
      Examples whose weight is 0 (see `metrics.MetricsFunction`) count nowhere, nor do clients that have no others.

    Raises:
      ValueError: when called, and by runs before they compile: data of a wrong form, test examples that JAX's dtypes
        would change, examples that the metrics refuse (labels that are no class). While tracing: metrics of a wrong
        form and, on clients, of no known direction.

    Example:
      >>> import jax, numpy as np
      >>> from fedhyper_jax.data.federated import pack
      >>> def metrics_fn(params, batch): return {"accuracy": (batch["x"] == params).astype(float)}
      >>> clients = pack({"x": np.array([0, 0, 1, 1])}, [np.array([0, 1]), np.array([2]), np.array([3])])
      >>> evaluate = jax.jit(make_evaluation(metrics_fn, batch_size=3))
      >>> values = evaluate(0, EvaluationData(test={"x": np.array([0, 0, 0, 1])}, clients=clients))
      >>> {name: round(float(value), 3) for name, value in values.items()}
      {'client_accuracy_mean': 0.333, 'client_accuracy_std': 0.471, 'client_accuracy_worst_decile': 0.0,
       'test_accuracy': 0.75}
    """
    _validate.positive_integer(batch_size=batch_size)
    lower = None if lower_is_better is None else frozenset(lower_is_better)

    def evaluate(params: Params, data: EvaluationData) -> dict[str, Float[Array, ""]]:
        check(params, data)
        values = {}
        if data.test is not None:
            length = len(next(iter(data.test.values())))
            test = _per_example(metrics_fn, batch_size, params, data.test, jnp.arange(length))
            _check_known(lower, test)
            for name, (totals, weights) in test.items():
                alike = weights is None
                mean = Mean.of(totals, jnp.ones(length, bool)) if alike else Mean(totals.sum(), weights.sum())
                values[f"test_{name}"] = mean.value
        if data.clients is not None:
            means = _client_means(metrics_fn, batch_size, params, data.clients)
            _check_known(lower, means)
            for name, (mean, counts) in means.items():
                summary = client_summary(mean, counts, highest_is_worst=_highest_is_worst(name, lower))
                values.update({f"client_{name}_{statistic}": value for statistic, value in summary.items()})
        return values

    def check(params: Params, data: EvaluationData) -> None:
        _check_data(data)
        _check_examples(metrics_fn, params, data)

    evaluate.check = check
    return evaluate


def _per_example(
    metrics_fn: MetricsFunction, batch_size: int, params: Params, examples: Examples, rows: Int[Array, " examples"]
) -> dict[str, Mean]:
    """By name, a `Mean` an example; its weights are None where all examples count alike."""
    examples = jax.tree.map(jnp.asarray, examples)
    size = min(batch_size, len(rows))
    padded = jnp.concatenate([rows, jnp.repeat(rows[-1:], -len(rows) % size)]).reshape(-1, size)

    def one_batch(_, batch_rows):
        values = metrics_fn(params, jax.tree.map(lambda array: array[batch_rows], examples))
        if not isinstance(values, dict):
            raise ValueError(
                "metrics_fn must return a dict of named values, one per example, such as {'accuracy': …}, got "
                + (f"an array of shape {values.shape}" if hasattr(values, "shape") else f"{values!r}")
            )
        values = {name: v if isinstance(v, Mean) else Mean(v, None) for name, v in values.items()}
        for name, value in values.items():
            for leaf in jax.tree.leaves(value):
                check_per_example(leaf, size, name=f"the metric {name!r}")
        # Sums of many examples want float32 at least, and metrics may be truth values.
        return None, jax.tree.map(lambda v: v.astype(jnp.promote_types(v.dtype, jnp.float32)), values)

    _, stacked = lax.scan(one_batch, None, padded)
    return jax.tree.map(lambda values: values.reshape(-1)[: len(rows)], stacked)


def _client_means(
    metrics_fn: MetricsFunction, batch_size: int, params: Params, clients: ClientExamples
) -> dict[str, tuple[Float[Array, " population"], Bool[Array, " population"]]]:
    """By name, each client's mean of a metric, and whether it has examples that count; else the mean is 0."""
    sizes = clients.client_sizes
    owner = jnp.searchsorted(clients.offsets, jnp.arange(len(clients.order)), side="right") - 1
    sums = functools.partial(jax.ops.segment_sum, segment_ids=owner, num_segments=len(sizes), indices_are_sorted=True)
    means = {}
    measured = _per_example(metrics_fn, batch_size, params, clients.examples, clients.order)
    for name, (totals, weights) in measured.items():
        counted = sizes if weights is None else sums(weights)
        means[name] = (sums(totals) / jnp.where(counted > 0, counted, 1), counted > 0)
    return means


_compiled_client_means = jax.jit(_client_means, static_argnums=(0, 1))


def evaluate_clients(
    metrics_fn: MetricsFunction, params: Params, clients: ClientExamples, *, batch_size: int = 500
) -> dict[str, np.ndarray]:
    """Results of every client by its own name: columns of one row a client, as ``pandas.DataFrame`` and csv take them.

    Args:
      metrics_fn: ``(params, batch) -> named values per example``, as of `make_evaluation`.
      params: to be evaluated: ``algorithm.evaluated_params(state)``.
      clients: each client's examples, as `data.pack` or `data.hold_out` makes them.
      batch_size: examples at a time; the result does not depend on it.

    Returns:
      ``"client"``, its name, or its number where clients have none; ``"examples"``, how many it has; and by each metric
      the mean over its examples, NaN of a client without examples that count.

    Raises:
      ValueError: data of a wrong form, metrics of a wrong form or called "client" or "examples", examples that the
        metrics refuse.

    Example:
      >>> from fedhyper_jax.data import from_client_ids
      >>> def metrics_fn(params, batch): return {"error": abs(batch["x"] - params)}
      >>> clients = from_client_ids({"x": np.array([1.0, 2.0, 5.0])}, np.array(["eve", "bob", "eve"]))
      >>> results = evaluate_clients(metrics_fn, 1.0, clients)
      >>> {str(client): float(error) for client, error in zip(results["client"], results["error"])}
      {'bob': 1.0, 'eve': 2.0}
    """
    _validate.positive_integer(batch_size=batch_size)
    data = EvaluationData(clients=clients)
    _check_data(data)
    _check_examples(metrics_fn, params, data)
    means = jax.device_get(_compiled_client_means(metrics_fn, batch_size, params, clients))
    names = getattr(clients, "names", None)
    sizes = np.asarray(clients.client_sizes)
    columns = {
        "client": np.arange(len(sizes)) if names is None else np.fromiter(names, object, len(names)),
        "examples": sizes,
    }
    for name in columns:
        if name in means:
            raise ValueError(f"metrics_fn has a metric {name!r}, which is a column already; call it otherwise")
    return columns | {name: np.where(counts, mean, np.nan) for name, (mean, counts) in means.items()}


def _check_examples(metrics_fn: MetricsFunction, params: Params, data: EvaluationData) -> None:
    """Raises ValueError for examples that the metrics refuse."""
    check = getattr(metrics_fn, "check", None)
    if check is not None and data.test is not None:
        check(params, data.test, name="test")
    if check is not None and data.clients is not None:
        check(params, data.clients.examples, data.clients.order)


_LOWER_IS_BETTER = frozenset("loss cross_entropy perplexity error squared_error absolute_error mse rmse mae".split())
_HIGHER_IS_BETTER = frozenset("accuracy precision recall f1 auc".split())


def _check_known(lower_is_better: Collection[str] | None, metrics: Collection[str]) -> None:
    """Raises ValueError where ``lower_is_better`` names what is no metric."""
    unknown = set(lower_is_better or ()) - set(metrics)
    if unknown:
        raise ValueError(f"lower_is_better names {sorted(unknown)}, but the metrics are {sorted(metrics)}")


def _highest_is_worst(name: str, lower_is_better: Collection[str] | None) -> bool:
    """Whether the clients with the highest values of a metric are the worst.

    Raises:
      ValueError: a name that says nothing, where nothing else is said.
    """
    if name in _LOWER_IS_BETTER or name in (lower_is_better or ()):
        return True
    if lower_is_better is None and name not in _HIGHER_IS_BETTER:
        raise ValueError(
            f"which clients are the worst by the metric {name!r} is not known; give make_evaluation(…, "
            f"lower_is_better=[{name!r}]), or lower_is_better=[] if higher is better"
        )
    return False


def _check_data(data: EvaluationData) -> None:
    """Raises ValueError for anything but `EvaluationData` with something in it that keeps its numbers in JAX."""
    if not isinstance(data, EvaluationData) or (data.test is None and data.clients is None):
        raise ValueError(f"evaluation data must be EvaluationData(test=..., clients=...), got {type(data).__name__}")
    if data.clients is not None and not hasattr(data.clients, "order"):
        raise ValueError(
            f"clients of EvaluationData must be as data.pack or data.hold_out makes them, got "
            f"{type(data.clients).__name__}; clients that are made on demand are tested on examples_of_strangers"
        )
    if data.test is not None:
        if not isinstance(data.test, Mapping):
            raise ValueError(
                f"test of EvaluationData must be a dict of arrays, got {type(data.test).__name__}; "
                "give e.g. {'x': inputs, 'y': targets}"
            )
        lengths = {name: np.shape(array)[:1] for name, array in data.test.items()}
        if len(set(lengths.values())) != 1 or next(iter(lengths.values())) in ((), (0,)):
            raise ValueError(f"test examples must be arrays of one common length ≥ 1, got lengths {lengths}")
        for name, array in data.test.items():
            _validate.fits(array, name=f"test[{name!r}]")


def client_summary(
    values: Float[Array, " population"], counts: Array, *, highest_is_worst: bool = False
) -> dict[str, Float[Array, ""]]:
    """Mean, standard deviation and worst decile over the clients where ``counts`` is true; NaN without any."""
    number = jnp.sum(counts)
    mean = Mean.of(values, counts).value
    variance = Mean.of(jnp.square(values - mean), counts).value
    signed = -values if highest_is_worst else values
    signed = jnp.where(jnp.isnan(signed), -jnp.inf, signed)  # a client whose loss is not a number is the worst of all
    ranked = jnp.sort(jnp.where(counts, signed, jnp.inf))
    lowest = jnp.arange(len(values)) < -(-number // 10)
    worst = Mean.of(ranked, lowest).value
    return {"mean": mean, "std": jnp.sqrt(variance), "worst_decile": -worst if highest_is_worst else worst}


def rounds_to_target(
    rounds: Sequence[int], values: Sequence[float], target: float, *, window: int = 3, higher_is_better: bool = True
) -> int | None:
    """Rounds run until the mean of the last ``window`` evaluations first reached ``target``; None if it never did.

    Args:
      rounds: numbers (from 0) of the evaluated rounds.
      values: what was evaluated after each of them; not finite counts as missing the target.
      target: the value to reach.
      window: evaluations averaged, so that one lucky evaluation does not count.
      higher_is_better: whether the target is reached from below, as by an accuracy, or from above, as by an error.

    Returns:
      A number of rounds, i.e. one more than the number of the round; with fewer than ``window`` evaluations None.

    Example:
      >>> rounds_to_target([0, 1, 2, 3, 4], [0.1, 0.9, 0.5, 0.8, 0.9], target=0.7)
      4
    """
    if len(values) < window:  # np.convolve would swap its arguments
        return None
    sums = np.convolve(np.asarray(values, float), np.ones(window), mode="valid")
    sign = 1 if higher_is_better else -1
    # Evaluations are float32: three times exactly the target must count.
    reached = np.flatnonzero(sign * (sums / window - target) >= -1e-6)
    return int(rounds[reached[0] + window - 1]) + 1 if len(reached) else None
