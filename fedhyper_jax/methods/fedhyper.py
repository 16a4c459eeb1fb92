"""FedHyper: global and local rates that descend their hypergradients, in every combination."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from fedhyper_jax import _validate
from fedhyper_jax.base import FederatedAlgorithm, LossFunction
from fedhyper_jax.data import LocalWork
from fedhyper_jax.engine import Strategy, federated_algorithm
from fedhyper_jax.methods.reference import fedhyper_reference
from fedhyper_jax.parts import LocalTerm, RateRule, client_rules, rates

SCHEDULERS = ("G", "SL", "CL")
VARIANTS = ("paper", "reference")
CLIENT_RATES = ("restart", "warm", "per_client")
BOUND_KINDS = ("relative", "absolute")

Bounds = str | tuple
"""'relative', 'absolute' or a pair of numbers (lower, upper)."""


def parse_schedulers(schedulers: str) -> frozenset[str]:
    """The set of schedulers in a name such as 'G+CL'.

    Example:
      >>> sorted(parse_schedulers("SL+G"))
      ['G', 'SL']
    """
    parts = schedulers.split("+") if isinstance(schedulers, str) else [schedulers]
    for part in parts:
        _validate.one_of(SCHEDULERS, scheduler=part)
    if len(set(parts)) < len(parts):
        raise ValueError(
            f"schedulers names one twice, got {schedulers!r}; write each of {', '.join(SCHEDULERS)} at most once"
        )
    return frozenset(parts)


def resolve_bounds(bounds: Bounds, rate, gamma, *, name: str) -> tuple:
    """Bounds as numbers: 'relative' is (rate / γ, rate · γ), 'absolute' is (1 / γ, γ), a pair stays.

    Example:
      >>> resolve_bounds("relative", 0.5, 10.0, name="local_bounds")
      (0.05, 5.0)
    """
    if not isinstance(bounds, str):
        return _validate.bounds(bounds, initial_rate=rate, name=name, rate_name=name.replace("bounds", "rate"))
    _validate.one_of(BOUND_KINDS, **{name: bounds})
    gamma_name = name.replace("bounds", "gamma")
    _validate.positive(**{gamma_name: gamma})
    if not _validate.is_traced(gamma) and float(gamma) < 1:
        raise ValueError(f"{gamma_name} must be ≥ 1, got {gamma!r}; the paper uses 3 (global) and 10 (local)")
    if bounds == "relative":
        return rate / gamma, rate * gamma
    lower, upper = 1 / gamma, gamma
    if not _validate.is_traced(rate, gamma) and not lower <= float(rate) <= upper:
        rate_name = name.replace("bounds", "rate")
        raise ValueError(
            f"{rate_name}={float(rate)!r} lies outside the absolute bounds [{lower!r}, {upper!r}]; "
            f"use {name}='relative'"
        )
    return lower, upper


def hyper_rate_of(scheduler: str, hyper_rate: Any) -> Any:
    """κ of one scheduler, from one number for all or a mapping; a scheduler that a mapping leaves out has 1.

    Example:
      >>> hyper_rate_of("SL", {"SL": 0.1}), hyper_rate_of("G", {"SL": 0.1}), hyper_rate_of("G", 0.2)
      (0.1, 1.0, 0.2)
    """
    if not isinstance(hyper_rate, Mapping):
        return hyper_rate
    for name in hyper_rate:
        _validate.one_of(SCHEDULERS, **{"scheduler in hyper_rate": name})
    return hyper_rate.get(scheduler, 1.0)


def _check_schedule_inside(local_rule: RateRule, bounds: tuple) -> None:
    """CL starts a round from the broadcast rate and clips from the next step on: a rate outside would jump."""
    table = getattr(local_rule.init(jnp.zeros(())), "table", None)
    if table is None or _validate.is_traced(table, *bounds):
        return
    values, (lower, upper) = np.asarray(table), (np.float32(bound) for bound in bounds)
    outside = np.flatnonzero((values < lower) | (values > upper))
    if len(outside):
        at = int(outside[0])
        raise ValueError(
            f"the schedule of local_rate gives {values[at]} in round {at}, outside CL's "
            f"local_bounds=({lower}, {upper}); give local_bounds that hold all of it, "
            "or schedule_rounds of the length of the run"
        )


def fedhyper(
    loss_fn: LossFunction,
    schedulers: str = "G+CL",
    *,
    work: LocalWork,
    local_rate: optax.ScalarOrSchedule | RateRule,
    global_rate: optax.ScalarOrSchedule | RateRule = 1.0,
    variant: str = "paper",
    hyper_rate=1.0,
    global_bounds: Bounds = "absolute",
    local_bounds: Bounds = "relative",
    global_gamma=3.0,
    local_gamma=10.0,
    global_weight=None,
    inner_product: str = "pseudo_gradient",
    client_rates: str = "restart",
    population: int | None = None,
    terms: Sequence[LocalTerm] = (),
    server_optimizer: optax.GradientTransformation | None = None,
    client_optimizer: optax.GradientTransformation | None = None,
    weighting: str = "examples",
    evaluate_at: str = "last",
    strategy: str | Strategy = "vectorized",
    schedule_rounds: int = rates.SCHEDULE_ROUNDS,
) -> FederatedAlgorithm:
    r"""FedHyper with the schedulers G, SL and CL, alone or together, on top of any optimizers.

    .. math::
      \text{G:}\quad & \alpha^t = \mathrm{clip}(\alpha^{t-1} + \kappa \langle \Delta^t, \Delta^{t-1} \rangle) \\
      \text{SL:}\quad & \beta^{t+1} = \mathrm{clip}(\beta^t + \kappa \langle \Delta^t, \Delta^{t-1} \rangle) \\
      \text{CL:}\quad & \beta_m^{t,k} = \mathrm{clip}\bigl(\beta_m^{t,k-1} + \kappa (\langle g_m^k, g_m^{k-1} \rangle
      + \tfrac{1}{K_m} \langle g_m^k, \Delta^{t-1} \rangle)\bigr), \quad \beta_m^{t,0} = \beta^t

    The raw products scale with the square of the loss: from local rates that start too large SL and CL can diverge,
    whatever the bounds (experiments/fashion_mnist_rates.py measures it).

    Args:
      loss_fn: ``(params, batch) -> per-example losses (B,)``.
      schedulers: any of 'G', 'SL', 'CL' joined by '+', e.g. 'G+SL+CL'.
      work: `local_epochs` or `local_steps`.
      local_rate: β^0 > 0. Without SL also an optax schedule of the round, or a rule of `fedhyper_jax.rates`; CL then
        starts each round from it, and its bounds must hold the whole schedule.
      global_rate: α^0 > 0. Without G also a schedule or a rule (FedExP's `rates.extrapolation`).
      variant: "paper", or "reference" for what the authors' public code computes, see `fedhyper_reference`, whose
        schedulers and arguments are others.
      hyper_rate: κ ≥ 0; 1 in the paper, 0 is FedAvg exactly. A mapping such as ``{"SL": 0.1}`` gives each scheduler
        its own; those left out have 1.
      global_bounds: of α: 'absolute' (1/γ, γ), 'relative' (α^0/γ, α^0·γ) or a pair of numbers.
      local_bounds: of β, shared by SL and CL, fixed by the run's β^0 wherever SL has moved β.
      global_gamma: γ_α ≥ 1 of named bounds.
      local_gamma: γ_β ≥ 1 of named bounds.
      global_weight: of CL's global term ⟨g, Δ^{t-1}⟩, ≥ 0; 1/K_m if None. With 0 clients need no Δ^{t-1}.
      inner_product: of G and SL: "pseudo_gradient", ⟨Δ^t, Δ^{t-1}⟩ as in the paper, or "applied", ⟨Δ^t, u^{t-1}⟩ with
        the direction u that the server's optimizer took: the true hypergradient of that step.
      client_rates: with CL, where a client's rate starts a round: "restart" from the server's β^t, "warm" from the mean
        Σ p_m β_m of the last cohort's final rates (plus SL's increment, if on), or "per_client" from its own last one.
      population: number of clients, for "per_client": one number each in the state.
      terms, server_optimizer, client_optimizer, weighting, evaluate_at, strategy, schedule_rounds: as in `fedavg`. CL's
        products are taken of what the client optimizer is fed.

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
      >>> for _ in range(2):
      ...     state, info = algorithm.round(key, state, Cohort(data=data, client_ids=np.arange(2)))
      >>> round(float(info.global_rate), 4)  # Δ = 0.1 · 2 = 0.2, then 0.1 · 1.8: 1 + 0.18 · 0.2
      1.036

    Reference:
      Wang, Wang, Li, `FedHyper: A Universal and Robust Learning Rate Scheduler for Federated Learning with
      Hypergradient Descent <https://arxiv.org/abs/2310.03156>`_, ICLR 2024.
    """
    _validate.one_of(VARIANTS, variant=variant)
    common = {
        "work": work,
        "server_optimizer": server_optimizer,
        "client_optimizer": client_optimizer,
        "terms": terms,
        "evaluate_at": evaluate_at,
        "strategy": strategy,
    }
    if variant == "reference":
        given = {
            "global_rate": (global_rate, 1.0),
            "hyper_rate": (hyper_rate, 1.0),
            "global_bounds": (global_bounds, "absolute"),
            "local_bounds": (local_bounds, "relative"),
            "global_gamma": (global_gamma, 3.0),
            "local_gamma": (local_gamma, 10.0),
            "global_weight": (global_weight, None),
            "inner_product": (inner_product, "pseudo_gradient"),
            "client_rates": (client_rates, "restart"),
            "population": (population, None),
        }
        for name, (value, default) in given.items():
            if value is not default and (_validate.is_traced(value) or value != default):
                raise ValueError(f"variant='reference' fixes {name}, got {value!r}; leave it out")
        return fedhyper_reference(loss_fn, schedulers, local_rate=local_rate, **common)

    parts = fedhyper_parts(
        parse_schedulers(schedulers),
        local_rate=local_rate,
        global_rate=global_rate,
        hyper_rate=hyper_rate,
        global_bounds=global_bounds,
        local_bounds=local_bounds,
        global_gamma=global_gamma,
        local_gamma=local_gamma,
        global_weight=global_weight,
        client_rates=client_rates,
        population=population,
        schedule_rounds=schedule_rounds,
    )
    return federated_algorithm(loss_fn, weighting=weighting, inner_product=inner_product, **common, **parts)


def fedhyper_parts(
    chosen: frozenset[str],
    *,
    local_rate,
    global_rate=1.0,
    hyper_rate=1.0,
    global_bounds: Bounds = "absolute",
    local_bounds: Bounds = "relative",
    global_gamma=3.0,
    local_gamma=10.0,
    global_weight=None,
    client_rates: str = "restart",
    population: int | None = None,
    schedule_rounds: int = rates.SCHEDULE_ROUNDS,
) -> dict[str, Any]:
    """What the schedulers make of the arguments of `federated_algorithm`: both rates' rules and the client rule."""
    _validate.one_of(CLIENT_RATES, client_rates=client_rates)
    name = "+".join(scheduler for scheduler in SCHEDULERS if scheduler in chosen)
    for scheduler, rate_name, rate in (("G", "global_rate", global_rate), ("SL", "local_rate", local_rate)):
        if scheduler in chosen and (callable(rate) or isinstance(rate, RateRule)):
            kind = "a rule" if isinstance(rate, RateRule) else "a schedule"
            raise ValueError(
                f"{rate_name} is {kind}, but {scheduler} moves it already: two rules for one rate; "
                f"give a number, or leave {scheduler} out of schedulers={name!r}"
            )
    _check_client_rates(client_rates, chosen, population, local_rate)
    if global_weight is not None and "CL" not in chosen:
        raise ValueError(f"global_weight is of CL's global term, but schedulers={name!r} has no CL; leave it out")

    if "G" in chosen:
        _validate.positive(global_rate=global_rate)
        bounds = resolve_bounds(global_bounds, global_rate, global_gamma, name="global_bounds")
        global_rule = rates.hypergradient(global_rate, hyper_rate_of("G", hyper_rate), bounds, name="global_rate")
    else:
        global_rule = rates.as_rate_rule(global_rate, rounds=schedule_rounds, name="global_rate")

    warm = client_rates == "warm"
    local_rule, client_rule = None, None
    if "SL" not in chosen and not warm:
        local_rule = rates.as_rate_rule(local_rate, rounds=schedule_rounds, name="local_rate")
        local_rate = local_rule.initial_rate
    if "SL" in chosen or "CL" in chosen:
        _validate.positive(local_rate=local_rate)
        bounds = resolve_bounds(local_bounds, local_rate, local_gamma, name="local_bounds")
        if local_rule is None:
            own_hyper_rate = hyper_rate_of("SL", hyper_rate) if "SL" in chosen else 0.0
            local_rule = rates.hypergradient(local_rate, own_hyper_rate, bounds, warm=warm, name="local_rate")
        else:
            _check_schedule_inside(local_rule, bounds)
        if "CL" in chosen:
            client_rule = client_rules.local_hypergradient(
                local_rate, hyper_rate_of("CL", hyper_rate), bounds, global_weight=global_weight
            )
    return {
        "global_rate": global_rule,
        "local_rate": local_rule,
        "client_rule": client_rule,
        "client_rates_of": population if client_rates == "per_client" else None,
    }


def _check_client_rates(client_rates: str, chosen: frozenset[str], population: int | None, local_rate: Any) -> None:
    if client_rates == "restart":
        if population is not None:
            raise ValueError(f"population={population!r} belongs to client_rates='per_client'; leave it out")
        return
    if "CL" not in chosen:
        raise ValueError(f"client_rates={client_rates!r} needs CL, which moves the clients' rates; add it")
    if callable(local_rate) or isinstance(local_rate, RateRule):
        raise ValueError(f"client_rates={client_rates!r} needs a number as local_rate: rates go on from the last ones")
    if client_rates == "per_client":
        if "SL" in chosen:
            raise ValueError("client_rates='per_client' with SL: two rules for one rate; use 'warm', or leave SL out")
        if population is None:
            raise ValueError("client_rates='per_client' keeps a rate for each client; give population, their number")
