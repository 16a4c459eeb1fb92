"""One tiny run and one tiny comparison on the digits, shared by the tests of the shell."""

import contextlib
import io

import pytest
from matplotlib.figure import Figure

from fedhyper_jax.shell.cli import main
from tests.helpers import without_pictures

TINY = ["--clients", "20", "--cohort-size", "4", "--local-steps", "2", "--batch-size", "8", "--quiet"]
TINY += ["--model", "logistic", "--strategy", "sequential"]  # which compiles in half the time
RUN = ["run", *TINY, "--rounds", "3", "--method", "G+CL", "--local-rate", "0.05"]
COMPARE = [
    "compare",
    *TINY,
    *("--rounds", "4", "--methods", "fedavg", "SL", "--local-rates", "0.02", "0.5", "--seeds", "2"),
    *("--target", "0.999", "--no-evaluate-clients"),
]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Programs and answers that commands keep are kept for this session only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """The folders that tests share have empty ones; what `fedhyper plot` draws is drawn."""
    without_pictures(monkeypatch)


@contextlib.contextmanager
def overviews_only():
    """Of pictures only the overviews are drawn, which have all panels, and one rate; the other files are empty."""
    draw = Figure.savefig

    def savefig(figure, path, **options):
        draw(figure, path, **options) if path.stem in ("overview", "rate_0.5") else path.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture
def drawn_quickly():
    """`overviews_only` for a test."""
    with overviews_only():
        yield


@contextlib.contextmanager
def empty_pictures():
    """`without_pictures` for folders that tests share."""
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        yield


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "first"
    with empty_pictures():
        assert main([*RUN, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def comparison(tmp_path_factory):
    """The run folder of a comparison, and what was printed on standard output and standard error."""
    folder = tmp_path_factory.mktemp("compare") / "first"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), empty_pictures():
        assert main([*COMPARE, "--out", str(folder)]) == 0
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def compare_folder(comparison):
    return comparison[0]
