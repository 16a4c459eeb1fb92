"""The table of algorithms: every method and the usual compositions, with values of their options.

A new method is a line in METHOD_LINES or COMPOSITIONS; a new float option is a line in VALUES, or in STATIC with the
reason why another value of it needs another program. Each line is held to all contracts, in
`tests/methods/test_contracts.py`.
"""

import dataclasses
from collections.abc import Callable

import optax

from fedhyper_jax import clipped, fedhyper
from fedhyper_jax.base import FederatedAlgorithm
from fedhyper_jax.data import local_epochs, local_steps
from fedhyper_jax.methods import make_method, method_options
from fedhyper_jax.parts.client_rules import armijo
from tests.helpers import logistic_loss

POPULATION, COHORT, SLOTS, ROUNDS = 8, 4, 6, 4
EPOCHS = local_epochs(2, batch_size=4)
MOMENTUM, AUTHORS_MOMENTUM = optax.sgd(1.0, momentum=0.9), optax.sgd(1.0, momentum=0.5)

VALUES: dict[str, tuple[float, float, float]] = {
    "local_rate": (0.05, 0.03, 0.08),
    "global_rate": (1.0, 0.7, 1.4),
    "hyper_rate": (0.5, 0.2, 1.0),
    "cosine_rate": (0.2, 0.5, 0.1),
    "global_weight": (0.5, 0.1, 2.0),
    "decay_factor": (0.9, 0.7, 0.95),
    "initial_distance": (0.1, 0.2, 0.05),
    "epsilon": (0.01, 0.1, 0.001),
    "smoothing": (0.5, 0.2, 0.8),
    "upper": (0.2, 0.0505, 0.1),
    "scale": (0.3, 0.2, 0.4),
    "growth": (0.1, 0.3, 0.02),
    "polyak_scale": (0.5, 0.7, 0.3),
    "lower_bound": (0.0, 0.1, -0.2),
    "decrease": (0.5, 0.3, 0.7),
    "shrink": (0.7, 0.8, 0.5),
    "proximal_weight": (0.1, 0.5, 1.0),
    "dynamic_weight": (0.1, 0.5, 1.0),
    "gradient_weight": (0.3, 0.6, 0.9),
    "clip_norm": (0.1, 0.05, 0.2),
    "target_share": (0.35, 0.5, 0.3),
    "coherence_power": (0.2, 0.4, 0.1),
    "share_rate": (0.5, 1.0, 0.3),
    "global_hyper_rate": (0.2, 0.4, 0.1),
}
"""Three values of each float option; other values are other data for the same program."""

OPTAX = "a Python number in the update of an optax transform"
STATIC = {
    "b1": "a constant of the server optimizer",
    "b2": "a constant of the server optimizer",
    "adaptivity": "a constant of the server optimizer",
    "momentum": f"{OPTAX} (sgd)",
    "initial_scale": f"{OPTAX} (mechanize)",
    "weight_decay": f"{OPTAX} (mechanize)",
    "plateau_factor": f"{OPTAX} (reduce_on_plateau)",
    "patience": f"{OPTAX} (reduce_on_plateau)",
    "average_rounds": f"{OPTAX} (reduce_on_plateau)",
}
"""Number options whose other values are other programs, as documented, and why."""

CHOICES = {"global_bounds", "local_bounds", "global_gamma", "local_gamma", "inner_product", "client_rates"}
CHOICES |= {"normalise", "update", "max_change", "start", "global_range"}
"""Options that are names; bounds as numbers and their γ are the business of the line 'all of fedhyper', and a bound of
increments that of 'scale-free'.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """An algorithm of the table.

    Attributes:
      build: ``build(strategy=…, population=…, **floats)``.
      floats: three values of each float option, `local_rate` among them.
      rows: keys of `ServerState.clients`.
      not_mixed: why parameters of mixed dtypes do not keep their types, or fail; None where they keep them.
      counts_left_out: why a client that was left out still matters; None where it does not.
    """

    build: Callable[..., FederatedAlgorithm]
    floats: dict[str, tuple[float, float, float]]
    rows: tuple[str, ...] = ()
    not_mixed: str | None = None
    counts_left_out: str | None = None

    def setting(self, index: int) -> dict[str, float]:
        return {name: values[index] for name, values in self.floats.items()}


def loss_fn(params, batch):
    """Softmax regression; the data can make an example's loss infinite, or NaN with its gradient."""
    return logistic_loss(params, batch) * batch["factor"] + batch["offset"]


def line(name, *, floats=None, rows=(), not_mixed=None, counts_left_out=None, work=EPOCHS, **fixed) -> Entry:
    """A method by name; ``floats`` where `VALUES` do not suit it, ``fixed`` for what is no number or static."""
    options = [option for option in method_options(name) if option in VALUES and option not in fixed]
    values = {option: VALUES[option] for option in ("local_rate", *options)}

    def build(*, strategy="vectorized", population=POPULATION, **given):
        if rows:
            given["population"] = population
        return make_method(name, loss_fn, work=work, strategy=strategy, schedule_rounds=ROUNDS + 2, **fixed, **given)

    return Entry(
        build=build, floats=values | (floats or {}), rows=rows, not_mixed=not_mixed, counts_left_out=counts_left_out
    )


_SMALL = {"global_rate": (0.1, 0.07, 0.14)}
_SLOW = {"hyper_rate": (0.01, 0.02, 0.005)}
_SEARCHED = {"local_rate": (4.0, 6.0, 3.0)}
_GIVEN = {"local_rate": (1.5, 1.0, 2.0)}
_POLYAK = {"local_rate": (1.5, 2.0, 1.0)}
MECHANIZE = "optax.contrib.mechanize clips a sum in the tree's widest dtype by bounds in the dtype of the first leaf"
DOG = "optax.contrib.dog scales every leaf by a distance in the tree's widest dtype (the server casts back)"
_COHORT_SIZE = "the authors' rule divides by the size of the cohort, as sent out"

METHOD_LINES = {
    "fedavg": line("fedavg"),
    "G": line("G"),
    "SL": line("SL"),
    "CL": line("CL"),
    "retained_gain": line("retained_gain", start="given", floats=_GIVEN),
    "decay_global": line("decay_global"),
    "decay_local": line("decay_local"),
    "plateau_global": line("plateau_global", patience=1, plateau_factor=0.5),
    "plateau_local": line("plateau_local", patience=1, plateau_factor=0.5),
    "fedexp": line("fedexp"),
    "fathom": line("fathom"),
    "fedavgm": line("fedavgm"),
    "fedadagrad": line("fedadagrad", floats=_SMALL),
    "fedadam": line("fedadam", floats=_SMALL),
    "fedadam_corrected": line("fedadam_corrected", floats=_SMALL),
    "fedyogi": line("fedyogi", floats=_SMALL),
    "server_dog": line("server_dog"),
    "server_mechanic": line("server_mechanic", initial_scale=0.1, not_mixed=MECHANIZE),
    "fedprox": line("fedprox"),
    "scaffold": line("scaffold", rows=("control_variates",)),
    "fednova": line("fednova"),
    "feddyn": line("feddyn", rows=("dynamic_regularization",)),
    "fedcm": line("fedcm"),
    "mime_lite": line("mime_lite"),
    "delta_sgd": line("delta_sgd"),
    "fedsps": line("fedsps", floats=_POLYAK),
    "ngn": line("ngn", floats=_POLYAK),
    "fedsls": line("fedsls", floats=_SEARCHED),
    "median": line("median"),
    "clipped": line("clipped"),
    "reference_G": line("reference_G"),
    "reference_GM": line("reference_GM"),
    "reference_CL": line("reference_CL", counts_left_out=_COHORT_SIZE),
    "reference_FULL": line("reference_FULL", client_optimizer=AUTHORS_MOMENTUM, counts_left_out=_COHORT_SIZE),
    "reference_FedAdam": line("reference_FedAdam"),
    "reference_SL": line("reference_SL"),
}
"""The methods one by one."""


def all_of_fedhyper(*, strategy="vectorized", population=POPULATION, kappa_g, kappa_sl, kappa_cl, **floats):
    del population
    hyper_rate = {"G": kappa_g, "SL": kappa_sl, "CL": kappa_cl}
    return fedhyper(loss_fn, "G+SL+CL", work=EPOCHS, strategy=strategy, hyper_rate=hyper_rate, **floats)


def scale_free(*, strategy="vectorized", population=POPULATION, change_g, change_sl, change_cl, **floats):
    del population
    ways = {"normalise": {"G": "debiased", "SL": "squared_norm", "CL": "cosine"}, "update": "exponential"}
    max_change = {"G": change_g, "SL": change_sl, "CL": change_cl}
    return fedhyper(loss_fn, "G+SL+CL", work=EPOCHS, strategy=strategy, max_change=max_change, **ways, **floats)


def bounds_as_pairs(*, strategy="vectorized", population=POPULATION, lower, upper, local_lower, local_upper, **floats):
    del population
    pairs = {"global_bounds": (lower, upper), "local_bounds": (local_lower, local_upper)}
    return fedhyper(loss_fn, "G+CL", work=EPOCHS, strategy=strategy, hyper_rate=30.0, **pairs, **floats)


def line_search(*, strategy="vectorized", population=POPULATION, local_rate, growth, fallback, clip_norm):
    del population
    rule = armijo(decrease=0.7, shrink=0.5, growth=growth, max_trials=3, fallback=fallback)
    return clipped(
        loss_fn, work=EPOCHS, strategy=strategy, local_rate=local_rate, client_rule=rule, clip_norm=clip_norm
    )


COMPOSITIONS = {
    "G+SL+CL": line("G+SL+CL"),
    "all of fedhyper": Entry(
        build=all_of_fedhyper,
        floats={
            "local_rate": VALUES["local_rate"],
            "global_rate": (1.0, 0.9, 1.1),
            "kappa_g": (20.0, 1.0, 5.0),
            "kappa_sl": (0.2, 0.5, 0.1),
            "kappa_cl": (0.3, 0.1, 0.7),
            "global_weight": VALUES["global_weight"],
            "global_gamma": (1.3, 2.0, 1.5),
            "local_gamma": (10.0, 1.1, 1.2),
        },
    ),
    "scale-free": Entry(
        build=scale_free,
        floats={
            "local_rate": VALUES["local_rate"],
            "hyper_rate": VALUES["hyper_rate"],
            "change_g": (0.1, 0.03, 0.05),
            "change_sl": (0.2, 0.05, 0.1),
            "change_cl": (0.05, 0.02, 0.1),
            "global_weight": VALUES["global_weight"],
        },
    ),
    "bounds as pairs": Entry(
        build=bounds_as_pairs,
        floats={
            "local_rate": VALUES["local_rate"],
            "lower": (0.96, 0.5, 0.7),
            "upper": (1.1, 2.0, 1.5),
            "local_lower": (0.02, 0.01, 0.025),
            "local_upper": (0.1, 0.2, 0.15),
        },
    ),
    "line search that gives up, clipped": Entry(
        build=line_search,
        floats={
            "local_rate": (1.0, 0.7, 1.4),
            "growth": (1.5, 1.2, 1.1),
            "fallback": (0.05, 0.1, 0.02),
            "clip_norm": VALUES["clip_norm"],
        },
    ),
    "fedavg, uniform, equal steps": line("fedavg", work=local_steps(3, batch_size=4), weighting="uniform"),
    "fedprox+G": line("fedprox+G"),
    "scaffold+fedexp": line("scaffold+fedexp", rows=("control_variates",), weighting="uniform"),
    "fedprox+scaffold": line("fedprox+scaffold", rows=("control_variates",)),
    "fednova+G": line("fednova+G", client_optimizer=MOMENTUM),
    "fednova+fedprox": line("fednova+fedprox"),
    "fedprox+fedsps": line("fedprox+fedsps", floats=_POLYAK),
    "feddyn+CL, per client": line(
        "feddyn+CL", floats=_SLOW, client_rates="per_client", rows=("dynamic_regularization", "rate")
    ),
    "fednova+G+delta_sgd": line("fednova+G+delta_sgd"),
    "fathom+fedadam+ngn": line(
        "fathom+fedadam+ngn", floats=_SMALL | {"local_rate": (1.5, 1.4, 1.0), "upper": (2.5, 1.51, 1.6)}
    ),
    "fedcm+fedyogi+CL, warm": line("fedcm+fedyogi+CL", floats=_SMALL | _SLOW, client_rates="warm"),
    "retained_gain+server_dog": line("retained_gain+server_dog", start="given", floats=_GIVEN),
    "plateau_global+clipped+median": line("plateau_global+clipped+median", patience=1, plateau_factor=0.5),
    "scaffold+fedexp+CL, momentum": line(
        "scaffold+fedexp+CL", floats=_SLOW, rows=("control_variates",), client_optimizer=MOMENTUM
    ),
    "fedadam+G": line("fedadam+G", floats=_SMALL, global_bounds="relative"),
    "fedadam+G, applied": line("fedadam+G", floats=_SMALL, global_bounds="relative", inner_product="applied"),
    "fathom+CL": line("fathom+CL"),
    "feddyn+SL": line("feddyn+SL", rows=("dynamic_regularization",), weighting="uniform"),
    "delta_sgd+fedprox": line("delta_sgd+fedprox"),
    "scaffold+SL, momentum": line("scaffold+SL", rows=("control_variates",), client_optimizer=MOMENTUM),
    "fedcm+fedyogi": line("fedcm+fedyogi", floats=_SMALL),
    "mime_lite+G": line("mime_lite+G"),
    "clipped+median": line("clipped+median"),
    "CL, warm": line("CL", client_rates="warm"),
    "CL, per client": line("CL", floats=_SLOW, client_rates="per_client", rows=("rate",)),
}
"""Methods joined, and settings that change what is kept or computed."""

LINES = METHOD_LINES | COMPOSITIONS
