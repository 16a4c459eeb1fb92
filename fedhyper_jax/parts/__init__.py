"""Parts of a round, and the contracts that they keep (`fedhyper_jax.parts.contract`).

* `rates`: rules of either rate from round to round; `client_rules`: of a client's rate from step to step.
* `terms`: what a method adds to the local objective and the aggregation.
* `server_optimizers`: optax transforms of the pseudo-gradient.
* `aggregators`: how client updates become one; `guards`: whether a round counts.
* `participation`: who is asked; `failures`: who does not deliver.
* `probes`: what an optax optimizer does, found by playing it.
"""

from fedhyper_jax.parts import (
    aggregators,
    client_rules,
    failures,
    guards,
    participation,
    probes,
    rates,
    server_optimizers,
    terms,
)
from fedhyper_jax.parts.contract import (
    Aggregator,
    ClientFacts,
    ClientResult,
    ClientRule,
    Conclusion,
    Contribution,
    FailureModel,
    Feedback,
    Gathered,
    Guard,
    LocalTerm,
    Outcome,
    Participation,
    Parts,
    Proposal,
    RateReport,
    RateRule,
    Spread,
    TermContext,
    TermSums,
    Traffic,
    Verdict,
)

__all__ = [
    "Aggregator",
    "ClientFacts",
    "ClientResult",
    "ClientRule",
    "Conclusion",
    "Contribution",
    "FailureModel",
    "Feedback",
    "Gathered",
    "Guard",
    "LocalTerm",
    "Outcome",
    "Participation",
    "Parts",
    "Proposal",
    "RateReport",
    "RateRule",
    "Spread",
    "TermContext",
    "TermSums",
    "Traffic",
    "Verdict",
    "aggregators",
    "client_rules",
    "failures",
    "guards",
    "participation",
    "probes",
    "rates",
    "server_optimizers",
    "terms",
]
