"""What each method gives to `federated_algorithm`: functions from a method's options to parts.

Their keyword arguments are the options, with their defaults; ``local_rate``, ``population``, ``schedule_rounds`` and
``weighting`` are given to whoever asks for them. ``global_rate`` is the constant rate, or where a rule of it starts.
"""

from typing import Any

import optax

from fedhyper_jax import _validate
from fedhyper_jax.methods.fedavg import exponential_decay
from fedhyper_jax.methods.reference import reference_parts
from fedhyper_jax.parts import client_rules, rates, server_optimizers, terms

Parts = dict[str, Any]
"""Arguments of `federated_algorithm`; ``"terms"`` of several methods are joined, any other may come from one only."""


def scheduler(scheduler: str):
    """A single scheduler's options; several are built together, since SL and CL share their bounds."""
    options = {
        "G": lambda *, global_rate=1.0, hyper_rate=1.0, global_bounds="absolute", inner_product="pseudo_gradient": {},
        "SL": lambda *, hyper_rate=1.0, local_bounds="relative", inner_product="pseudo_gradient": {},
        "CL": lambda *, hyper_rate=1.0, local_bounds="relative", global_weight=None, client_rates="restart": {},
    }
    return options[scheduler]


def fedavg(*, global_rate=1.0) -> Parts:
    del global_rate  # the constant rate of whoever sets no rule
    return {}


def optimizer(factory):
    def parts(*, global_rate=0.1, b1=0.9, b2=0.99, adaptivity=1e-3) -> Parts:
        del global_rate
        return {"server_optimizer": factory(b1, b2, adaptivity)}

    return parts


def fedavgm(*, global_rate=1.0, momentum=0.9) -> Parts:
    del global_rate
    _validate.decay(momentum=momentum)
    return {"server_optimizer": server_optimizers.momentum(momentum)}


def fedadagrad(*, global_rate=0.1, adaptivity=1e-3) -> Parts:
    del global_rate
    return {"server_optimizer": server_optimizers.adagrad(adaptivity)}


def server_dog(*, global_rate=1.0, initial_distance=1e-6) -> Parts:
    del global_rate
    return {"server_optimizer": server_optimizers.dog(initial_distance)}


def server_mechanic(*, initial_scale=1e-6) -> Parts:
    # α = 1 as a rule of its own, so that no other rule can scale Mechanic's step.
    return {"server_optimizer": server_optimizers.mechanic(initial_scale), "global_rate": rates.scheduled(1.0)}


def fedexp(*, epsilon=1e-3) -> Parts:
    return {"global_rate": rates.extrapolation(epsilon), "evaluate_at": "mean_of_last_two"}


def decay_global(*, schedule_rounds, global_rate=1.0, decay_factor=0.995) -> Parts:
    _validate.positive(global_rate=global_rate, decay_factor=decay_factor)
    schedule = exponential_decay(global_rate, decay_factor)
    return {"global_rate": rates.scheduled(schedule, rounds=schedule_rounds, name="global_rate")}


def decay_local(*, local_rate, schedule_rounds, decay_factor=0.995) -> Parts:
    _validate.positive(local_rate=local_rate, decay_factor=decay_factor)
    schedule = exponential_decay(local_rate, decay_factor)
    return {"local_rate": rates.scheduled(schedule, rounds=schedule_rounds, name="local_rate")}


def plateau_global(*, global_rate=1.0, plateau_factor=0.1, patience=10, average_rounds=1) -> Parts:
    _validate.fraction(plateau_factor=plateau_factor)
    rule = rates.reduce_on_plateau(
        global_rate, factor=plateau_factor, patience=patience, average_rounds=average_rounds, name="global_rate"
    )
    return {"global_rate": rule}


def plateau_local(*, local_rate, plateau_factor=0.1, patience=10, average_rounds=1) -> Parts:
    _validate.fraction(plateau_factor=plateau_factor)
    rule = rates.reduce_on_plateau(
        local_rate, factor=plateau_factor, patience=patience, average_rounds=average_rounds, name="local_rate"
    )
    return {"local_rate": rule}


def fathom(*, local_rate, cosine_rate=0.01, smoothing=0.5, upper=float("inf")) -> Parts:
    rule = rates.smoothed_cosine(local_rate, cosine_rate, (0.0, upper), smoothing=smoothing, name="local_rate")
    return {"local_rate": rule}


def delta_sgd(*, scale=2.0, growth=0.1) -> Parts:
    return {"client_rule": client_rules.delta_sgd_rate(scale, growth)}


def fedsps(*, polyak_scale=0.5, lower_bound=0.0) -> Parts:
    _validate.positive(polyak_scale=polyak_scale)
    return {"client_rule": client_rules.polyak(polyak_scale, lower_bound)}


def fedsls(*, decrease=0.1, shrink=0.9) -> Parts:
    return {"client_rule": client_rules.armijo(decrease, shrink)}


def fedprox(*, proximal_weight=0.1) -> Parts:
    return {"terms": (terms.proximal(proximal_weight),)}


def scaffold(*, population) -> Parts:
    return {"terms": (terms.control_variates(population),)}


def fednova() -> Parts:
    return {"terms": (terms.normalized_averaging(),)}


def feddyn(*, population, dynamic_weight=0.01, weighting="examples") -> Parts:
    term = terms.dynamic_regularization(population, dynamic_weight, by_examples=weighting == "examples")
    return {"terms": (term,), "weighting": "uniform"}


def fedcm(*, gradient_weight=0.1) -> Parts:
    return {"terms": (terms.client_momentum(gradient_weight),)}


def mime_lite(*, momentum=0.9) -> Parts:
    _validate.decay(momentum=momentum)
    return {"terms": (terms.frozen_optimizer(optax.sgd(1.0, momentum=momentum)),)}


def reference(schedulers: str):
    return lambda: reference_parts(schedulers)
