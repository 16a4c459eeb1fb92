"""The README as a package index shows it: there a relative address leads nowhere."""

import pathlib
import re
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")
"""A picture or a link with a relative address."""


def for_an_index(text: str, repository: str | None) -> str:
    """Completes the relative addresses of a Markdown page, or does without them.

    Args:
      text: the page, as it stands in the repository.
      repository: its address on the web, ``[project.urls]`` Repository of pyproject.toml; None while there is none.
        Then pictures and links become words that name the file, which is part of the source distribution.
    """

    def absolute(link: re.Match) -> str:
        picture, words, target = link.groups()
        if repository is None:
            if picture:
                return f"*[Picture {target} of the source distribution: {words}]*"
            return words if words == target else f"{words} ({target})"
        return f"{picture}[{words}]({repository.rstrip('/')}/{'raw' if picture else 'blob'}/HEAD/{target})"

    return LINK.sub(absolute, text)


class ReadmeHook(MetadataHookInterface):
    """Hatchling asks it for the fields that ``dynamic`` in pyproject.toml names."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Sets the readme."""
        text = pathlib.Path(self.root, "README.md").read_text(encoding="utf-8")
        text = for_an_index(text, metadata.get("urls", {}).get("Repository"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
