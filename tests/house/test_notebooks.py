"""The notebooks run from top to bottom, and each .ipynb is its .py."""

import pathlib

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers import product

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pairs_are_in_step(path):
    """`jupytext --sync notebooks/*.py` makes them so."""
    script, notebook = jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in script.cells] == [(c.cell_type, c.source) for c in notebook.cells]


SHORTER = """
from fedhyper_jax.shell import presets

def shorter(name, command, *, whole=presets.preset_config):
    import dataclasses
    config = whole(name, command)
    grid = dataclasses.replace(config.compare, methods=("fedavg", "G+CL"), seeds=2)
    run = dataclasses.replace(config.run, rounds=6, strategy="sequential")
    return dataclasses.replace(config, compare=grid, run=run)

presets.preset_config = shorter
"""
"""What is run before the first cell: the comparison that `make demo` and `make test-all` run whole, cut short."""


# jupyter_client and its event loop are not ours to mend.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("whole", [False, product(True)], ids=["short", "whole"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, whole, tmp_path):
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    if not whole:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(SHORTER))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3
