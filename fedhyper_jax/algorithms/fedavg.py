"""FedAvg, with any optax optimizer on either side and any schedule of either rate."""

import optax

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.cohort import Strategy
from fedhyper_jax.data.batches import LocalWork
from fedhyper_jax.rates import SCHEDULE_ROUNDS, scheduled
from fedhyper_jax.server import federated_algorithm


def fedavg(
    loss_fn: LossFunction,
    *,
    work: LocalWork,
    local_rate: optax.ScalarOrSchedule,
    global_rate: optax.ScalarOrSchedule = 1.0,
    server_optimizer: optax.GradientTransformation | None = None,
    client_optimizer: optax.GradientTransformation | None = None,
    weighting: str = "examples",
    strategy: str | Strategy = "vectorized",
    schedule_rounds: int = SCHEDULE_ROUNDS,
) -> FederatedAlgorithm:
    r"""Federated averaging: clients descend locally, the server moves along their mean update.

    .. math::
      w_m^{k+1} = w_m^k - \beta^t g_m^k, \qquad w^{t+1} = w^t - \alpha^t \sum_m p_m (w^t - w_m^{K_m})

    With a server optimizer it is FedOpt (momentum, Adam, Adagrad, Yogi …): α multiplies the optimizer's update, so it
    stands after the preconditioner.

    Args:
      loss_fn: ``(params, batch) -> per-example losses (B,)``, e.g. `losses.cross_entropy(model)`.
      work: `local_epochs` or `local_steps`.
      local_rate: β > 0, or an optax schedule of the *round*.
      global_rate: α > 0, or an optax schedule of the round.
      server_optimizer: an optax optimizer as it stands, own sign and rate included; ``optax.sgd(1.0)`` if None.
        For FedAdam with server rate 0.01: ``optax.adam(0.01)``.
      client_optimizer: likewise, its state afresh each round; ``optax.sgd(1.0)`` if None, or e.g.
        ``optax.sgd(1.0, momentum=0.9)``. β multiplies its update.
      weighting: "examples" (p_m = n_m / Σ n) or "uniform".
      strategy: 'vectorized', 'sequential', 'chunked(c)' or 'debug'.
      schedule_rounds: for how many rounds schedules are tabulated.

    Returns:
      The pair (init, round). Rates may be traced; they are data in the state.

    Raises:
      ValueError: rates that are not finite and > 0, unknown names.

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
      <https://arxiv.org/abs/1602.05629>`_, AISTATS 2017; Reddi et al., `Adaptive Federated Optimization
      <https://arxiv.org/abs/2003.00295>`_, ICLR 2021.
    """
    return federated_algorithm(
        loss_fn,
        work=work,
        global_rate=scheduled(global_rate, rounds=schedule_rounds, name="global_rate"),
        local_rate=scheduled(local_rate, rounds=schedule_rounds, name="local_rate"),
        server_optimizer=server_optimizer,
        client_optimizer=client_optimizer,
        weighting=weighting,
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
