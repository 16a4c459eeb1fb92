"""Every Python snippet of the guide runs; those of a page that builds on itself in one go."""

import pathlib
import re

import numpy as np
import pytest

from tests.helpers import in_a_new_process

DOCS = pathlib.Path(__file__).parents[2] / "docs"
JOINED = ("extending.md",)
"""Pages whose snippets build on each other."""


SEQUENTIAL = {
    'strategy="chunked(10)"': 'strategy="sequential"',
    'cohort.sharded("chunked(5)")': 'cohort.sharded("sequential")',
    "work=work": 'work=work, strategy="sequential"',
}
"""The one is the other several clients at a time (test_strategies.py), and compiles half as fast."""


def snippets_of(page):
    found = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    return ["\n".join(found)] if page.name in JOINED else found


SNIPPETS = [(page.name, snippet) for page in sorted(DOCS.glob("*.md")) for snippet in snippets_of(page)]


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(SNIPPETS)])
def test_snippet(page, snippet):
    for given, quick in SEQUENTIAL.items():
        snippet = snippet.replace(given, quick)
    if "use_all_cores" in snippet:
        losses = in_a_new_process(f"{snippet}\nprint(*history.info.client_loss)").split()
        assert np.isfinite(np.array(losses, float)).all() and len(losses) == 3
        return
    names = {}
    exec(compile(snippet, page, "exec"), names)
    if "history" in names:
        assert np.isfinite(names["history"].info.client_loss).all()


def test_extending_checks_what_it_says():
    """Each of its three parts is asserted something of, in the snippet itself."""
    ((_, snippet),) = [(page, snippet) for page, snippet in SNIPPETS if page == "extending.md"]
    for name in ("grow_or_shrink", "median", "half_done"):
        assert f"def {name}(" in snippet
    assert snippet.count("\nassert ") >= 8


def test_the_guide_has_snippets():
    pages = [page for page, _ in SNIPPETS]
    assert pages.count("scaling.md") == 2 and pages.count("extending.md") == 1
