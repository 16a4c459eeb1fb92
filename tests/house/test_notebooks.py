"""The notebooks run from top to bottom, also from nothing but a wheel; each .ipynb is its .py and holds its outputs."""

import base64
import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import venv

import jupytext
import nbformat
import pytest

from tests.house import notebooks
from tests.house.notebooks import COLAB, FOLDER, NAMES, ROOT

every_notebook = pytest.mark.parametrize("name", NAMES)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def pictures_of(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_there_are_notebooks():
    assert NAMES == ["01_quickstart", "02_own_experiment"]


@every_notebook
def test_pairs_are_in_step(name):
    """`python -m tests.house.notebooks store` makes them so."""
    script = jupytext.read(FOLDER / f"{name}.py")
    assert [(c.cell_type, c.source) for c in script.cells] == [(c.cell_type, c.source) for c in read(name).cells]


@every_notebook
def test_outputs_are_stored(name):
    """Of one run from top to bottom, small, and without anything of the machine or of what went wrong there."""
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    pictures = pictures_of(notebook)
    assert len(pictures) >= 3
    assert max(len(base64.b64decode(picture)) for picture in pictures) < 150_000
    said = json.dumps([output for output in outputs if "image/png" not in output.get("data", {})])
    assert not re.search(r"(?<![\w.])/(home|tmp|root|work|Users|usr|var|opt)/|Warning|pypi", said)


@every_notebook
def test_badges_lead_where_the_notebook_can_be_read(name):
    """`python -m tests.house.notebooks addresses` makes them so, after a change of pyproject.toml."""
    text = (FOLDER / f"{name}.py").read_text()
    assert len(re.findall(notebooks.BADGE, text)) == len(re.findall(notebooks.SOURCE, text, flags=re.M)) == 1
    assert text == notebooks.with_addresses(text, name, notebooks.repository())
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"\(notebooks/{name}\.ipynb\).*{notebooks.BADGE}", readme)
    assert readme == notebooks.readme_with_addresses(readme, notebooks.repository())


def test_badges_follow_the_address():
    before = (
        '[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](elsewhere)\nSOURCE = "x"  # @'
    )
    after = notebooks.with_addresses(before, "01_quickstart", "https://github.com/someone/something")
    badge, source = after.splitlines()
    assert badge.endswith(
        "](https://colab.research.google.com/github/someone/something/blob/main/notebooks/01_quickstart.ipynb)"
    )
    assert source == 'SOURCE = "git+https://github.com/someone/something"  # @'
    badge, source = notebooks.with_addresses(
        after, "01_quickstart", ""
    ).splitlines()  # none yet: the page that takes uploads
    assert (badge[-len(COLAB) - 3 :], source) == (f"]({COLAB})", 'SOURCE = ""  # @')


SHORTER = """
import fedhyper_jax
from fedhyper_jax.shell import presets

def shorter(name, command, *, whole=presets.preset_config):
    import dataclasses
    config = whole(name, command)
    data = dataclasses.replace(config.data, evaluate_clients=False)
    grid = dataclasses.replace(config.compare, methods=("SL",), local_rates=(0.3,), seeds=2)
    run = dataclasses.replace(config.run, rounds=4, strategy="sequential")
    return dataclasses.replace(config, data=data, compare=grid, run=run)

swept = []

def one_round(make, settings, *arguments, whole=fedhyper_jax.sweep, **others):
    import jax
    first = {name: values[0] for name, values in settings.items()}
    if not swept:
        swept.append(whole(make, settings, *arguments, **{**others, "rounds": 1}))
    assert make(**first).init(jax.tree.map(lambda leaf: leaf[0], arguments[1])).params
    return jax.tree.map(lambda leaf: leaf[: len(next(iter(settings.values())))], swept[0])

def sequential(*arguments, whole=fedhyper_jax.fedavg, **settings):
    return whole(*arguments, **{**settings, "strategy": "sharded(sequential)"})

presets.preset_config, fedhyper_jax.sweep, fedhyper_jax.fedavg = shorter, one_round, sequential
fedhyper_jax.use_all_cores = lambda: None
"""
"""What is run before the first cell: the comparison that `make demo` and `make test-all` run whole, cut short, and one
round of the first sweep, by the strategy that compiles fastest, on one device (test_docs.py runs on all cores). Further
sweeps, of methods of the package, take its history."""


# jupyter_client and its event loop are not ours to mend.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@every_notebook
def test_notebooks_run(name):
    notebook = read(name)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SHORTER))
    notebooks.execute(notebook)
    assert len(pictures_of(notebook)) >= 3


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as it is handed on."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(pip, check=True)
    (built,) = folder.glob("fedhyper_jax-*.whl")
    return built


def environment_without_the_package(folder):
    """Its Python; all else that this one has is in it, so that nothing has to be downloaded."""
    venv.create(folder / "venv", with_pip=False)
    others = folder / "others"
    others.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in pathlib.Path(place).iterdir():
            if "fedhyper" not in entry.name and entry.suffix != ".pth":
                (others / entry.name).symlink_to(entry)
    python = folder / "venv" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    (pathlib.Path(own) / "others.pth").write_text(f"{others}\n")
    return python


@pytest.mark.product  # whole, for minutes; cut short, and from the sources: the test above
@every_notebook
def test_notebooks_run_from_a_wheel(name, wheel, tmp_path):
    """In an empty folder, by an environment that knows of the package only what SOURCE says in the first cell."""
    python = environment_without_the_package(tmp_path)
    place = {"env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "cwd": tmp_path}
    unknown = subprocess.run([python, "-c", "import fedhyper_jax"], capture_output=True, text=True, **place)
    assert "ModuleNotFoundError" in unknown.stderr
    run = [python, ROOT / "tests" / "house" / "notebooks.py", "execute", FOLDER / f"{name}.ipynb", wheel]
    done = subprocess.run(run, capture_output=True, text=True, **place)
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(done.stdout.strip()).is_relative_to(tmp_path / "venv")
    assert not list(tmp_path.glob("venv/lib/*/site-packages/jax*"))  # the JAX that was there stays
