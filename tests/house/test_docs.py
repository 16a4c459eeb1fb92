"""Every Python snippet of the guide runs."""

import pathlib
import re

import numpy as np
import pytest

from tests.helpers import in_a_new_process

DOCS = pathlib.Path(__file__).parents[2] / "docs"
SNIPPETS = [
    (page.name, snippet)
    for page in sorted(DOCS.glob("*.md"))
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
]


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(SNIPPETS)])
def test_snippet(page, snippet):
    if "use_all_cores" in snippet:
        losses = in_a_new_process(f"{snippet}\nprint(*history.info.client_loss)").split()
        assert np.isfinite(np.array(losses, float)).all() and len(losses) == 3
        return
    names = {}
    exec(compile(snippet, page, "exec"), names)
    if "history" in names:
        assert np.isfinite(names["history"].info.client_loss).all()


def test_the_guide_has_snippets():
    assert [page for page, _ in SNIPPETS].count("scaling.md") == 2
