"""The table of methods, and everything by name: names are joined by '+', e.g. 'scaffold+fedexp' or 'G+SL+CL'."""

from typing import Any

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.data import LocalWork
from fedhyper_jax.methods.compose import usual_global_rate
from fedhyper_jax.methods.families import FAMILIES
from fedhyper_jax.methods.schedulers import usual_bounds
from fedhyper_jax.methods.values import Method, NamedMethod, all_together

KINDS = (
    "FedHyper",
    "global rate",
    "local rate",
    "server step",
    "client drift",
    "client step",
    "aggregation",
    "authors' code",
)

METHODS: dict[str, NamedMethod] = {
    name: value for family in FAMILIES for name, value in vars(family).items() if isinstance(value, NamedMethod)
}
"""Methods by name."""


def parse_method(name: str) -> tuple[str, ...]:
    """The methods that a name joins.

    Raises:
      ValueError: an unknown method (the known ones are listed), or one named twice.

    Example:
      >>> parse_method("scaffold+fedexp")
      ('scaffold', 'fedexp')
    """
    names = tuple(name.split("+")) if isinstance(name, str) else (name,)
    for part in names:
        _validate.one_of(METHODS, method=part)
    if len(set(names)) < len(names):
        raise ValueError(f"method {name!r} names one twice; name each once")
    return names


def method_by_name(name: str, **options: Any) -> Method:
    """The method, or the sum of methods, that a name stands for.

    Args:
      name: a key of METHODS, or several joined by '+'.
      **options: of the methods, see `method_options`. What several of them take is for all of them, or a mapping by
        their names.

    Raises:
      ValueError: unknown methods or options (the known ones are listed), and values that cannot be.

    Example:
      >>> from fedhyper_jax import fedexp, scaffold
      >>> method_by_name("scaffold+fedexp", population=100, epsilon=0.01)
      scaffold(population=100) + fedexp(epsilon=0.01)
      >>> method_by_name("scaffold+fedexp", epsilon=0.01) == scaffold + fedexp(epsilon=0.01)
      True
    """
    return all_together(METHODS[part] for part in parse_method(name))(**options)


def make_method(
    name: str, loss_fn: LossFunction, *, work: LocalWork, local_rate: Any = None, **settings: Any
) -> FederatedAlgorithm:
    """Makes an algorithm by name: short for ``method_by_name(name, **options)(loss_fn, **settings)``.

    Args:
      name: a key of METHODS, or several joined by '+', e.g. 'fedprox+G' or 'scaffold+fedexp'.
      loss_fn: ``(params, batch) -> per-example losses (B,)``.
      work: `local_epochs` or `local_steps`.
      local_rate: β^0 > 0; where a method has one of its own it may be left out.
      **settings: options of the methods, see `method_options`, and settings of all methods, see `fedavg`. Numbers may
        be traced, but for the constants of optax transforms (plateaus, server optimizers).

    Returns:
      The algorithm.

    Raises:
      ValueError: unknown methods and options, an option that is missing, two methods with a rule each for one thing,
        and whatever their parts refuse.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = make_method(
      ...     "scaffold+fedexp", loss_fn, work=local_steps(5, 8), local_rate=0.1, population=100, epsilon=0.01)
      >>> algorithm.init(0.5).clients["control_variates"].shape
      (100,)
    """
    return method_by_name(name)(loss_fn, work=work, local_rate=local_rate, **settings)


def method_options(name: str) -> dict[str, Any]:
    """Names and defaults of what a method, or several joined by '+', can be given by name, α^0 among them.

    Where a method starts from another global rate than 1, G does so too, in bounds relative to it: 'fedadam+G' starts
    from 0.1.

    Example:
      >>> options = method_options("fedadam+fedprox+G")
      >>> options["proximal_weight"], options["global_rate"], options["global_bounds"]
      (0.1, 0.1, 'relative')
    """
    method = all_together(METHODS[part] for part in parse_method(name))
    lines = [part.line for part in method.parts]
    options: dict[str, Any] = {}
    if not any(line.own_global_rate for line in lines):
        options["global_rate"] = usual_global_rate(method.parts)
    for line in lines:
        for option, default in line.defaults.items():
            if option != "population":  # a run knows it anyway
                options.setdefault(option, default)
    if "global_bounds" in options:
        options["global_bounds"] = usual_bounds(usual_global_rate(method.parts))
    return options


def method_table() -> list[dict[str, str]]:
    """The table as text: a row a method.

    Example:
      >>> method_table()[0]["name"], method_table()[0]["options"]
      ('fedavg', 'global_rate=1.0')
    """
    return [
        {
            "name": name,
            "method": method.title,
            "kind": method.kind,
            "equation": method.equation,
            "state": method.state,
            "communication": method.communication,
            "options": ", ".join(f"{option}={value!r}" for option, value in method_options(name).items()) or "–",
            "source": method.source,
            "note": method.note,
        }
        for name, method in METHODS.items()
    ]
