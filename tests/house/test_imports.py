"""The rule of imports (a folder a floor), and what importing the package may load."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[2] / "fedhyper_jax"

FLOORS = {
    0: {"base", "_tree", "_validate", "_repr", "_random", "_threefry", "_version"},
    1: {"data", "models", "tasks", "hypergradient"},
    2: {"parts"},
    3: {"engine", "methods"},
    4: {"shell"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
SIDEWAYS = {("methods", "engine")}
"""On one floor only methods may use the engine."""

# Which folders may import a heavy library, anywhere in a file.
HEAVY = {
    "flax": {"models"},
    "orbax": {"shell"},
    "rich": {"shell"},
    "tyro": {"shell"},
    "matplotlib": {"shell", "data"},
    "tensorflow_datasets": {"data"},
    "sklearn": {"data"},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


@functools.cache
def imports(path):
    """Every module imported anywhere in a file, functions included, as dotted names."""
    known, found = {name for name, _ in modules()}, []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.append(submodule if submodule in known else node.module)
    return found


def folder(name):
    """fedhyper_jax.data.batches -> data"""
    return name.split(".")[1]


def test_the_tree_has_five_floors_and_nothing_beside_them():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {name for floor in range(1, 5) for name in FLOORS[floor]}
    assert {path.stem for path in PACKAGE.glob("*.py")} <= FLOORS[0] | {"__init__"}


def test_folders_import_faces_of_lower_floors_only():
    """A folder imports from lower floors and from itself, and of another folder its face, not its files."""
    for name, path in modules():
        if name == "fedhyper_jax":
            continue
        own = folder(name)
        for imported in imports(path):
            if not imported.startswith("fedhyper_jax.") or folder(imported) == own:
                continue
            other = folder(imported)
            below = FLOOR_OF[other] < FLOOR_OF[own] or (own, other) in SIDEWAYS
            assert below or FLOOR_OF[own] == FLOOR_OF[other] == 0, f"{name} imports {imported}"
            # The face, or a module that it names (`from fedhyper_jax.parts import rates`).
            assert imported.count(".") <= 2, f"{name} imports {imported}, which is no face"


def test_a_face_names_the_modules_that_others_import():
    for name, path in modules():
        for imported in imports(path):
            if imported.count(".") == 2 and folder(imported) in FLOOR_OF and folder(imported) != folder(f"{name}.x"):
                face = PACKAGE / folder(imported) / "__init__.py"
                assert f'"{imported.rsplit(".", 1)[1]}"' in face.read_text(), f"{name} imports {imported}"


def test_no_imports_form_a_cycle():
    known = dict(modules())
    graph = {
        name: {imported for imported in imports(path) if imported in known and imported != name}
        for name, path in known.items()
        if name != "fedhyper_jax"
    }
    done, path = set(), []

    def visit(name):
        if name in path:
            raise AssertionError("import cycle: " + " -> ".join([*path[path.index(name) :], name]))
        if name in done or name not in graph:
            return
        path.append(name)
        for imported in graph[name]:
            # A package's __init__ imports its own modules; that is no cycle unless they import the package.
            visit(imported)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_heavy_libraries_stay_in_their_folders(library):
    for name, path in modules():
        if any(imported == library or imported.startswith(library + ".") for imported in imports(path)):
            assert folder(name) in HEAVY[library], f"{name} imports {library}"


STEPS = {
    "the package": ("from fedhyper_jax.data import load; load('digits')", "rich tyro flax"),
    "help": ("from fedhyper_jax.shell.cli import main; main(['compare', '--help'])", "flax"),
    "the commands that train": ("from fedhyper_jax.shell import train, compare", "flax.nnx"),
}
"""What a user waits for, one after the other, and what has not been loaded then beside what never should be."""


def test_heavy_libraries_are_loaded_when_they_are_needed():
    """So reading the digits does not load scikit-learn, which takes two seconds."""
    never = "tensorflow tensorflow_datasets orbax matplotlib sklearn PIL array_record"
    program = "import sys\n"
    for step, unwanted in STEPS.values():
        names = f"{never} {unwanted}".split()
        program += f"{step}\nprint('loaded', [name for name in {names} if name in sys.modules])\n"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    loaded = [line for line in result.stdout.splitlines() if line.startswith("loaded")]
    assert dict(zip(STEPS, loaded, strict=True)) == dict.fromkeys(STEPS, "loaded []")


def test_tests_mirror_the_folders():
    """So that whoever changes a folder knows which tests are its own."""
    tests = {path.name for path in (PACKAGE.parent / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert tests <= {name for floor in range(1, 5) for name in FLOORS[floor]} | {"words", "reference", "house"}
