"""The shell: files, clocks, terminals and processes around the pure core; what the command `fedhyper` runs.

Nothing is imported here: the command starts in `command`, and the package loads `cache` and `runs` at first use.
"""

__all__ = ["cache", "command", "runs"]
