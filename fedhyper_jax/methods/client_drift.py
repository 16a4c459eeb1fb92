"""Methods against client drift: another local objective, direction or aggregation."""

import optax

from fedhyper_jax import _validate
from fedhyper_jax.base import Scalar
from fedhyper_jax.methods.pieces import Pieces, Start
from fedhyper_jax.methods.values import method
from fedhyper_jax.parts import terms

__all__ = ["fedcm", "feddyn", "fednova", "fedprox", "mime_lite", "scaffold"]


@method(
    title="FedProx",
    kind="client drift",
    equation="g ← g + μ (w − w^t)",
    source="Li et al., MLSys 2020, arXiv 1812.06127",
    note="μ is tuned in the literature; there is no published default",
)
def fedprox(*, proximal_weight: Scalar = 0.1) -> Pieces:
    r"""FedProx: clients descend F_m(w) + (μ/2)‖w − w^t‖². Settings as of `fedavg`.

    Args:
      proximal_weight: μ ≥ 0.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedprox(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, proximal_weight=0.01)

    Reference:
      See `terms.proximal`.
    """
    return Pieces(terms=(terms.proximal(proximal_weight),))


@method(
    title="SCAFFOLD",
    kind="client drift",
    equation="g ← g − c_m + c, c_m⁺ = c_m − c + Δ_m / Σ_k β_m^k, c ← c + Σ_S q_m (c_m⁺ − c_m)",
    state="c and N rows c_m, (N+1) d numbers",
    communication="c_m⁺ − c_m up, c down",
    source="Karimireddy et al., ICML 2020, arXiv 1910.06378, option II",
    note="q_m is the client's weight in the objective: 1/N with weighting='uniform', as printed; n_m / Σ n with "
    "'examples', without which it would converge to the uniform optimum",
)
def scaffold(*, population: int | None = None) -> Pieces:
    r"""SCAFFOLD: clients descend g − c_m + c with control variates c_m. Settings as of `fedavg`.

    Args:
      population: number of clients; the state holds a row of the size of the model for each.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = scaffold(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, population=100)
      >>> algorithm.init(0.5).clients["control_variates"].shape
      (100,)

    Reference:
      See `terms.control_variates`.
    """

    def own_terms(start: Start):
        return (terms.control_variates(start.rows(population, "scaffold keeps a row for each client")),)

    return Pieces(terms=own_terms)


@method(
    title="FedNova",
    kind="client drift",
    equation="Δ = τ_eff Σ p_m Δ_m / a_m, a_m the total weight of the client's gradients, τ_eff = Σ p_m a_m",
    communication="a_m and Σ_k β_m^k up",
    source="Wang et al., NeurIPS 2020, arXiv 2007.07481",
    note="for any linear client optimizer; beside fedprox τ_eff is Σ p_m Σ_k β_m^k",
)
def fednova() -> Pieces:
    r"""FedNova: Δ = τ_eff Σ p_m Δ_m / a_m, an average per unit of local progress. Settings as of `fedavg`.

    Example:
      >>> import optax
      >>> from fedhyper_jax.data import local_epochs
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> optimizer = optax.sgd(1.0, momentum=0.9)
      >>> algorithm = fednova(loss_fn, work=local_epochs(2, 32), local_rate=0.02, client_optimizer=optimizer)

    Reference:
      See `terms.normalized_averaging`.
    """
    return Pieces(terms=(terms.normalized_averaging(),))


@method(
    title="FedDyn",
    kind="client drift",
    equation="g ← g + α_m (w − w^t + h_m), h_m ← h_m − Δ_m, Δ = mean_S Δ_m − mean_N h_m",
    state="mean h and N rows h_m, (N+1) d numbers",
    source="Acar et al., ICLR 2021, arXiv 2111.04263",
    note="α_m = α / (N n_m / Σ n) with weighting='examples', as in its code; evaluated at w, where the code "
    "evaluates averages of client models",
)
def feddyn(*, population: int | None = None, dynamic_weight: Scalar = 0.01) -> Pieces:
    r"""FedDyn: clients descend F_m(w) + α_m (⟨h_m, w⟩ + ‖w − w^t‖²/2). Settings as of `fedavg`.

    The cohort's parameters are averaged uniformly. With ``weighting="examples"``, as in the published code, α_m =
    α / (N n_m / Σ n), so that the fixed point minimises the loss over all examples; with "uniform" α_m = α.

    Args:
      population: number of clients; the state holds a row of the size of the model for each.
      dynamic_weight: α of the paper, > 0.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = feddyn(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, population=100)

    Reference:
      See `terms.dynamic_regularization`.
    """

    def own_terms(start: Start):
        _validate.one_of(("examples", "uniform"), weighting=start.weighting)
        rows = start.rows(population, "feddyn keeps a row for each client")
        return (terms.dynamic_regularization(rows, dynamic_weight, by_examples=start.weighting == "examples"),)

    return Pieces(terms=own_terms, weighting="uniform")


@method(
    title="FedCM",
    kind="client drift",
    equation="g ← a g + (1−a) M, M = Σ p_m Δ_m / Σ_k β_m^k of the last round",
    state="M, d numbers",
    communication="Σ_k β_m^k up, M down",
    source="Xu et al., 2021, arXiv 2106.10874",
)
def fedcm(*, gradient_weight: Scalar = 0.1) -> Pieces:
    r"""FedCM: clients descend a g + (1 − a) M, M the last round's mean gradient. Settings as of `fedavg`.

    Args:
      gradient_weight: a, in (0, 1].

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = fedcm(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)

    Reference:
      See `terms.client_momentum`.
    """
    return Pieces(terms=(terms.client_momentum(gradient_weight),))


@method(
    title="MIME-lite",
    kind="client drift",
    equation="w ← w − β (g + μ s) with s frozen, then s ← Σ p_m ∇F_m(w^t) + μ s",
    state="s, d numbers",
    communication="∇F_m(w^t) up, s down",
    source="Karimireddy et al., 2020, arXiv 2008.03606",
    note="momentum as a decayed sum, as in FedJAX and TFF (an average is a tenth of it at μ = 0.9)",
)
def mime_lite(*, momentum: Scalar = 0.9) -> Pieces:
    r"""MIME-lite: clients step with the server's momentum, whose state stands still meanwhile. Settings as of `fedavg`.

    Another optimizer is another term: ``fedavg(loss_fn, terms=[terms.frozen_optimizer(optax.adam(1.0))], …)``.

    Args:
      momentum: μ in [0, 1).

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = mime_lite(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1, momentum=0.5)

    Reference:
      See `terms.frozen_optimizer`.
    """
    _validate.decay(momentum=momentum)
    return Pieces(terms=(terms.frozen_optimizer(optax.sgd(1.0, momentum=momentum)),))
