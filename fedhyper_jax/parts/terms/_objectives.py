"""Terms that change the clients' local objective: FedProx, SCAFFOLD, FedDyn, FedCM."""

import jax
import jax.numpy as jnp
import optax

from fedhyper_jax import _tree, _validate
from fedhyper_jax.base import Scalar
from fedhyper_jax.parts.contract import (
    Conclusion,
    Contribution,
    LocalTerm,
    Outcome,
    TermContext,
    TermSums,
    Traffic,
    keep,
)
from fedhyper_jax.parts.terms._arrays import accumulated, divide, model_bytes, scalar, scalar_bytes, squared_distance


def proximal(weight: Scalar = 0.1) -> LocalTerm:
    r"""FedProx: the local objective F_m(w) + (μ/2)‖w − w^t‖².

    Args:
      weight: μ ≥ 0; the literature tunes it over 0.001 … 1.

    Example:
      >>> proximal(0.1).name
      'proximal'

    Reference:
      Li et al., `Federated Optimization in Heterogeneous Networks <https://arxiv.org/abs/1812.06127>`_, MLSys 2020.
    """
    _validate.non_negative(proximal_weight=weight)

    def objective(value, params, context: TermContext):
        return value + context.shared / 2 * squared_distance(params, context.global_params)

    return LocalTerm(
        name="proximal",
        shared=lambda params: scalar(weight, params),
        objective=objective,
        curvature=lambda context: context.shared,
    )


def control_variates(population: int) -> LocalTerm:
    r"""SCAFFOLD: gradients g − c_m + c, with a control variate per client (option II).

    .. math::
      c_m^+ = c_m - c + \frac{\Delta_m}{a_m}, \qquad c \leftarrow c + \sum_{m \in S} q_m (c_m^+ - c_m)

    so c = Σ q_m c_m over all clients, with q_m the client's weight in the objective: 1/N with uniform weights, as
    printed, n_m / Σ n with weights by examples (with 1/N the fixed point would be the uniform optimum all the same).
    a_m is Σ_k β_m^k (K β for a constant rate); for momentum clients it is the total weight that their gradients get, so
    that Δ_m / a_m remains a mean of gradients.

    Args:
      population: N, the number of clients; each gets a row of the size of the model.

    Reference:
      Karimireddy et al., `SCAFFOLD: Stochastic Controlled Averaging for Federated Learning
      <https://arxiv.org/abs/1910.06378>`_, ICML 2020.
    """
    _validate.positive_integer(population=population)

    def objective(value, params, context: TermContext):
        correction = jax.tree.map(jnp.subtract, context.shared, context.row)
        return value + _tree.inner_product(correction, params)

    def finish(outcome: Outcome, context: TermContext) -> Contribution:
        mean_gradient = divide(outcome.update, outcome.displacement)

        def new_row(row, shared, gradient):
            return jnp.where(outcome.displacement > 0, row - shared + gradient, row).astype(row.dtype)

        row = jax.tree.map(new_row, context.row, context.shared, mean_gradient)
        change = accumulated(jax.tree.map(jnp.subtract, row, context.row))
        weighted = jax.tree.map(lambda x: context.facts.relative_weight.astype(x.dtype) * x, change)
        return Contribution(update=outcome.update, total=weighted, row=row)

    def conclude(shared, sums: TermSums):
        shared = jax.tree.map(lambda c, total: (c + total / population).astype(c.dtype), shared, sums.total)
        return keep(shared, sums)

    return LocalTerm(
        name="control_variates",
        shared=optax.tree.zeros_like,
        row=optax.tree.zeros_like,
        population=population,
        objective=objective,
        finish=finish,
        conclude=conclude,
        traffic=lambda params: Traffic(up=model_bytes(params), down=model_bytes(params)),
        needs_displacement="SCAFFOLD's control variate is the mean of a client's gradients, Δ_m / a_m",
        unbounded_below=True,
    )


def dynamic_regularization(population: int, weight: Scalar = 0.01, *, by_examples: bool = True) -> LocalTerm:
    r"""FedDyn: the local objective F_m(w) + α⟨h_m, w⟩ + (α/2)‖w − w^t‖², whose minima agree at a fixed point.

    .. math:: h_m \leftarrow h_m - \Delta_m, \qquad w^{t+1} = \frac1{|S|} \sum_{m \in S} w_m + \frac1N \sum_{m=1}^N h_m

    so the pseudo-gradient of the round is mean(Δ_m) − mean(h_m). It belongs to uniform weights.

    Args:
      population: N, the number of clients; each gets a row of the size of the model.
      weight: α > 0.
      by_examples: α_m = α / (N n_m / Σ n), which makes the uniform average minimise the loss over all examples; else
        α_m = α and every client counts the same.

    Reference:
      Acar et al., `Federated Learning Based on Dynamic Regularization <https://arxiv.org/abs/2111.04263>`_, ICLR 2021.
    """
    _validate.positive_integer(population=population)
    _validate.positive(dynamic_weight=weight)

    def own_weight(context: TermContext):
        size = context.facts.relative_size if by_examples else 1.0
        return context.shared["weight"] / jnp.where(size > 0, size, 1)

    def objective(value, params, context: TermContext):
        linear = _tree.inner_product(context.row, params)
        return value + own_weight(context) * (linear + squared_distance(params, context.global_params) / 2)

    def finish(outcome: Outcome, context: TermContext) -> Contribution:
        row = _tree.subtract(context.row, outcome.update)
        return Contribution(update=outcome.update, total=accumulated(outcome.update), row=row)

    def conclude(shared, sums: TermSums):
        mean_row = jax.tree.map(
            lambda h, total: (h - total / population).astype(h.dtype), shared["mean_row"], sums.total
        )
        pseudo_gradient = _tree.subtract(sums.pseudo_gradient, mean_row)
        return Conclusion({**shared, "mean_row": mean_row}, pseudo_gradient)

    return LocalTerm(
        name="dynamic_regularization",
        shared=lambda params: {"weight": scalar(weight, params), "mean_row": optax.tree.zeros_like(params)},
        row=optax.tree.zeros_like,
        population=population,
        objective=objective,
        curvature=own_weight,
        finish=finish,
        conclude=conclude,
        defines_step="FedDyn adds the mean of all clients' h_m to the mean of the cohort's parameters",
        uniform_only="FedDyn averages the cohort's parameters uniformly (its α_m carries the weights)",
        offsets_mean="FedDyn's pseudo-gradient is that mean less the mean of all clients' h_m",
        unbounded_below=True,
    )


def client_momentum(weight: Scalar = 0.1) -> LocalTerm:
    r"""FedCM: local gradients mixed with the last round's mean gradient.

    .. math::
      g \leftarrow a g + (1 - a) M^t, \qquad
      M^{t+1} = \sum_m p_m \frac{\Delta_m^t}{\sum_k \beta_m^k}, \quad M^0 = 0

    (the divisor is a_m for momentum clients, see `control_variates`).

    Args:
      weight: a, in (0, 1]; 1 is FedAvg.

    Reference:
      Xu et al., `FedCM: Federated Learning with Client-level Momentum <https://arxiv.org/abs/2106.10874>`_, 2021.
    """
    _validate.positive(gradient_weight=weight)
    if not _validate.is_traced(weight) and weight > 1:
        raise ValueError(f"gradient_weight must lie in (0, 1], got {weight!r}; FedCM uses 0.1, 1 is FedAvg")

    def objective(value, params, context: TermContext):
        weight, momentum = context.shared["weight"], context.shared["momentum"]
        return weight * value + (1 - weight) * _tree.inner_product(momentum, params)

    def finish(outcome: Outcome, context: TermContext) -> Contribution:
        mean_gradient = divide(outcome.update, outcome.displacement)
        return Contribution(update=outcome.update, mean=(mean_gradient, (outcome.displacement > 0).astype(float)))

    def conclude(shared, sums: TermSums):
        mean_gradient, measured = sums.mean
        # After a round at rate 0, which has met no gradients, it stays as it was.
        momentum = jax.tree.map(
            lambda old, new: jnp.where(measured > 0, new, old).astype(old.dtype), shared["momentum"], mean_gradient
        )
        return keep({**shared, "momentum": momentum}, sums)

    return LocalTerm(
        name="client_momentum",
        shared=lambda params: {"weight": scalar(weight, params), "momentum": optax.tree.zeros_like(params)},
        objective=objective,
        finish=finish,
        conclude=conclude,
        # the server needs Σ_k β_m^k with the update, clients need M
        traffic=lambda params: Traffic(up=scalar_bytes(params), down=model_bytes(params)),
        needs_displacement="FedCM's momentum is the mean of the clients' gradients, Δ_m / a_m",
        mixes_loss=True,
        unbounded_below=True,
    )
