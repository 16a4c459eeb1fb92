"""FedAvg, with any optax optimizer on either side, and any rule of either rate; everything else is made of it."""

from collections.abc import Sequence

import optax

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.data import LocalWork
from fedhyper_jax.engine import Strategy, federated_algorithm
from fedhyper_jax.parts import Aggregator, ClientRule, FailureModel, Guard, LocalTerm, RateRule, rates


def fedavg(
    loss_fn: LossFunction,
    *,
    work: LocalWork,
    local_rate: optax.ScalarOrSchedule | RateRule,
    global_rate: optax.ScalarOrSchedule | RateRule = 1.0,
    client_rule: ClientRule | None = None,
    terms: Sequence[LocalTerm] = (),
    server_optimizer: optax.GradientTransformation | None = None,
    client_optimizer: optax.GradientTransformation | None = None,
    weighting: str = "examples",
    inner_product: str = "pseudo_gradient",
    evaluate_at: str = "last",
    aggregator: Aggregator | None = None,
    failure_model: FailureModel | None = None,
    guard: Guard | None = None,
    strategy: str | Strategy = "vectorized",
    schedule_rounds: int = rates.SCHEDULE_ROUNDS,
) -> FederatedAlgorithm:
    r"""Federated averaging: clients descend locally, the server moves along their mean update.

    .. math::
      w_m^{k+1} = w_m^k - \beta^t g_m^k, \qquad w^{t+1} = w^t - \alpha^t \sum_m p_m (w^t - w_m^{K_m})

    The other algorithms are this one with other parts, and take its other arguments: with a server optimizer it is
    FedOpt (α multiplies the optimizer's update, so it stands after the preconditioner), with a term FedProx or
    SCAFFOLD, with a rule for the global rate FedExP; so they compose: ``scaffold(…, global_rate=extrapolation())``.

    Args:
      loss_fn: ``(params, batch) -> per-example losses (B,)``, e.g. `losses.cross_entropy(model)`.
      work: `local_epochs` or `local_steps`.
      local_rate: β > 0, an optax schedule of the *round*, or a rule of `fedhyper_jax.parts.rates`.
      global_rate: α > 0, an optax schedule of the round, or a rule.
      client_rule: what moves β between local steps, see `fedhyper_jax.parts.client_rules`; nothing if None.
      terms: what is added to the local objective and the aggregation, see `fedhyper_jax.parts.terms`; in any order.
      server_optimizer: an optax optimizer as it stands, own sign and rate included; ``optax.sgd(1.0)`` if None. Those
        of the literature are in `fedhyper_jax.parts.server_optimizers`.
      client_optimizer: likewise, its state afresh each round; ``optax.sgd(1.0)`` if None, or e.g.
        ``optax.sgd(1.0, momentum=0.9)``. β multiplies its update.
      weighting: "examples" (p_m = n_m / Σ n) or "uniform".
      inner_product: what adaptive rules of the rates are fed, see `federated_algorithm`.
      evaluate_at: "last" iterate or "mean_of_last_two".
      strategy: 'vectorized', 'sequential', 'chunked(c)' or 'debug'.
      schedule_rounds: for how many rounds schedules are tabulated.

    Returns:
      The pair (init, round), and which parameters to evaluate. Rates may be traced; they are data in the state.

    Raises:
      ValueError: rates that are not finite and > 0, unknown names, parts that have no meaning together.

    Example:
      >>> import jax, numpy as np, optax
      >>> from fedhyper_jax.data import Cohort, local_epochs, pack
      >>> data = pack({"x": np.array([[1.0], [3.0]])}, [np.array([0]), np.array([1])])
      >>> def loss_fn(w, batch): return 0.5 * ((w - batch["x"]) ** 2).sum(axis=1)
      >>> algorithm = fedavg(loss_fn, work=local_epochs(1, batch_size=1), local_rate=0.5)
      >>> state = algorithm.init(jax.numpy.zeros(1))
      >>> state, info = jax.jit(algorithm.round)(jax.random.key(0), state, Cohort(data=data, client_ids=np.arange(2)))
      >>> state.params.tolist()  # each client goes half the way: (0.5 + 1.5) / 2
      [1.0]

    Reference:
      McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
      <https://arxiv.org/abs/1602.05629>`_, AISTATS 2017.
    """
    return federated_algorithm(
        loss_fn,
        work=work,
        global_rate=rates.as_rate_rule(global_rate, rounds=schedule_rounds, name="global_rate"),
        local_rate=rates.as_rate_rule(local_rate, rounds=schedule_rounds, name="local_rate"),
        client_rule=client_rule,
        terms=terms,
        server_optimizer=server_optimizer,
        client_optimizer=client_optimizer,
        weighting=weighting,
        inner_product=inner_product,
        evaluate_at=evaluate_at,
        aggregator=aggregator,
        failure_model=failure_model,
        guard=guard,
        strategy=strategy,
    )


def exponential_decay(rate, factor=0.995) -> optax.Schedule:
    """The schedule rate · factor^round; rate and factor may be traced.

    Example:
      >>> round(float(exponential_decay(0.1)(2)), 6)  # 0.1 · 0.995²
      0.099003
    """
    _validate.positive(rate=rate, factor=factor)
    return lambda count: rate * factor**count


def decay_global(loss_fn: LossFunction, *, global_rate=1.0, factor=0.995, **settings) -> FederatedAlgorithm:
    """Decay-G: FedAvg with α^t = α · factor^t. Other arguments as `fedavg`."""
    return fedavg(loss_fn, global_rate=exponential_decay(global_rate, factor), **settings)


def decay_local(loss_fn: LossFunction, *, local_rate, factor=0.995, **settings) -> FederatedAlgorithm:
    """Decay-SL: FedAvg with β^t = β · factor^t. Other arguments as `fedavg`.

    (In the authors' public code this decay is without effect: local rates are rebuilt from the initial value at the
    top of each round. Here it acts.)
    """
    return fedavg(loss_fn, local_rate=exponential_decay(local_rate, factor), **settings)
