"""What a type checker sees of the package: pyright, as basedpyright packs it."""

import json
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]

RULES = {"typeCheckingMode": "standard", "reportUnnecessaryTypeIgnoreComment": "error"}
"""Pyright's own defaults, and ignore comments that ignore something (typed_use.py)."""


def pyright(*arguments, folder):
    """Its report, from outside of the repository, where only what is installed is found."""
    places = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", *arguments],
        cwd=folder,
        env=os.environ | {"PATH": places},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def pages():
    """Pages of the guide, and the README, with their Python snippets."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        yield page, re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)


def test_what_users_write_has_no_errors(tmp_path):
    """typed_use.py, and every snippet of README and guide; those of a page that builds on itself in one file."""
    for page, snippets in pages():
        snippets = ["\n".join(snippets)] if page.name == "extending.md" else snippets
        for number, snippet in enumerate(snippets):
            (tmp_path / f"{page.stem}_{number}.py").write_text(snippet)
    (tmp_path / "typed_use.py").write_text((ROOT / "tests" / "house" / "typed_use.py").read_text())
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(RULES))
    report = pyright("--pythonpath", sys.executable, folder=tmp_path)
    assert report["summary"]["filesAnalyzed"] == len(list(tmp_path.glob("*.py")))
    errors = [
        f"{pathlib.Path(found['file']).name}:{found['range']['start']['line'] + 1}: {found['message']}"
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    ]
    assert not errors, "\n".join(errors)


def test_every_public_type_is_known(tmp_path):
    """Of every function, class and constant that can be imported: annotated, and nothing in it unknown."""
    found = pyright("--verifytypes", "fedhyper_jax", "--ignoreexternal", folder=tmp_path)["typeCompleteness"]
    assert pathlib.Path(found["packageRootDirectory"]).samefile(ROOT / "fedhyper_jax") and found["pyTypedPath"]
    unknown = [symbol["name"] for symbol in found["symbols"] if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]]
    assert not unknown, "\n".join(unknown)
    assert found["completenessScore"] == 1 and found["exportedSymbolCounts"]["withKnownType"] > 2000
