"""What the notebooks hold beside their sources: outputs of a real run, and the address of the repository.

``python -m tests.house.notebooks store [01_quickstart …]`` runs them, each in an empty folder, and keeps what they
print and draw. ``python -m tests.house.notebooks addresses`` writes the repository's address, as pyproject.toml has it
under ``[project.urls] Repository``, into their badges and first cells, and those of the README; ``store`` does so too.

``PYTHON tests/house/notebooks.py execute NOTEBOOK SOURCE`` runs one as a reader would, with nothing but the address in
its first cell; PYTHON needs ``ipykernel`` and ``nbclient`` alone.
"""

import base64
import io
import json
import pathlib
import re
import sys
import tempfile

import nbformat
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
COLAB = "https://colab.research.google.com/"
BADGE = rf"(\[!\[Open in Colab\]\({COLAB}assets/colab-badge.svg\)\]\()[^)]*\)"
SOURCE = r'^SOURCE = ".*?"'


def execute(notebook, source: str = "", timeout: int = 1200):
    """Runs a notebook in an empty folder, with ``source`` in its first cell if given, and asks who was imported.

    Returns:
      The file of the package that it ran; its outputs are in ``notebook``.
    """
    if source:
        (cell,) = (cell for cell in notebook.cells if re.search(SOURCE, cell.source, flags=re.M))
        cell.source = re.sub(SOURCE, lambda _: f"SOURCE = {json.dumps(source)}", cell.source, flags=re.M)
    notebook.cells.append(nbformat.v4.new_code_cell("import fedhyper_jax\nprint(fedhyper_jax.__file__)"))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute()
    return notebook.cells.pop().outputs[0].text.strip()


def tidy(notebook) -> None:
    """Leaves of a run what it would leave anywhere; joins what it printed, shrinks what it drew."""
    formats = {"formats": "ipynb,py:percent"}
    notebook.metadata = {
        "jupytext": formats,
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        joined = []
        for output in cell.outputs:
            if joined and output.output_type == "stream" == joined[-1].output_type and output.name == joined[-1].name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        cell.outputs = joined
        for output in joined:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = small(output.data["image/png"])


def small(picture: str, width: int = 1200) -> str:
    """A PNG no wider than that, of 64 colours: lines on white need no more, and a repository keeps every version."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    image.quantize(64).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def repository() -> str:
    """The repository's address; empty as long as there is none."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository", "").removesuffix("/").removesuffix(".git")


def colab_link(name: str, address: str) -> str:
    """Where a badge leads: to the notebook on Colab, or as long as it can be read nowhere, to where it is uploaded."""
    on_github = re.fullmatch(r"https://github\.com/([^/]+/[^/]+)", address)
    return f"{COLAB}github/{on_github[1]}/blob/main/notebooks/{name}.ipynb" if on_github else COLAB


def with_addresses(text: str, name: str, address: str) -> str:
    """The text with the badge of a notebook and its SOURCE as they have to be."""
    text = re.sub(BADGE, lambda badge: f"{badge[1]}{colab_link(name, address)})", text)
    return re.sub(SOURCE, f'SOURCE = "{address and f"git+{address}"}"', text, flags=re.M)


def readme_with_addresses(text: str, address: str) -> str:
    """The README with the badges that follow its links to notebooks as they have to be."""
    line = r"\(notebooks/(\w+)\.ipynb\).*"
    return re.sub(line, lambda found: with_addresses(found[0], found[1], address), text)


def write_addresses() -> None:
    """Into the README, the notebooks and their scripts; outputs stay."""
    address = repository()
    readme = ROOT / "README.md"
    readme.write_text(readme_with_addresses(readme.read_text(), address))
    for name in NAMES:
        script = FOLDER / f"{name}.py"
        script.write_text(with_addresses(script.read_text(), name, address))
        path = FOLDER / f"{name}.ipynb"
        if path.exists():
            notebook = nbformat.read(path, as_version=4)
            for cell in notebook.cells:
                cell.source = with_addresses(cell.source, name, address)
            nbformat.write(notebook, path)


def store(name: str) -> None:
    """Runs a notebook, made anew from its script, and keeps its outputs."""
    import jupytext

    notebook = jupytext.read(FOLDER / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # the same from run to run
    execute(notebook)
    tidy(notebook)
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["addresses"]:
            write_addresses()
        case ["store", *names]:
            write_addresses()
            for name in names or NAMES:
                store(name)
        case ["execute", path, source]:
            print(execute(nbformat.read(path, as_version=4), source))
        case _:
            raise SystemExit(__doc__)
