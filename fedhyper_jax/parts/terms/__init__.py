"""Terms: what a method adds to the clients' local objective and to the way their updates become a pseudo-gradient.

A term changes the local objective (FedProx, SCAFFOLD, FedDyn, FedCM), the local direction (MIME-lite), or the
aggregation (FedNova, FedDyn), and may keep state on the server and a row per client. Terms compose in any order;
`federated_algorithm` refuses what has no meaning together, and says why.
"""

from fedhyper_jax.parts.contract import Conclusion, Contribution, LocalTerm, Outcome, TermContext, TermSums, Traffic
from fedhyper_jax.parts.terms._objectives import client_momentum, control_variates, dynamic_regularization, proximal
from fedhyper_jax.parts.terms._steps import frozen_optimizer, normalized_averaging

__all__ = [
    "Conclusion",
    "Contribution",
    "LocalTerm",
    "Outcome",
    "TermContext",
    "TermSums",
    "Traffic",
    "client_momentum",
    "control_variates",
    "dynamic_regularization",
    "frozen_optimizer",
    "normalized_averaging",
    "proximal",
]
