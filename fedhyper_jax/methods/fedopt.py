"""FedOpt and relatives: FedAvg whose server steps with an optimizer, or along an extrapolation."""

from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.methods.fedavg import fedavg
from fedhyper_jax.parts import rates, server_optimizers


def fedavgm(loss_fn: LossFunction, *, momentum=0.9, **settings) -> FederatedAlgorithm:
    r"""FedAvgM: m ← μ m + Δ, w ← w − α m. Other arguments as `fedavg`; α = 1 by default.

    With μ = 0.9 a steady pseudo-gradient is stepped along with 10 α.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedavgm(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, global_rate=0.3)

    Reference:
      See `server_optimizers.momentum`.
    """
    return fedavg(loss_fn, server_optimizer=server_optimizers.momentum(momentum), **settings)


def fedadagrad(loss_fn: LossFunction, *, global_rate=0.1, adaptivity=1e-3, **settings) -> FederatedAlgorithm:
    r"""FedAdagrad: v ← v + Δ², w ← w − α Δ / (√v + τ). Other arguments as `fedavg`.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedadagrad(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `server_optimizers.adagrad`.
    """
    optimizer = server_optimizers.adagrad(adaptivity)
    return fedavg(loss_fn, global_rate=global_rate, server_optimizer=optimizer, **settings)


def fedadam(
    loss_fn: LossFunction,
    *,
    global_rate=0.1,
    b1=0.9,
    b2=0.99,
    adaptivity=1e-3,
    bias_correction: bool = False,
    **settings,
) -> FederatedAlgorithm:
    r"""FedAdam: Adam's moments of Δ, w ← w − α m / (√v + τ). Other arguments as `fedavg`.

    Without bias correction, as in the paper; with it, as in Flower. (There is a third one in FedExP's code, whose
    corrections are constant in t and whose τ stands inside the root; see ``fedhyper(variant="reference")``.)

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedadam(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, global_rate=0.01)

    Reference:
      See `server_optimizers.adam`.
    """
    optimizer = server_optimizers.adam(b1, b2, adaptivity, bias_correction=bias_correction)
    return fedavg(loss_fn, global_rate=global_rate, server_optimizer=optimizer, **settings)


def fedyogi(
    loss_fn: LossFunction, *, global_rate=0.1, b1=0.9, b2=0.99, adaptivity=1e-3, **settings
) -> FederatedAlgorithm:
    r"""FedYogi: FedAdam with v ← v − (1 − b2) Δ² sign(v − Δ²). Other arguments as `fedavg`.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedyogi(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, global_rate=0.01)

    Reference:
      See `server_optimizers.yogi`.
    """
    optimizer = server_optimizers.yogi(b1, b2, adaptivity)
    return fedavg(loss_fn, global_rate=global_rate, server_optimizer=optimizer, **settings)


def server_dog(loss_fn: LossFunction, *, initial_distance=1e-6, **settings) -> FederatedAlgorithm:
    """FedAvg with a DoG server: no global rate to set. Other arguments as `fedavg`; α multiplies its step.

    The first steps are tiny on purpose: r̄ starts at 1e-6 (1 + ‖w^0‖) and may grow tenfold a round.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = server_dog(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `server_optimizers.dog`.
    """
    return fedavg(loss_fn, server_optimizer=server_optimizers.dog(initial_distance), **settings)


def server_mechanic(loss_fn: LossFunction, *, initial_scale=1e-6, weight_decay=1e-2, **settings) -> FederatedAlgorithm:
    """FedAvg with a Mechanic server: no global rate to set, α is 1. Other arguments as `fedavg`.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = server_mechanic(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `server_optimizers.mechanic`.
    """
    if settings.get("global_rate", 1.0) != 1.0:
        raise ValueError(
            "Mechanic finds the sum of its own updates in the parameters, so nothing else may scale its step; "
            f"leave global_rate out, got {settings['global_rate']!r}"
        )
    optimizer = server_optimizers.mechanic(initial_scale, weight_decay=weight_decay)
    return fedavg(loss_fn, server_optimizer=optimizer, **settings)


def fedexp(loss_fn: LossFunction, *, epsilon=1e-3, **settings) -> FederatedAlgorithm:
    r"""FedExP: α^t = max(1, Σ p_m ‖Δ_m‖² / (2 (‖Δ‖² + ε))), evaluated at the mean of the last two iterates.

    Other arguments as `fedavg`, but for ``global_rate``, which is its own.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedexp(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `rates.extrapolation`.
    """
    if "global_rate" in settings:
        raise ValueError("fedexp computes its global rate from the updates; leave global_rate out")
    return fedavg(loss_fn, **{"evaluate_at": "mean_of_last_two", **settings}, global_rate=rates.extrapolation(epsilon))


def plateau_global(
    loss_fn: LossFunction, *, global_rate=1.0, factor=0.1, patience=10, average_rounds=1, **settings
) -> FederatedAlgorithm:
    """FedAvg whose global rate is reduced when the clients' training loss stops falling. Other arguments as `fedavg`.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = plateau_global(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, factor=0.5)

    Reference:
      See `rates.reduce_on_plateau`.
    """
    rule = rates.reduce_on_plateau(
        global_rate, factor=factor, patience=patience, average_rounds=average_rounds, name="global_rate"
    )
    return fedavg(loss_fn, global_rate=rule, **settings)


def plateau_local(
    loss_fn: LossFunction, *, local_rate, factor=0.1, patience=10, average_rounds=1, **settings
) -> FederatedAlgorithm:
    """FedAvg whose local rate is reduced when the clients' training loss stops falling. Other arguments as `fedavg`.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = plateau_local(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, patience=5)

    Reference:
      See `rates.reduce_on_plateau`.
    """
    rule = rates.reduce_on_plateau(
        local_rate, factor=factor, patience=patience, average_rounds=average_rounds, name="local_rate"
    )
    return fedavg(loss_fn, local_rate=rule, **settings)
