"""The floors of the house (DESIGN.md section 1), and what importing the package may load."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "fedhyper_jax"

FLOORS = {
    0: {"base", "_tree", "_validate", "_random"},
    1: {"hypergradient", "data", "models", "rates", "losses", "metrics", "server_optimizers", "_convolutions"},
    2: {"client", "client_rules", "cohort", "server", "terms", "_checks", "_observe"},
    3: {"algorithms", "methods"},
    4: {"simulation", "sweep", "evaluation", "autotune", "cores"},
    5: {
        "bench",
        "cache",
        "config",
        "cli",
        "launch",
        "records",
        "checkpoint",
        "plots",
        "report",
        "compare",
        "experiment",
        "method_pages",
        "presets",
        "progress",
        "train",
    }
    | {"_toml"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}

# Which rooms may import a heavy library, anywhere in the file.
HEAVY = {
    "flax": {"models"},
    "orbax": {"checkpoint"},
    "rich": FLOORS[5],
    "tyro": FLOORS[5],
    "matplotlib": {"plots", "data"},
    "tensorflow_datasets": {"data"},
    "sklearn": {"data"},
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imports(path):
    """Every module imported anywhere in a file, functions included, as dotted names."""
    known = {name for name, _ in modules()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in known else node.module


def room(name):
    """fedhyper_jax.data.batches -> data"""
    return name.split(".")[1]


def test_every_module_has_a_floor():
    rooms = {room(name) for name, _ in modules() if name != "fedhyper_jax"}
    assert rooms <= set(FLOOR_OF), f"give these a floor: {rooms - set(FLOOR_OF)}"


def test_no_module_imports_from_a_floor_above():
    for name, path in modules():
        if name == "fedhyper_jax":
            continue
        for imported in imports(path):
            if imported.startswith("fedhyper_jax.") and room(imported) in FLOOR_OF:
                assert FLOOR_OF[room(imported)] <= FLOOR_OF[room(name)], f"{name} imports {imported} from above"


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
def test_heavy_libraries_stay_in_their_rooms(library):
    for name, path in modules():
        if any(imported == library or imported.startswith(library + ".") for imported in imports(path)):
            assert room(name) in HEAVY[library], f"{name} imports {library}"


def test_importing_the_package_loads_nothing_heavy():
    heavy = ["flax", "tensorflow", "tensorflow_datasets", "orbax", "matplotlib", "sklearn", "PIL", "rich", "tyro"]
    program = f"import sys, fedhyper_jax; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert result.stdout.strip() == "[]"
