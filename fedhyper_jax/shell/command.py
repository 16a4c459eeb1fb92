"""What the command `fedhyper` starts: the command line, or, without the packages that it needs, a line that says so."""

import sys

from fedhyper_jax import _validate

PACKAGES = ("flax", "matplotlib", "orbax", "rich", "tomli_w", "tyro")
"""What the shell needs beside the core, whatever the data; of the extra `cli` in pyproject.toml."""


def check_packages(what: str) -> None:
    """Refuses to go on without the packages of the shell.

    Args:
      what: what is refused, as the message names it.

    Raises:
      ModuleNotFoundError: one is missing; the message is one line and says what to install.

    Example:
      >>> check_packages("the command fedhyper")
    """
    _validate.installed(what, *PACKAGES)


def main() -> int:
    """Runs the command line of this process; returns its exit status, 2 where packages are missing."""
    try:
        check_packages("the command fedhyper")
    except ModuleNotFoundError as error:
        print(f"fedhyper: error: {error}", file=sys.stderr)
        return 2
    from fedhyper_jax.shell import cli

    return cli.main()
