"""Methods as values: they add up, and called with a loss they are algorithms."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, ParamSpec, overload

import numpy as np

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.data import LocalWork
from fedhyper_jax.methods.compose import SETTINGS, Settings, assemble
from fedhyper_jax.methods.pieces import Line, Part, Pieces

Options = ParamSpec("Options")


class Method:
    """One method with its options, or several that act together.

    Methods add up, in any order that their parts allow: ``scaffold(population=100) + fedexp(epsilon=0.01)``. What has
    no meaning together is refused when the algorithm is made, with the reason.

    Example:
      >>> from fedhyper_jax import G, fedprox
      >>> both = fedprox(proximal_weight=0.01) + G()
      >>> both
      fedprox(proximal_weight=0.01) + G()
      >>> both.name, both.options["proximal_weight"]
      ('fedprox+G', 0.01)
    """

    def __init__(self, parts: Iterable[Part]):
        self.parts: tuple[Part, ...] = tuple(parts)
        names = [part.line.name for part in self.parts]
        if len(set(names)) < len(names):
            raise ValueError(f"method {self.name!r} names one twice; name each once")

    @functools.cached_property
    def name(self) -> str:
        """The names, joined by '+'."""
        return "+".join(part.line.name for part in self.parts)

    @property
    def options(self) -> dict[str, Any]:
        """All options, as `method_by_name` takes them: one that methods differ in is a mapping by their names."""
        found: dict[str, dict[str, Any]] = {}
        for part in self.parts:
            for option, value in part.options.items():
                found.setdefault(option, {})[part.line.name] = value
        return {option: _one_or_all(values) for option, values in found.items()}

    def __add__(self, other: "Method") -> "Method":
        """Both together."""
        return Method(self.parts + other.parts) if isinstance(other, Method) else NotImplemented

    @overload
    def __call__(self, loss_fn: None = None, **options: Any) -> "Method": ...

    @overload
    def __call__(self, loss_fn: LossFunction, *, work: LocalWork, **settings: Any) -> FederatedAlgorithm: ...

    def __call__(self, loss_fn=None, **given):
        """The same with other options, or with a loss the algorithm.

        Args:
          loss_fn: ``(params, batch) -> per-example losses (B,)``; None to set options only.
          **given: options of the methods. What several of them take is for all of them, or a mapping by their names,
            e.g. ``hyper_rate={"SL": 0.1}``. With a loss also the settings that all methods take, see `fedavg`: work,
            local_rate, global_rate, terms, optimizers, aggregator, strategy and so on.

        Returns:
          A `Method`, or with a loss the pair (init, round).

        Raises:
          ValueError: unknown options (the known ones are listed) and values that cannot be; with a loss also two rules
            for one thing, and whatever the parts refuse.
          TypeError: settings without a loss, a loss without work or local rate.

        Example:
          >>> from fedhyper_jax import fedprox
          >>> from fedhyper_jax.data import local_steps
          >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
          >>> weak = fedprox(proximal_weight=0.01)
          >>> algorithm = weak(loss_fn, work=local_steps(5, 8), local_rate=0.1)
          >>> the_same = fedprox(loss_fn, proximal_weight=0.01, work=local_steps(5, 8), local_rate=0.1)
        """
        if loss_fn is None:
            return Method(self._with(given))
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function, got {loss_fn!r}; options go by name, e.g. momentum=0.9")
        # The population of a run is no option: methods without a row per client do not mind it.
        taken = {option for part in self.parts for option in part.line.defaults} - {"population"}
        settings = {name: value for name, value in given.items() if name in SETTINGS and name not in taken}
        options = {name: value for name, value in given.items() if name not in settings}
        return assemble(loss_fn, self._with(options, settings), Settings(**settings))

    def _with(self, options: dict[str, Any], settings: Iterable[str] | None = None) -> tuple[Part, ...]:
        """The parts with other options; ``settings`` where some may stand beside them."""
        for option, value in options.items():
            takers = [part.line.name for part in self.parts if option in part.line.defaults]
            if not takers:
                raise self._not_taken(option, settings)
            for taker in value if isinstance(value, Mapping) else ():
                _validate.one_of(takers, **{f"method in {option}": taker})
        return tuple(_with_options(part, options) for part in self.parts)

    def _not_taken(self, option: str, settings: Iterable[str] | None) -> Exception:
        if option in SETTINGS and settings is None:
            return TypeError(f"{option} is no option but a setting; give it with a loss: {self!r}(loss_fn, {option}=…)")
        known = sorted({known for part in self.parts for known in part.line.defaults})
        return ValueError(
            f"method {self.name!r} takes no {option}; {_validate.did_you_mean(option, [*known, *SETTINGS])}"
            f"it takes {', '.join(known) or 'no options'}, and with a loss the settings {', '.join(SETTINGS)}"
        )

    def __repr__(self) -> str:
        return " + ".join(
            f"{part.line.name}({', '.join(f'{option}={value!r}' for option, value in part.given.items())})"
            for part in self.parts
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Method):
            return NotImplemented
        return self.name == other.name and all(
            mine.options.keys() == theirs.options.keys()
            and all(_same(value, theirs.options[option]) for option, value in mine.options.items())
            for mine, theirs in zip(self.parts, other.parts, strict=True)
        )

    def __hash__(self) -> int:
        return hash(self.name)


def _with_options(part: Part, options: dict[str, Any]) -> Part:
    own = {}
    for option, value in options.items():
        if option in part.line.defaults and not isinstance(value, Mapping):
            own[option] = value
        elif option in part.line.defaults and part.line.name in value:
            own[option] = value[part.line.name]
    part = Part(part.line, {**part.given, **own})
    if own:
        part.make()  # refuses what cannot be where it is written, not where it is used
    return part


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    return not _validate.is_traced(one, other) and type(one) is type(other) and bool(np.array_equal(one, other))


def _one_or_all(values: dict[str, Any]) -> Any:
    """The value that all have, or a mapping where they differ."""
    first, *others = values.values()
    return first if all(_same(first, value) for value in others) else values


class NamedMethod(Line, Method, Generic[Options]):
    """A method of the table, with its defaults: a function of its options, and of a loss.

    Example:
      >>> from fedhyper_jax import fedprox
      >>> fedprox.title, fedprox.equation, fedprox.options
      ('FedProx', 'g ← g + μ (w − w^t)', {'proximal_weight': 0.1})
    """

    @property
    def parts(self) -> tuple[Part, ...]:
        """The one method, with no options given."""
        return (Part(self, {}),)

    @overload
    def __call__(self, *args: Options.args, **options: Options.kwargs) -> Method: ...

    @overload
    def __call__(self, loss_fn: LossFunction, *, work: LocalWork, **settings: Any) -> FederatedAlgorithm: ...

    def __call__(self, loss_fn=None, **given):
        """As `Method.__call__`."""
        return Method.__call__(self, loss_fn, **given)

    def __get__(self, instance: Any, owner: type | None = None) -> "NamedMethod":
        """Itself: help() and doctest take descriptors for functions, and so show signature and docstring."""
        return self


def method(**facts: Any) -> Callable[[Callable[Options, Pieces]], NamedMethod[Options]]:
    """Makes a method of a function from its options to `Pieces`; the keyword arguments are fields of `Line`.

    The function's name is the method's name; its keyword-only arguments are the options, with their defaults.

    Example:
      >>> from fedhyper_jax.parts import terms
      >>> @method(title="FedProx", kind="client drift", equation="g ← g + μ (w − w^t)", source="arXiv 1812.06127")
      ... def pulled_back(*, weight=0.1) -> Pieces:
      ...     return Pieces(terms=(terms.proximal(weight),))
      >>> pulled_back(weight=0.5)
      pulled_back(weight=0.5)
    """

    def named(function: Callable[Options, Pieces]) -> NamedMethod[Options]:
        options = inspect.signature(function).parameters
        defaults = {name: parameter.default for name, parameter in options.items()}
        line = NamedMethod(name=function.__name__, pieces=function, defaults=defaults, **facts)
        copied = {name: getattr(function, name) for name in functools.WRAPPER_ASSIGNMENTS if hasattr(function, name)}
        vars(line).update(copied, __wrapped__=function, __signature__=_signature(line, options))
        return line

    return named


def _signature(line: Line, options: Mapping[str, inspect.Parameter]) -> inspect.Signature:
    """The options, then the settings that go with a loss."""
    loss_fn = inspect.Parameter("loss_fn", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    usual = {"global_rate": line.global_rate, "local_rate": line.local_rate}
    settings = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=usual.get(name, field.default))
        for name, field in SETTINGS.items()
        if name not in options and not (name == "global_rate" and line.own_global_rate)
    ]
    # as the settings are shown, by their defaults: the types that a number may have would fill the line
    own = [option.replace(annotation=option.empty) for option in options.values()]
    return inspect.Signature([loss_fn, *own, *settings])


def all_together(methods: Iterable[Method]) -> Method:
    """Their sum."""
    return functools.reduce(operator.add, methods)
