"""Methods against client drift: FedAvg with another local objective, direction or aggregation."""

import optax

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.methods.fedavg import fedavg
from fedhyper_jax.parts import terms as term


def fedprox(loss_fn: LossFunction, *, proximal_weight=0.1, terms=(), **settings) -> FederatedAlgorithm:
    r"""FedProx: clients descend F_m(w) + (μ/2)‖w − w^t‖². Other arguments as `fedavg`.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedprox(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, proximal_weight=0.01)

    Reference:
      See `terms.proximal`.
    """
    return fedavg(loss_fn, terms=(term.proximal(proximal_weight), *terms), **settings)


def scaffold(loss_fn: LossFunction, *, population: int, terms=(), **settings) -> FederatedAlgorithm:
    r"""SCAFFOLD: clients descend g − c_m + c with control variates c_m. Other arguments as `fedavg`.

    The state holds a row of the size of the model for each of the ``population`` clients.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = scaffold(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, population=100)
      >>> algorithm.init(0.5).clients["control_variates"].shape
      (100,)

    Reference:
      See `terms.control_variates`.
    """
    return fedavg(loss_fn, terms=(term.control_variates(population), *terms), **settings)


def fednova(loss_fn: LossFunction, *, terms=(), **settings) -> FederatedAlgorithm:
    r"""FedNova: Δ = τ_eff Σ p_m Δ_m / a_m, an average per unit of local progress. Other arguments as `fedavg`.

    Example:
      >>> import optax
      >>> from fedhyper_jax.data import local_epochs
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> optimizer = optax.sgd(1.0, momentum=0.9)
      >>> algorithm = fednova(loss_fn, work=local_epochs(2, 32), local_rate=0.02, client_optimizer=optimizer)

    Reference:
      See `terms.normalized_averaging`.
    """
    return fedavg(loss_fn, terms=(term.normalized_averaging(), *terms), **settings)


def feddyn(
    loss_fn: LossFunction, *, population: int, dynamic_weight=0.01, weighting="examples", terms=(), **settings
) -> FederatedAlgorithm:
    r"""FedDyn: clients descend F_m(w) + α_m (⟨h_m, w⟩ + ‖w − w^t‖²/2). Other arguments as `fedavg`.

    The cohort's parameters are averaged uniformly. With ``weighting="examples"``, as in the published code, α_m =
    α / (N n_m / Σ n), so that the fixed point minimises the loss over all examples; with "uniform" α_m = α.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = feddyn(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, population=100)

    Reference:
      See `terms.dynamic_regularization`.
    """
    _validate.one_of(("examples", "uniform"), weighting=weighting)
    own = term.dynamic_regularization(population, dynamic_weight, by_examples=weighting == "examples")
    return fedavg(loss_fn, terms=(own, *terms), weighting="uniform", **settings)


def fedcm(loss_fn: LossFunction, *, gradient_weight=0.1, terms=(), **settings) -> FederatedAlgorithm:
    r"""FedCM: clients descend a g + (1 − a) M, M the last round's mean gradient. Other arguments as `fedavg`.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedcm(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `terms.client_momentum`.
    """
    return fedavg(loss_fn, terms=(term.client_momentum(gradient_weight), *terms), **settings)


def mime_lite(
    loss_fn: LossFunction, *, optimizer: optax.GradientTransformation | None = None, terms=(), **settings
) -> FederatedAlgorithm:
    r"""MIME-lite: clients step with the server's optimizer, whose state stands still meanwhile. Others as `fedavg`.

    Args:
      loss_fn: as in `fedavg`.
      optimizer: an optax optimizer with rate 1; ``optax.sgd(1.0, momentum=0.9)`` if None.
      terms: as in `fedavg`.
      **settings: as in `fedavg`.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = mime_lite(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, optimizer=optax.adam(1.0))

    Reference:
      See `terms.frozen_optimizer`.
    """
    return fedavg(loss_fn, terms=(term.frozen_optimizer(optimizer), *terms), **settings)
