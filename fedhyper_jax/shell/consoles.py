"""Standard output and standard error, whatever they can show."""

import sys


def replace_what_cannot_be_shown() -> None:
    """Makes a character that the encoding of the console or the file lacks a question mark instead of an error.

    Equations and tables have Greek letters; consoles that know none are usual on Windows and in containers.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # (not where a program has put something else in its place)
            stream.reconfigure(errors="replace")
