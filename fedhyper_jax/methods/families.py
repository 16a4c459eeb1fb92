"""Every method, by families: a method is a function in one of these files, and its name in the file's ``__all__``."""

from fedhyper_jax.methods import (
    aggregation,
    authors_code,
    averaging,
    client_drift,
    client_steps,
    rate_rules,
    retained,
    schedulers,
    server_steps,
)
from fedhyper_jax.methods.aggregation import *  # noqa: F403
from fedhyper_jax.methods.authors_code import *  # noqa: F403
from fedhyper_jax.methods.averaging import *  # noqa: F403
from fedhyper_jax.methods.client_drift import *  # noqa: F403
from fedhyper_jax.methods.client_steps import *  # noqa: F403
from fedhyper_jax.methods.rate_rules import *  # noqa: F403
from fedhyper_jax.methods.retained import *  # noqa: F403
from fedhyper_jax.methods.schedulers import *  # noqa: F403
from fedhyper_jax.methods.server_steps import *  # noqa: F403

FAMILIES = (
    averaging,
    schedulers,
    retained,
    rate_rules,
    server_steps,
    client_drift,
    client_steps,
    aggregation,
    authors_code,
)
"""In the order of the table."""

__all__ = aggregation.__all__ + authors_code.__all__ + averaging.__all__ + client_drift.__all__
__all__ += client_steps.__all__ + rate_rules.__all__ + retained.__all__ + schedulers.__all__ + server_steps.__all__
