"""FedHyper: global and local rates that descend their hypergradients, alone, together, and beside other methods."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction, Scalar
from fedhyper_jax.data import LocalWork
from fedhyper_jax.hypergradient import AdaptiveRate, local_pipeline, pipeline
from fedhyper_jax.methods.authors_code import VARIANTS
from fedhyper_jax.methods.bounds import Bounds, resolve_bounds
from fedhyper_jax.methods.pieces import Pieces, Start
from fedhyper_jax.methods.values import all_together, method
from fedhyper_jax.parts import RateRule, client_rules, rates

__all__ = ["CL", "SL", "G", "fedhyper"]

_PAPER = "Wang, Wang, Li, ICLR 2024, arXiv 2310.03156"
RATE_STARTS = ("restart", "warm", "per_client")


@method(
    title="FedHyper-G",
    kind="FedHyper",
    equation="α^t = clip(α^{t-1} + κ ⟨Δ^t, Δ^{t-1}⟩)",
    communication="‖Δ_m‖² up with normalise='debiased'",
    source=f"{_PAPER}, eq. 15-16",
    note="inner_product='applied' takes ⟨Δ^t, u^{t-1}⟩ with the direction u that the server's optimizer took; beside a "
    "method that starts from another global rate than 1, bounds are relative to it unless given; with normalise and "
    "update='exponential' the rule is scale-free, α exp(κ h), as SL's and CL's are",
)
def G(
    *,
    hyper_rate: Scalar = 1.0,
    global_bounds: Bounds | None = None,
    global_gamma: Scalar = 3.0,
    inner_product: str = "pseudo_gradient",
    normalise: str | None = None,
    update: str = "additive",
    max_change: Scalar | None = None,
) -> Pieces:
    r"""FedHyper-G: the global rate follows its hypergradient, α^t = clip(α^{t-1} + κ ⟨Δ^t, Δ^{t-1}⟩).

    Args:
      hyper_rate: κ ≥ 0; 1 in the paper, 0 is FedAvg exactly. 0.2 is a good start where a normalised product moves the
        logarithm of the rate.
      global_bounds: of α: 'absolute' (1/γ, γ), 'relative' (α^0/γ, α^0·γ) or a pair of numbers. If None, absolute, but
        relative where another method starts from another rate than 1: ``fedadam() + G()`` starts from 0.1, between
        0.03 and 0.3.
      global_gamma: γ ≥ 1 of named bounds.
      inner_product: "pseudo_gradient" as in the paper, or "applied", ⟨Δ^t, u^{t-1}⟩ with the direction u that the
        server's optimizer took: the true hypergradient of that step.
      normalise: None for the raw product, which scales with the square of the loss; "squared_norm", "cosine" or
        "debiased" for pure numbers, see `rates.hypergradient`.
      update: "additive", α + κ h, as in the paper, or "exponential", α exp(κ h).
      max_change: the most that |κ h| counts, > 0. None: 0.2 of exponential updates, no bound of additive ones.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = G(hyper_rate=0.5)(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)
      >>> [round(float(bound), 4) for bound in algorithm.init(0.5).global_rate[2:4]]
      [0.3333, 3.0]
      >>> scale_free = G(hyper_rate=0.2, normalise="debiased", update="exponential")

    Reference:
      Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024, eq. 15-16.
    """

    def global_rate(start: Start) -> RateRule:
        _validate.positive(global_rate=start.global_rate)
        named = usual_bounds(start.usual_global_rate) if global_bounds is None else global_bounds
        bounds = resolve_bounds(named, start.global_rate, global_gamma, name="global_bounds")
        return rates.hypergradient(start.global_rate, hyper_rate, bounds, **ways, name="global_rate")

    ways = _checked(pipeline, normalise=normalise, update=update, max_change=max_change)
    return Pieces(global_rate=global_rate, inner_product=_unless_usual(inner_product))


def _checked(check, **ways: Any) -> dict[str, Any]:
    """The ways of a product, refused where they are written."""
    check(**ways)
    return ways


def usual_bounds(usual_global_rate: float) -> str:
    """G's bounds where none are given."""
    return "absolute" if usual_global_rate == 1 else "relative"


def _unless_usual(inner_product: str) -> str | None:
    return None if inner_product == "pseudo_gradient" else inner_product


@method(
    title="FedHyper-SL",
    kind="FedHyper",
    equation="β^{t+1} = clip(β^t + κ ⟨Δ^t, Δ^{t-1}⟩)",
    communication="‖Δ_m‖² up with normalise='debiased'",
    source=f"{_PAPER}, eq. 17-18",
)
def SL(
    *,
    hyper_rate: Scalar = 1.0,
    local_bounds: Bounds = "relative",
    local_gamma: Scalar = 10.0,
    inner_product: str = "pseudo_gradient",
    normalise: str | None = None,
    update: str = "additive",
    max_change: Scalar | None = None,
) -> Pieces:
    r"""FedHyper-SL: the server moves the local rate of the next round, β^{t+1} = clip(β^t + κ ⟨Δ^t, Δ^{t-1}⟩).

    The raw product scales with the square of the loss: from local rates that start too large it can diverge, whatever
    the bounds (experiments/fashion_mnist_rates.py measures it). In the same runs this scale-free rule did not:

    .. math:: \beta^{t+1} = \mathrm{clip}\bigl(\beta^t \exp(\mathrm{clip}(\kappa \langle \Delta^t, \Delta^{t-1} \rangle
      / \|\Delta^{t-1}\|^2, \pm 0.2))\bigr), \quad \kappa = 0.2

    Args:
      hyper_rate: κ ≥ 0; 1 in the paper, 0 is FedAvg exactly. 0.2 is a good start where a normalised product moves the
        logarithm of the rate.
      local_bounds: of β: 'relative' (β^0/γ, β^0·γ), 'absolute' (1/γ, γ) or a pair of numbers.
      local_gamma: γ ≥ 1 of named bounds.
      inner_product, normalise, update, max_change: as of `G`; an additive update has its κ in the unit of β.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> algorithm = SL(loss_fn, work=local_steps(1, batch_size=1), local_rate=0.1)
      >>> [round(float(bound), 4) for bound in algorithm.init(0.5).local_rate[2:4]]
      [0.01, 1.0]
      >>> scale_free = SL(hyper_rate=0.2, normalise="squared_norm", update="exponential")

    Reference:
      Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024, eq. 17-18.
    """

    def local_rate(start: Start) -> RateRule:
        return _moved_by_server(start, hyper_rate, local_bounds, local_gamma, **ways)

    ways = _checked(pipeline, normalise=normalise, update=update, max_change=max_change)
    return Pieces(local_rate=local_rate, goes_on_warm=True, inner_product=_unless_usual(inner_product))


def _moved_by_server(start: Start, hyper_rate, local_bounds: Bounds, local_gamma, **ways: Any) -> RateRule:
    _validate.positive(local_rate=start.local_rate)
    bounds = resolve_bounds(local_bounds, start.local_rate, local_gamma, name="local_bounds")
    return rates.hypergradient(start.local_rate, hyper_rate, bounds, warm=start.warm, **ways, name="local_rate")


@method(
    title="FedHyper-CL",
    kind="FedHyper",
    equation="β_m^k = clip(β_m^{k-1} + κ (⟨g_m^k, g_m^{k-1}⟩ + (1/K_m) ⟨g_m^k, Δ^{t-1}⟩))",
    state="N rates with client_rates='per_client'",
    communication="Δ^{t-1} down, unless global_weight is 0",
    source=f"{_PAPER}, eq. 19-20",
    note="client_rates: 'restart', 'warm' or 'per_client'",
)
def CL(
    *,
    hyper_rate: Scalar = 1.0,
    local_bounds: Bounds = "relative",
    local_gamma: Scalar = 10.0,
    global_weight: Scalar | None = None,
    client_rates: str = "restart",
    population: int | None = None,
    normalise: str | None = None,
    update: str = "additive",
    max_change: Scalar | None = None,
) -> Pieces:
    r"""FedHyper-CL: each client moves its rate at every local step, by its own gradients and the last pseudo-gradient.

    .. math::
      \beta_m^{t,k} = \mathrm{clip}\bigl(\beta_m^{t,k-1} + \kappa (\langle g_m^k, g_m^{k-1} \rangle
      + \tfrac{1}{K_m} \langle g_m^k, \Delta^{t-1} \rangle)\bigr), \quad \beta_m^{t,0} = \beta^t

    The products are taken of what the client optimizer is fed. They scale with the square of the loss: from local rates
    that start too large CL can diverge, whatever the bounds.

    Args:
      hyper_rate: κ ≥ 0; 1 in the paper, 0 is FedAvg exactly. Where a normalised product moves the logarithm of the
        rate, 0.2 is a good start for rates that restart each round, 0.2 divided by the number of local steps for those
        that go on ("warm", "per_client").
      local_bounds: of β, from the run's β^0 wherever another rule has moved β: 'relative' (β^0/γ, β^0·γ), 'absolute'
        (1/γ, γ) or a pair of numbers. Beside a schedule of the local rate they must hold all of it.
      local_gamma: γ ≥ 1 of named bounds.
      global_weight: of the global term ⟨g, Δ^{t-1}⟩, ≥ 0; 1/K_m if None. With 0 clients need no Δ^{t-1}.
      client_rates: where a client's rate starts a round: "restart" from the server's β^t, "warm" from the mean
        Σ p_m β_m of the last cohort's final rates (plus SL's increment, if on), or "per_client" from its own last one.
      population: number of clients, for "per_client": one number each in the state.
      normalise: None for the raw products, "cosine" or "squared_norm" for pure numbers, in which Δ^{t-1} counts as a
        gradient as long as the last one, see `scale_by_local_hypergradient`. (A client has no mean to debias.)
      update, max_change: as of `G`, at each local step.

    Example:
      >>> from fedhyper_jax.data import local_steps
      >>> def loss_fn(w, batch): return (w - batch["x"]) ** 2
      >>> own_rates = CL(client_rates="per_client", population=100)
      >>> own_rates(loss_fn, work=local_steps(5, batch_size=1), local_rate=0.1).init(0.5).clients["rate"].shape
      (100,)

    Reference:
      Wang, Wang, Li, `FedHyper <https://arxiv.org/abs/2310.03156>`_, ICLR 2024, eq. 19-20.
    """
    _validate.one_of(RATE_STARTS, client_rates=client_rates)
    if population is not None and client_rates != "per_client":
        raise ValueError(f"population={population!r} belongs to client_rates='per_client'; leave it out")

    def client_rule(start: Start):
        if start.local_rule.by_round and not _validate.is_traced(start.local_rate) and start.local_rate == 0:
            raise ValueError(
                "CL moves each client's rate away from where the schedule of local_rate starts, which is 0; start it "
                "above 0, or leave CL out"
            )
        _validate.positive(local_rate=start.local_rate)
        bounds = resolve_bounds(local_bounds, start.local_rate, local_gamma, name="local_bounds")
        _check_inside(start.local_rule, bounds)
        return client_rules.local_hypergradient(
            start.local_rate, hyper_rate, bounds, global_weight=global_weight, **ways
        )

    def client_rates_of(start: Start) -> int:
        if start.local_rate_owner is not None:
            raise ValueError(
                f"client_rates='per_client' with {start.local_rate_owner}: two rules for one rate; leave "
                f"{start.local_rate_owner} out, or take client_rates='warm' or 'restart'"
            )
        return start.rows(population, "client_rates='per_client' keeps a rate for each client")

    def standing_still(start: Start) -> RateRule:
        return _moved_by_server(start, 0.0, local_bounds, local_gamma)

    warm = client_rates == "warm"
    ways = _checked(local_pipeline, normalise=normalise, update=update, max_change=max_change)
    return Pieces(
        client_rule=client_rule,
        client_rates_of=client_rates_of if client_rates == "per_client" else None,
        warm="client_rates='warm'" if warm else None,
        fallback_local_rate=standing_still if warm else None,
    )


def _check_inside(local_rule: RateRule, bounds: tuple) -> None:
    """CL starts a round from the broadcast rate and clips from the next step on: a rate outside would jump."""
    state = local_rule.init(jnp.zeros(()))
    table = getattr(state, "table", None)
    moves = isinstance(state, AdaptiveRate | rates.DebiasedRate)
    if moves:
        table = jnp.stack([state.lower, state.upper])
    if table is None or _validate.is_traced(table, *bounds):
        return
    values, (lower, upper) = np.asarray(table, np.float32), (np.float32(bound) for bound in bounds)
    outside = np.flatnonzero((values < lower) | (values > upper))
    if len(outside) == 0:
        return
    at = int(outside[0])
    if moves:
        raise ValueError(
            f"the server may move the local rate to {values[at]}, outside CL's local_bounds=({lower}, {upper}); give "
            "both rules the same local_bounds"
        )
    raise ValueError(
        f"the schedule of local_rate gives {values[at]} in round {at}, outside CL's "
        f"local_bounds=({lower}, {upper}); give local_bounds that hold all of it, "
        "or schedule_rounds of the length of the run"
    )


SCHEDULERS = {"G": G, "SL": SL, "CL": CL}


def parse_schedulers(schedulers: str) -> tuple[str, ...]:
    """The schedulers in a name such as 'G+CL'.

    Example:
      >>> parse_schedulers("SL+G")
      ('SL', 'G')
    """
    names = tuple(schedulers.split("+")) if isinstance(schedulers, str) else (schedulers,)
    for name in names:
        _validate.one_of(SCHEDULERS, scheduler=name)
    if len(set(names)) < len(names):
        raise ValueError(
            f"schedulers names one twice, got {schedulers!r}; write each of {', '.join(SCHEDULERS)} at most once"
        )
    return names


def fedhyper(
    loss_fn: LossFunction,
    schedulers: str = "G+CL",
    *,
    work: LocalWork,
    local_rate: optax.ScalarOrSchedule | RateRule,
    global_rate: optax.ScalarOrSchedule | RateRule = 1.0,
    variant: str = "paper",
    hyper_rate: Scalar = 1.0,
    global_bounds: Bounds | None = None,
    local_bounds: Bounds = "relative",
    global_gamma: Scalar = 3.0,
    local_gamma: Scalar = 10.0,
    global_weight: Scalar | None = None,
    inner_product: str = "pseudo_gradient",
    client_rates: str = "restart",
    population: int | None = None,
    normalise: str | None = None,
    update: str = "additive",
    max_change: Scalar | None = None,
    **settings: Any,
) -> FederatedAlgorithm:
    r"""FedHyper with the schedulers G, SL and CL, alone or together, on top of any optimizers: ``G(…) + CL(…)``.

    .. math::
      \text{G:}\quad & \alpha^t = \mathrm{clip}(\alpha^{t-1} + \kappa \langle \Delta^t, \Delta^{t-1} \rangle) \\
      \text{SL:}\quad & \beta^{t+1} = \mathrm{clip}(\beta^t + \kappa \langle \Delta^t, \Delta^{t-1} \rangle) \\
      \text{CL:}\quad & \beta_m^{t,k} = \mathrm{clip}\bigl(\beta_m^{t,k-1} + \kappa (\langle g_m^k, g_m^{k-1} \rangle
      + \tfrac{1}{K_m} \langle g_m^k, \Delta^{t-1} \rangle)\bigr), \quad \beta_m^{t,0} = \beta^t

    Args:
      loss_fn: ``(params, batch) -> per-example losses (B,)``.
      schedulers: any of 'G', 'SL', 'CL' joined by '+', e.g. 'G+SL+CL'.
      work: `local_epochs` or `local_steps`.
      local_rate: β^0 > 0. Without SL also an optax schedule of the round, or a rule of `fedhyper_jax.rates`; CL then
        starts each round from it, and its bounds must hold the whole schedule.
      global_rate: α^0 > 0. Without G also a schedule or a rule (FedExP's `rates.extrapolation`).
      variant: "paper", or "reference" for what the authors' public code computes: its schedulers are 'G', 'GM', 'CL',
        'FULL', 'FedAdam+FedHyper', and 'SL' and 'Decay-SL', which are FedAvg there.
      hyper_rate: κ ≥ 0; 1 in the paper, 0 is FedAvg exactly. A mapping such as ``{"SL": 0.1}`` gives each scheduler
        its own; those left out have 1.
      global_bounds, global_gamma: of α, see `G`.
      local_bounds, local_gamma: of β, shared by SL and CL, see there.
      global_weight: of CL's global term, see `CL`.
      inner_product: of G and SL, see `G`.
      client_rates, population: with CL, where a client's rate starts a round, see `CL`.
      normalise, update, max_change: what is done to the products on their way to the rates, see `G` and `CL`; one for
        all or a mapping, e.g. ``{"G": "debiased", "CL": "cosine"}``.
      **settings: as of `fedavg`: terms, optimizers, aggregator, strategy and so on.

    Returns:
      The pair (init, round). Rates, κ, γ and bounds may be traced; they are data in the state.

    Raises:
      ValueError: unknown schedulers, an initial rate outside its bounds, κ < 0, a schedule or rule for a rate that G or
        SL moves already, ``client_rates`` without CL or, "per_client", with SL.

    Example:
      >>> import jax, numpy as np
      >>> from fedhyper_jax.data import Cohort, local_steps, pack
      >>> data = pack({"x": np.array([[1.0], [3.0]])}, [np.array([0]), np.array([1])])
      >>> def loss_fn(w, batch): return 0.5 * ((w - batch["x"]) ** 2).sum(axis=1)
      >>> algorithm = fedhyper(loss_fn, "G", work=local_steps(1, batch_size=1), local_rate=0.1)
      >>> state, key = algorithm.init(jax.numpy.zeros(1)), jax.random.key(0)
      >>> round_fn = jax.jit(algorithm.round)
      >>> for _ in range(2):
      ...     state, info = round_fn(key, state, Cohort(data=data, client_ids=np.arange(2)))
      >>> round(float(info.global_rate), 4)  # Δ = 0.1 · 2 = 0.2, then 0.1 · 1.8: 1 + 0.18 · 0.2
      1.036

    Reference:
      Wang, Wang, Li, `FedHyper: A Universal and Robust Learning Rate Scheduler for Federated Learning with
      Hypergradient Descent <https://arxiv.org/abs/2310.03156>`_, ICLR 2024.
    """
    _validate.one_of(("paper", "reference"), variant=variant)
    options = {
        "hyper_rate": (hyper_rate, 1.0),
        "global_bounds": (global_bounds, None),
        "local_bounds": (local_bounds, "relative"),
        "global_gamma": (global_gamma, 3.0),
        "local_gamma": (local_gamma, 10.0),
        "global_weight": (global_weight, None),
        "inner_product": (inner_product, "pseudo_gradient"),
        "client_rates": (client_rates, "restart"),
        "population": (population, None),
        "normalise": (normalise, None),
        "update": (update, "additive"),
        "max_change": (max_change, None),
    }
    given = {name: value for name, (value, usual) in options.items() if not _is(value, usual)}
    if variant == "reference":
        for name, value in {**given, **({} if _is(global_rate, 1.0) else {"global_rate": global_rate})}.items():
            raise ValueError(f"variant='reference' fixes {name}, got {value!r}; leave it out")
        _validate.one_of(VARIANTS, **{"reference scheduler": schedulers})
        return VARIANTS[schedulers](loss_fn, work=work, local_rate=local_rate, **settings)

    names = parse_schedulers(schedulers)
    if "CL" not in names:
        _check_without_cl(schedulers, given)
    value = all_together(SCHEDULERS[name] for name in names)
    own = {option: given[option] for option in given if option in value.options or option == "population"}
    for option, by_name in own.items():
        if isinstance(by_name, Mapping):
            for name in by_name:
                _validate.one_of(SCHEDULERS, **{f"scheduler in {option}": name})
            own[option] = {name: by_name[name] for name in names if name in by_name}
    return value(**own)(
        loss_fn, work=work, local_rate=local_rate, global_rate=global_rate, inner_product=inner_product, **settings
    )


def _is(value: Any, usual: Any) -> bool:
    """Whether an argument stands at its default; a traced one never does."""
    return value is usual or (not _validate.is_traced(value) and not isinstance(value, Mapping) and value == usual)


def _check_without_cl(schedulers: str, given: dict[str, Any]) -> None:
    """Raises ValueError for arguments that only CL minds."""
    if "client_rates" in given:
        raise ValueError(f"client_rates={given['client_rates']!r} needs CL, which moves the clients' rates; add it")
    if "global_weight" in given:
        raise ValueError(f"global_weight is of CL's global term, but schedulers={schedulers!r} has no CL; leave it out")
    if "population" in given:
        raise ValueError(f"population={given['population']!r} belongs to client_rates='per_client'; leave it out")
