"""The compilation cache of commands and notebooks: a program that was compiled once is read back, whatever the rates.

Rates are data, so a run that differs in rates only is the same program. The cache lies in
``$JAX_COMPILATION_CACHE_DIR`` if that is set, else in ``fedhyper_jax/programs`` below ``$XDG_CACHE_HOME``
(``~/.cache``). ``JAX_ENABLE_COMPILATION_CACHE=false`` turns it off. Deleting the folder is always safe.
"""

import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import jax

_EVENTS = {"/jax/compilation_cache/cache_hits": "hits", "/jax/compilation_cache/cache_misses": "misses"}
_counts = {"hits": 0, "misses": 0}


def _folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedhyper_jax"


def cache_folder() -> pathlib.Path:
    """Where compiled programs are kept."""
    return pathlib.Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or _folder() / "programs").expanduser()


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Keeps every program that is compiled from now on, and reads those back that were compiled before.

    Rates, hyper rates, bounds and seeds are data: a program with others is read back and compiles nothing. One call at
    the top of a notebook or script; the commands make it themselves. It is of the whole process, so a library leaves it
    to those who use it.

    Args:
      folder: where to keep programs; that of the commands if None.

    Returns:
      The folder. Deleting it is always safe.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:  # without an argument: once and for all
      ...     use_compilation_cache(folder) == pathlib.Path(folder)
      True
      >>> jax.config.update("jax_compilation_cache_dir", None)  # off again
    """
    folder = cache_folder() if folder is None else pathlib.Path(folder).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _listen()
    return folder


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_listener(_count)


def _count(event: str, **details) -> None:
    if event in _EVENTS:
        _counts[_EVENTS[event]] += 1


def cache_use() -> dict[str, int]:
    """How many programs this process read from the cache (hits), and how many it compiled and kept (misses).

    Example:
      >>> sorted(cache_use())
      ['hits', 'misses']
    """
    return dict(_counts)


def recall(question: Any) -> str | None:
    """The answer found before, on this machine, to a question: anything that JSON can hold."""
    try:
        return _answer_file(question).read_text(encoding="utf-8")
    except OSError:
        return None


def remember(question: Any, answer: str) -> None:
    """Keeps an answer for `recall`; a folder that cannot be written to is no error, since it only saves time."""
    file = _answer_file(question)
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(answer, encoding="utf-8")
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)


def _answer_file(question: Any) -> pathlib.Path:
    text = json.dumps(question, sort_keys=True, default=str)
    return _folder() / "answers" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.txt"
