"""What a package index shows: README.md, with links that lead somewhere from there.

scikit-build-core asks for it in every build (tool.scikit-build.metadata of pyproject.toml). Links
into the repository lead to the tag of this version under urls.Repository of the project. Without
that line, their text stays without a link, and pictures stay away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURE = r"!\[(?P<alt>[^\]]*)\]\((?P<picture>[^)]+)\)\n*"
LINK = r"\[(?P<text>[^\]]+)\]\((?P<target>[^)]+)\)"
ELSEWHERE = ("http://", "https://", "#")


def long_description(readme: str, repository: str, tag: str) -> str:
    """Return the text with links into the repository at a tag; without a repository, none."""

    def absolute(match: re.Match[str]) -> str:
        picture, target = match["picture"], match["picture"] or match["target"]
        if target.startswith(ELSEWHERE):
            return match[0]
        if not repository:
            return match["text"] or ""
        place = f"{repository.rstrip('/')}/{'raw' if picture else 'blob'}/{tag}"
        return match[0].replace(f"]({target})", f"]({place}/{target})")

    return re.sub(f"{PICTURE}|{LINK}", absolute, readme)


def of_project(key: str) -> str:
    """Return a string of pyproject.toml, which Python 3.10 has no parser for."""
    found = re.search(rf'^{re.escape(key)} = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    return found[1] if found else ""


def dynamic_metadata(field: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the field readme, as scikit-build-core asks a provider for it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = long_description(readme, of_project("urls.Repository"), f"v{of_project('version')}")
    return {"content-type": "text/markdown", "text": text}
