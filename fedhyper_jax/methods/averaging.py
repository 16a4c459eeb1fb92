"""Federated averaging: the method that all others change, and the settings that all of them take."""

from fedhyper_jax.methods.pieces import Pieces
from fedhyper_jax.methods.values import method

__all__ = ["fedavg"]


@method(
    title="FedAvg",
    kind="server step",
    equation="w ← w − α Δ",
    source="McMahan et al., AISTATS 2017, arXiv 1602.05629",
)
def fedavg() -> Pieces:
    r"""Federated averaging: clients descend locally, the server moves along their mean update.

    .. math::
      w_m^{k+1} = w_m^k - \beta^t g_m^k, \qquad w^{t+1} = w^t - \alpha^t \sum_m p_m (w^t - w_m^{K_m})

    The other methods are this one with other parts, and take the settings below too: with a server optimizer it is
    FedOpt (α multiplies the optimizer's update, so it stands after the preconditioner), with a term FedProx or
    SCAFFOLD, with a rule for the global rate FedExP. They add up: ``scaffold(population=100) + fedexp()``.

    Args:
      loss_fn: ``(params, batch) -> per-example losses (B,)``, e.g. ``losses.cross_entropy(model)``.
      work: `local_epochs` or `local_steps`.
      local_rate: β > 0, an optax schedule of the *round* (which may be 0 in some), or a rule of
        `fedhyper_jax.parts.rates`.
      global_rate: α > 0, an optax schedule of the round, or a rule; if None where the method starts, mostly from 1.
      population: number of clients, for methods that keep a row for each; others do not mind it.
      client_rule: what moves β between local steps, see `fedhyper_jax.parts.client_rules`; nothing if None.
      terms: what is added to the local objective and the aggregation, see `fedhyper_jax.parts.terms`; in any order.
      server_optimizer: an optax optimizer as it stands, own sign and rate included; ``optax.sgd(1.0)`` if None. Those
        of the literature are in `fedhyper_jax.parts.server_optimizers`.
      client_optimizer: likewise, its state afresh each round; ``optax.sgd(1.0)`` if None, or e.g.
        ``optax.sgd(1.0, momentum=0.9)``. β multiplies its update. Its noise is each client's and round's own.
        Parameters that are not to be trained get ``optax.set_to_zero()`` by ``optax.partition``; `optax.masked` alone
        would pass their gradient on, uphill, and is refused.
      aggregator: how client updates become one, see `fedhyper_jax.parts.aggregators`; their mean if None.
      failure_model: what goes wrong with clients, see `fedhyper_jax.parts.failures`; nothing if None.
      guard: whether a round counts, see `fedhyper_jax.parts.guards`; if None, unless its step is not finite.
      weighting: "examples" (p_m = n_m / Σ n), "uniform", or "weights" of the data set (`data.pack` with ``weigh_by``).
      inner_product: what adaptive rules of the rates are fed, see `federated_algorithm`; "pseudo_gradient" if None.
      evaluate_at: "last" iterate, "mean_of_last_two" or "running_average", see `federated_algorithm`; if None as the
        method has it, mostly "last".
      strategy: 'vectorized', 'sequential', 'chunked(c)', 'sharded(…)' or 'debug'; speed only.
      schedule_rounds: for how many rounds schedules are tabulated.

    Returns:
      With a loss the pair (init, round), and which parameters to evaluate; rates may be traced, they are data in the
      state. Without a loss a `Method`.

    Raises:
      ValueError: rates that are not finite and > 0, unknown names, parts that have no meaning together.

    Example:
      >>> import jax, numpy as np
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
    return Pieces()
