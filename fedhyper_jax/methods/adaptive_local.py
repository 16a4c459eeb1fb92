"""Other adaptive local rates: FedAvg whose clients, or whose server, find the local rate themselves."""

import math

from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.methods.fedavg import fedavg
from fedhyper_jax.parts import client_rules, rates


def delta_sgd(loss_fn: LossFunction, *, local_rate=0.2, scale=2.0, growth=0.1, **settings) -> FederatedAlgorithm:
    r"""Δ-SGD: each client finds its rate from the smoothness it meets. Other arguments as `fedavg`.

    ``local_rate`` is β_0, from which each client starts each round.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = delta_sgd(loss_fn, work=local_steps(5, batch_size=1))

    Reference:
      See `client_rules.delta_sgd_rate`.
    """
    return fedavg(loss_fn, local_rate=local_rate, client_rule=client_rules.delta_sgd_rate(scale, growth), **settings)


def fedsps(loss_fn: LossFunction, *, local_rate=1.0, scale=0.5, lower_bound=0.0, **settings) -> FederatedAlgorithm:
    r"""FedSPS: stochastic Polyak steps, (F − ℓ*) / (c ‖g‖²). Other arguments as `fedavg`.

    ``local_rate`` is the cap γ_b of the steps.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedsps(loss_fn, work=local_steps(5, batch_size=1))

    Reference:
      See `client_rules.polyak`.
    """
    return fedavg(loss_fn, local_rate=local_rate, client_rule=client_rules.polyak(scale, lower_bound), **settings)


def fedsls(loss_fn: LossFunction, *, local_rate=1.0, decrease=0.1, shrink=0.9, **settings) -> FederatedAlgorithm:
    r"""FedSLS: each local step by Armijo's line search on its minibatch. Other arguments as `fedavg`.

    ``local_rate`` is the longest step, from which each search starts.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedsls(loss_fn, work=local_steps(5, batch_size=1))

    Reference:
      See `client_rules.armijo`.
    """
    return fedavg(loss_fn, local_rate=local_rate, client_rule=client_rules.armijo(decrease, shrink), **settings)


def fathom(
    loss_fn: LossFunction, *, local_rate, hyper_rate=0.01, upper=math.inf, smoothing=0.5, **settings
) -> FederatedAlgorithm:
    r"""FATHOM's rule of the local rate: β ← β exp(κ cos(Δ, smoothed Δ)). Other arguments as `fedavg`.

    (FATHOM also adapts epochs and batch size; that is not part of it here.)

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fathom(loss_fn, work=local_steps(5, batch_size=1), local_rate=0.1, upper=0.5)

    Reference:
      See `rates.smoothed_cosine`.
    """
    rule = rates.smoothed_cosine(local_rate, hyper_rate, (0.0, upper), smoothing=smoothing, name="local_rate")
    return fedavg(loss_fn, local_rate=rule, **settings)
