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
import fedhyper_jax
from fedhyper_jax.shell import presets

def shorter(name, command, *, whole=presets.preset_config):
    import dataclasses
    config = whole(name, command)
    data = dataclasses.replace(config.data, evaluate_clients=False)
    grid = dataclasses.replace(config.compare, methods=("SL",), local_rates=(0.3,), seeds=2)
    run = dataclasses.replace(config.run, rounds=4, strategy="sequential")
    return dataclasses.replace(config, data=data, compare=grid, run=run)

def one_round(*arguments, whole=fedhyper_jax.sweep, **settings):
    return whole(*arguments, **{**settings, "rounds": 1})

def sequential(*arguments, whole=fedhyper_jax.fedavg, **settings):
    return whole(*arguments, **{**settings, "strategy": "sharded(sequential)"})

presets.preset_config, fedhyper_jax.sweep, fedhyper_jax.fedavg = shorter, one_round, sequential
fedhyper_jax.use_all_cores = lambda: None
"""
"""What is run before the first cell: the comparison that `make demo` and `make test-all` run whole, cut short, and one
round of the sweep, by the strategy that compiles fastest, on one device (test_docs.py runs on all cores)."""


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
