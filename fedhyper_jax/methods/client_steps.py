"""Local rates that clients find themselves, step by step."""

from fedhyper_jax import _validate
from fedhyper_jax.base import Scalar
from fedhyper_jax.methods.pieces import Pieces
from fedhyper_jax.methods.values import method
from fedhyper_jax.parts import client_rules

__all__ = ["delta_sgd", "fedsls", "fedsps", "ngn"]


@method(
    title="Δ-SGD",
    kind="client step",
    equation="β_k = min(γ ‖w_k − w_{k-1}‖ / (2 ‖g_k − g'_{k-1}‖), √(1 + δ θ_{k-1}) β_{k-1}), g' on the same batch",
    source="Kim et al., ICLR 2024, arXiv 2306.11201",
    note="local_rate is β_0, 0.2 in the paper; δ is 0.02 by default in its code; two backward passes a step",
    local_rate=0.2,
)
def delta_sgd(*, scale: Scalar = 2.0, growth: Scalar = 0.1) -> Pieces:
    r"""Δ-SGD: each client finds its rate from the smoothness it meets. Settings as of `fedavg`.

    ``local_rate``, 0.2 by default, is β_0, from which each client starts each round.

    Args:
      scale: γ > 0.
      growth: δ ≥ 0.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = delta_sgd(loss_fn, work=local_steps(5, batch_size=1))

    Reference:
      See `client_rules.delta_sgd_rate`.
    """
    rule = client_rules.delta_sgd_rate(scale, growth)
    return Pieces(client_rule=lambda start: rule)


@method(
    title="FedSPS",
    kind="client step",
    equation="β_k = min((F − ℓ*) / (c ‖g‖²), β)",
    source="Mukherjee, Loizou, Stich, 2023, arXiv 2307.06306",
    note="local_rate is the cap, 1 in the paper",
    local_rate=1.0,
)
def fedsps(*, polyak_scale: Scalar = 0.5, lower_bound: Scalar = 0.0) -> Pieces:
    r"""FedSPS: stochastic Polyak steps, (F − ℓ*) / (c ‖g‖²). Settings as of `fedavg`.

    ``local_rate``, 1 by default, is the cap γ_b of the steps.

    Args:
      polyak_scale: c > 0.
      lower_bound: ℓ*, a lower bound of the minibatch losses; 0 for cross-entropy and squared errors.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedsps(loss_fn, work=local_steps(5, batch_size=1))

    Reference:
      See `client_rules.polyak`.
    """
    _validate.positive(polyak_scale=polyak_scale)
    rule = client_rules.polyak(polyak_scale, lower_bound)
    return Pieces(client_rule=lambda start: rule)


@method(
    title="NGN",
    kind="client step",
    equation="β_k = β / (1 + β ‖g‖² / (2 (F − ℓ*)))",
    source="Orvieto, Xiao, 2024, arXiv 2407.04358 (its step on each client)",
    note="local_rate is its σ, 1 by default; no federated version is published",
    local_rate=1.0,
)
def ngn(*, lower_bound: Scalar = 0.0) -> Pieces:
    r"""NGN on the clients: Gauss-Newton steps of √(F − ℓ*), soft where FedSPS has a cap. Settings as of `fedavg`.

    ``local_rate``, 1 by default, is σ, to which the steps tend where gradients are small beside the loss.

    Args:
      lower_bound: ℓ*, a lower bound of the minibatch losses; 0 for cross-entropy and squared errors.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = ngn(loss_fn, work=local_steps(5, batch_size=1))

    Reference:
      See `client_rules.ngn`.
    """
    rule = client_rules.ngn(lower_bound)
    return Pieces(client_rule=lambda start: rule)


@method(
    title="FedSLS",
    kind="client step",
    equation="largest β_k = s b^j with F(w − β_k g) ≤ F(w) − c β_k ‖g‖²",
    source="'Towards Hyper-parameter-free Federated Learning', 2024, arXiv 2408.17145; constants of the code of "
    "Vaswani et al., NeurIPS 2019",
    note="local_rate is where the first search of a round starts, 1 as published",
    local_rate=1.0,
)
def fedsls(*, decrease: Scalar = 0.1, shrink: Scalar = 0.9) -> Pieces:
    r"""FedSLS: each local step by Armijo's line search on its minibatch. Settings as of `fedavg`.

    ``local_rate``, 1 by default, is where the first search of a round starts.

    Args:
      decrease: c, strictly between 0 and 1.
      shrink: b, strictly between 0 and 1.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedsls(loss_fn, work=local_steps(5, batch_size=1))

    Reference:
      See `client_rules.armijo`.
    """
    rule = client_rules.armijo(decrease, shrink)
    return Pieces(client_rule=lambda start: rule)
