"""Terms that change how steps are taken or averaged: FedNova, MIME-lite."""

import jax
import jax.numpy as jnp
import optax

from fedhyper_jax import _random, _tree
from fedhyper_jax.parts import probes
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
from fedhyper_jax.parts.terms._arrays import accumulated, divide, model_bytes, scalar_bytes


def normalized_averaging() -> LocalTerm:
    r"""FedNova: updates are averaged per unit of local progress, so that clients with more steps do not count more.

    .. math::
      \Delta^t = \tau_{\mathrm{eff}} \sum_m p_m \frac{\Delta_m}{a_m}, \qquad
      \tau_{\mathrm{eff}} = \sum_m p_m a_m

    a_m = ‖a‖₁ is the total weight with which the client's gradients enter Δ_m: Σ_k β_m^k for SGD, the published sums
    for momentum and for a proximal term; it is computed by feeding the client's own optimizer gradients of 1, so any
    linear optimizer will do. Beside a proximal term τ_eff is Σ p_m Σ_k β_m^k, as published.

    Reference:
      Wang et al., `Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization
      <https://arxiv.org/abs/2007.07481>`_, NeurIPS 2020.
    """

    def finish(outcome: Outcome, context: TermContext) -> Contribution:
        del context
        step = outcome.rate_sum if outcome.curved else outcome.displacement
        return Contribution(update=divide(outcome.update, outcome.displacement), mean=step)

    def conclude(shared, sums: TermSums):
        effective_steps = sums.mean
        return Conclusion(shared, _tree.scale(sums.pseudo_gradient, effective_steps), scale=effective_steps)

    return LocalTerm(
        name="normalized_averaging",
        finish=finish,
        conclude=conclude,
        traffic=lambda params: Traffic(up=2 * scalar_bytes(params)),  # a_m and Σ_k β_m^k
        needs_displacement="FedNova divides each update by the weight its gradients got, a_m",
        defines_step="FedNova's step is τ_eff times the mean of the normalised updates",
    )


def frozen_optimizer(optimizer: optax.GradientTransformation | None = None) -> LocalTerm:
    r"""MIME-lite: local steps of a server-side optimizer whose state stands still during the round.

    .. math::
      w \leftarrow w + \beta \, U(g, s^t), \qquad s^{t+1} = V\Bigl(\sum_m p_m \nabla F_m(w^t), s^t\Bigr)

    U is the optimizer's update and V its new state; ∇F_m(w^t) is the client's gradient over all its examples.

    Args:
      optimizer: an optax optimizer with rate 1; ``optax.sgd(1.0, momentum=0.9)`` if None. That is momentum as a decayed
        sum, as in FedJAX and TFF; as an average it is ``optax.sgd(0.1, momentum=0.9)``.

    Reference:
      Karimireddy et al., `Mime: Mimicking Centralized Stochastic Algorithms in Federated Learning
      <https://arxiv.org/abs/2008.03606>`_, 2020 (MimeLite).
    """
    optimizer = optax.sgd(1.0, momentum=0.9) if optimizer is None else optimizer

    def shared(params):
        state = optimizer.init(params)
        if _random.has_keys(state):
            raise ValueError(
                "terms.frozen_optimizer stands still during a round, so that the noise of its optimizer would be the "
                "same in every step of every client; add noise by client_optimizer or server_optimizer"
            )
        leaf = probes.climbing_leaf(optax.with_extra_args_support(optimizer), params)
        if leaf is not None:
            raise ValueError(f"terms.frozen_optimizer's optimizer {probes.climbs(leaf)}")
        return state

    def direction(gradient, params, context: TermContext):
        updates, _ = optimizer.update(gradient, context.shared, params)
        return jax.tree.map(jnp.negative, updates)

    def finish(outcome: Outcome, context: TermContext) -> Contribution:
        del context
        return Contribution(update=outcome.update, mean=accumulated(outcome.full_gradient()))

    def conclude(shared, sums: TermSums):
        gradient = jax.tree.map(lambda g, w: g.astype(w.dtype), sums.mean, sums.params)
        _, shared = optimizer.update(gradient, shared, sums.params)
        return keep(shared, sums)

    return LocalTerm(
        name="frozen_optimizer",
        shared=shared,
        direction=direction,
        finish=finish,
        conclude=conclude,
        traffic=lambda params: Traffic(
            up=model_bytes(params), down=model_bytes(jax.eval_shape(optimizer.init, params))
        ),
        needs_plain_sgd="MIME-lite's optimizer is the client's: give it to terms.frozen_optimizer(…)",
    )
