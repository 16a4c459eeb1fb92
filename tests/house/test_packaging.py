"""What is built and installed: the wheel, the page of a package index, and how far one gets without the extras."""

import importlib.metadata
import inspect
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser

import pytest
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CORE = {"jax", "jaxlib", "numpy", "optax", "jaxtyping"}


def names(requirements):
    return {canonicalize_name(Requirement(requirement).name) for requirement in requirements}


def closure(requirements):
    """Names of all distributions that these requirements install."""
    found, left = set(), [Requirement(requirement) for requirement in requirements]
    while left:
        requirement = left.pop()
        extras = requirement.extras or {""}
        name = canonicalize_name(requirement.name)
        if (name, *sorted(extras)) in found:
            continue
        found.add((name, *sorted(extras)))
        for needed in map(Requirement, importlib.metadata.requires(name) or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(needed)
    return {name for name, *_ in found}


# ---------------------------------------------------------------------------------------------- the small install


class Without:
    """A finder of imports by which some packages are not there."""

    def __init__(self, finder, hidden):
        self.finder, self.hidden = finder, hidden

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *where):
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, *where)


HIDE = """
import sys
sys.meta_path[:] = [Without(finder, {hidden!r}) for finder in sys.meta_path]
"""

SIMULATION = """
import numpy as np
import fedhyper_jax as fh

data = fh.data.pack({"x": np.arange(4.0), "y": np.arange(4.0)}, [[0, 1], [2, 3]])
algorithm = fh.fedavg(lambda w, batch: (w * batch["x"] - batch["y"]) ** 2, work=fh.local_steps(1, 2), local_rate=0.01)
state, history = fh.simulate(
    algorithm, jax.random.key(0), algorithm.init(jnp.float32(0)), data, rounds=20, cohort_size=2)
assert 0.5 < state.params <= 1
fh.use_compilation_cache()
print("simulated", history.info.participants[-1])
"""

DOORS = {
    "fh.models": "flax",
    "__import__('fedhyper_jax.models')": "flax",
    "fh.load_run": "flax, matplotlib, orbax, rich, tomli_w, tyro",
    "fh.data.load('digits')": "sklearn",
    "fh.data.load('diabetes')": "sklearn",
    "fh.data.load('cifar10')": "tensorflow_datasets, array_record, PIL",
    "fh.data.plot_partition(None, 'partition.png')": "matplotlib",
}
"""What asks for an extra, and what it then misses."""

ASK = """
for door in {doors!r}:
    try:
        eval(door)
        print("opened")
    except ModuleNotFoundError as error:
        print(error)

import contextlib, io
from fedhyper_jax.shell.command import main

for arguments in (["run"], ["--help"]):
    sys.argv[1:] = arguments
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main()
    print(status, said.getvalue(), end="")
"""


def run(program):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_core_alone_has_the_transforms_and_says_what_else_needs():
    """Hidden is every package here that `pip install fedhyper-jax` would not bring; the README's example runs."""
    kept = closure(PROJECT["project"]["dependencies"]) | {"fedhyper-jax"}
    hidden = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not kept & {canonicalize_name(owner) for owner in owners}
    }
    assert {"flax", "chex", "sklearn", "matplotlib", "tyro", "rich", "orbax", "tensorflow_datasets"} <= hidden
    (example,) = re.findall(r"```python\n([^`]*scale_by_hypergradient\(.*?)```", (ROOT / "README.md").read_text(), re.S)
    program = (
        inspect.getsource(Without) + HIDE.format(hidden=hidden) + example + SIMULATION + ASK.format(doors=list(DOORS))
    )
    _, simulated, *lines = run(program)
    assert simulated == "simulated 2"
    remedy = "not installed: pip install 'fedhyper-jax[all]'"
    doors, commands = lines[: len(DOORS)], lines[len(DOORS) :]
    for line, missing in zip(doors, DOORS.values(), strict=True):
        assert line.endswith(f" needs {missing}, {remedy}"), line
    packages = DOORS["fh.load_run"]
    assert commands == [f"2 fedhyper: error: the command fedhyper needs {packages}, {remedy}"] * 2


@pytest.mark.parametrize("command", ["data", "run"])
def test_commands_without_the_package_of_a_data_set_say_so(command, monkeypatch, tmp_path, capsys):
    from fedhyper_jax.shell.cli import main

    monkeypatch.chdir(tmp_path)
    for module in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Without(finder, {"sklearn"}) for finder in sys.meta_path])
    assert main([command, "--data", "digits"]) == 2
    line = "fedhyper: error: the data set digits needs sklearn, not installed: pip install 'fedhyper-jax[all]'\n"
    assert capsys.readouterr() == ("", line)


def test_extras():
    """`all` brings all that any part of the package asks for, `test` that and what the tests need, and none is dead."""
    extras = PROJECT["project"]["optional-dependencies"]
    assert names(PROJECT["project"]["dependencies"]) == CORE
    everything = ProjectMetadata(str(ROOT), PluginManager(), PROJECT).core.optional_dependencies
    asked_for = {"flax", "tensorflow-datasets", "chex"}
    assert names(everything["all"]) >= names(everything["cli"]) | names(everything["data"]) | asked_for
    assert names(everything["test"]) >= names(everything["all"])
    assert set(extras) == {"models", "data", "cli", "all", "tensorflow", "test"}
    assert "--editable '.[test]'" in (ROOT / "Makefile").read_text()


def test_the_shell_asks_for_what_its_extra_brings():
    from fedhyper_jax.shell.command import PACKAGES

    extras = ProjectMetadata(str(ROOT), PluginManager(), PROJECT).core.optional_dependencies
    owners = importlib.metadata.packages_distributions()
    brought = names(extras["cli"])
    assert len(PACKAGES) == len(brought)
    assert all(brought & {canonicalize_name(owner) for owner in owners[package]} for package in PACKAGES)


# ------------------------------------------------------------------------------------------------------ the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The one that pip builds."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel):
    package = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedhyper_jax").rglob("*.py")}
    assert package == tracked | {"fedhyper_jax/py.typed"}
    (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(entry).decode().split("\n")[:2] == [
        "[console_scripts]",
        "fedhyper = fedhyper_jax.shell.command:main",
    ]


def targets(page):
    """Pictures and links of a Markdown page, as (whether a picture, address)."""
    return [(mark == "!", address) for mark, address in re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", page)]


def test_the_page_of_an_index_has_no_relative_address(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    page = Parser().parsestr(wheel.read(metadata).decode())
    assert page["Description-Content-Type"] == "text/markdown"
    assert "Paper, https://arxiv.org/abs/2310.03156" in page.get_all("Project-URL")
    assert [address for _, address in targets(page.get_payload()) if not address.startswith("https://")] == []
    assert "docs/overview.png" in page.get_payload()  # shown, or named


@pytest.mark.parametrize("repository", ["https://example.org/somebody/fedhyper", "https://example.org/a/b/", None])
def test_pictures_and_links_of_the_page_follow_the_repository(repository):
    """They are complete once its address is known; before that no picture and no link leads nowhere."""
    urls = {"Paper": "https://arxiv.org/abs/2310.03156"} | ({"Repository": repository} if repository else {})
    settings = {**PROJECT, "project": {**PROJECT["project"], "urls": urls}}
    page = ProjectMetadata(str(ROOT), PluginManager(), settings).core.readme
    everywhere = targets((ROOT / "README.md").read_text())
    relative = [target for target in everywhere if not target[1].startswith("https://")]
    assert (True, "docs/overview.png") in relative
    absolute = [target for target in targets(page) if "example.org" in target[1]]
    kind = {True: "raw", False: "blob"}
    if repository is None:
        assert targets(page) == [target for target in everywhere if target not in relative]
        assert all(address in page for _, address in relative)
    else:
        base = repository.rstrip("/")
        assert absolute == [(picture, f"{base}/{kind[picture]}/HEAD/{address}") for picture, address in relative]
