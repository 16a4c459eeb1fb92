"""Other steps of the server: FedOpt's optimizers, and optimizers without a rate to set."""

from fedhyper_jax import _validate
from fedhyper_jax.base import Scalar
from fedhyper_jax.methods.pieces import Pieces
from fedhyper_jax.methods.values import method
from fedhyper_jax.parts import rates, server_optimizers

__all__ = ["fedadagrad", "fedadam", "fedadam_corrected", "fedavgm", "fedyogi", "server_dog", "server_mechanic"]

_FEDOPT = "Reddi et al., ICLR 2021, arXiv 2003.00295"


@method(
    title="FedAvgM",
    kind="server step",
    equation="m ← μ m + Δ, w ← w − α m",
    state="m, d numbers",
    source="Hsu, Qi, Brown, 2019, arXiv 1909.06335; μ from Reddi et al.",
)
def fedavgm(*, momentum: Scalar = 0.9) -> Pieces:
    r"""FedAvgM: m ← μ m + Δ, w ← w − α m. Settings as of `fedavg`.

    With μ = 0.9 a steady pseudo-gradient is stepped along with 10 α.

    Args:
      momentum: μ in [0, 1).

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedavgm(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, global_rate=0.3)

    Reference:
      See `server_optimizers.momentum`.
    """
    _validate.decay(momentum=momentum)
    return Pieces(server_optimizer=server_optimizers.momentum(momentum))


@method(
    title="FedAdagrad",
    kind="server step",
    equation="v ← v + Δ², w ← w − α Δ / (√v + τ), v before round 0 is 0",
    state="v, d numbers",
    source=_FEDOPT,
    global_rate=0.1,
)
def fedadagrad(*, adaptivity: Scalar = 1e-3) -> Pieces:
    r"""FedAdagrad: v ← v + Δ², w ← w − α Δ / (√v + τ). Settings as of `fedavg`; α = 0.1 by default.

    Args:
      adaptivity: τ > 0.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedadagrad(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `server_optimizers.adagrad`.
    """
    return Pieces(server_optimizer=server_optimizers.adagrad(adaptivity))


@method(
    title="FedAdam",
    kind="server step",
    equation="m ← b1 m + (1−b1) Δ, v ← b2 v + (1−b2) Δ², w ← w − α m / (√v + τ)",
    state="m and v, 2 d numbers",
    source=_FEDOPT,
    note="no bias correction, as in the paper; v before round 0 is 0, as in Google's runs",
    global_rate=0.1,
)
def fedadam(*, b1: Scalar = 0.9, b2: Scalar = 0.99, adaptivity: Scalar = 1e-3) -> Pieces:
    r"""FedAdam: Adam's moments of Δ, w ← w − α m / (√v + τ). Settings as of `fedavg`; α = 0.1 by default.

    Without bias correction, as in the paper; with it, as in Flower, it is `fedadam_corrected`. (There is a third one in
    FedExP's code, whose corrections are constant in t and whose τ stands inside the root; see `reference_FedAdam`.)

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      adaptivity: τ > 0.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedadam(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, global_rate=0.01)

    Reference:
      See `server_optimizers.adam`.
    """
    return Pieces(server_optimizer=server_optimizers.adam(b1, b2, adaptivity))


@method(
    title="FedAdam with bias correction",
    kind="server step",
    equation="as FedAdam, the step multiplied by √(1−b2^{t+1}) / (1−b1^{t+1})",
    state="m and v, 2 d numbers",
    source=f"{_FEDOPT}; correction of Kingma & Ba, as Flower has it (whose exponent is one larger)",
    global_rate=0.1,
)
def fedadam_corrected(*, b1: Scalar = 0.9, b2: Scalar = 0.99, adaptivity: Scalar = 1e-3) -> Pieces:
    r"""FedAdam with Adam's bias correction, √(1−b2^{t+1}) / (1−b1^{t+1}). Options and settings as of `fedadam`.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedadam_corrected(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `server_optimizers.adam`.
    """
    return Pieces(server_optimizer=server_optimizers.adam(b1, b2, adaptivity, bias_correction=True))


@method(
    title="FedYogi",
    kind="server step",
    equation="as FedAdam with v ← v − (1−b2) Δ² sign(v − Δ²)",
    state="m and v, 2 d numbers",
    source=_FEDOPT,
    global_rate=0.1,
)
def fedyogi(*, b1: Scalar = 0.9, b2: Scalar = 0.99, adaptivity: Scalar = 1e-3) -> Pieces:
    r"""FedYogi: FedAdam with v ← v − (1 − b2) Δ² sign(v − Δ²). Options and settings as of `fedadam`.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedyogi(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, global_rate=0.01)

    Reference:
      See `server_optimizers.yogi`.
    """
    return Pieces(server_optimizer=server_optimizers.yogi(b1, b2, adaptivity))


@method(
    title="DoG on the server",
    kind="server step",
    equation="r̄ ← max(r̄, ‖w^t − w^0‖), G ← G + ‖Δ‖², w ← w − α (r̄ / √G) Δ",
    state="w^0, d numbers",
    source="Ivgi, Hinder, Carmon, ICML 2023, arXiv 2302.12022; optax.contrib.dog",
    note="the authors average iterates, which is left to the user",
)
def server_dog(*, initial_distance: Scalar = 1e-6) -> Pieces:
    """FedAvg with a DoG server: no global rate to set. Settings as of `fedavg`; α multiplies its step.

    The first steps are tiny on purpose: r̄ starts at 1e-6 (1 + ‖w^0‖) and may grow tenfold a round.

    Args:
      initial_distance: r̄ before round 0 is this times 1 + ‖w^0‖.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = server_dog(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `server_optimizers.dog`.
    """
    return Pieces(server_optimizer=server_optimizers.dog(initial_distance))


@method(
    title="Mechanic on the server",
    kind="server step",
    equation="w ← w^0 − s^t Σ Δ, the scale s^t learned by coin betting on ⟨Δ, Σ Δ⟩",
    state="w^0, d numbers",
    source="Cutkosky, Defazio, Mehta, NeurIPS 2023, arXiv 2306.00144; optax.contrib.mechanize",
    own_global_rate="Mechanic finds the sum of its own updates in the parameters, so nothing else may scale its step",
)
def server_mechanic(*, initial_scale: Scalar = 1e-6, weight_decay: Scalar = 1e-2) -> Pieces:
    """FedAvg with a Mechanic server: no global rate to set, α is 1. Settings as of `fedavg`, but for ``global_rate``.

    Args:
      initial_scale: s before round 0.
      weight_decay: Mechanic's own, which steadies the scale.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = server_mechanic(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `server_optimizers.mechanic`.
    """
    optimizer = server_optimizers.mechanic(initial_scale, weight_decay=weight_decay)
    # α = 1 as a rule of its own, so that no other rule can scale Mechanic's step.
    return Pieces(server_optimizer=optimizer, global_rate=lambda start: rates.scheduled(1.0))
