import io
import sys

import pytest

from fedhyper_jax.shell.cli import main


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "cp1252", "utf-8"])
@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (["methods"], 0, "fedavg"),
        (["methods", "--markdown"], 0, "# Methods"),
        (["methods", "G+SL"], 0, "hyper"),
        (["data", "--clients", "10"], 0, "effective classes"),
        (["run", "--help"], 0, "--local-rate"),
        (["plot", "no β \udcff"], 2, "is not a run folder"),
    ],
)
def test_any_console_and_any_file_can_be_written_to(encoding, arguments, status, shown, monkeypatch):
    """As Python opens them, strict; a lone surrogate is what it makes of a path that is not in its encoding."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert main(arguments) == status
    texts = {}
    for name, stream in streams.items():
        stream.flush()
        texts[name] = stream.buffer.getvalue().decode(encoding)
    assert shown in texts["stderr" if status else "stdout"]
    if encoding == "utf-8" and arguments == ["methods"]:
        assert "α" in texts["stdout"] and "?" not in texts["stdout"]
