"""Pages whose text is that of a file in the root of the repository, and of a notebook."""

from __future__ import annotations

import json
import posixpath
import re
from typing import TYPE_CHECKING, Any

from tools.site import ROOT

if TYPE_CHECKING:  # tests of the texts do without it
    from sphinx.application import Sphinx

# What a page begins with: docs/NAME.md has what the site alone needs, such as its contents.
TEXTS = {
    "index": "README.md",
    "changes": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "tour": "examples/tour.ipynb",
}

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s]+)")


def from_docs(text: str, folder: str = "") -> str:
    """Return a text of the root, or of a folder in it, with links as from docs/."""
    return _LINK.sub(lambda link: _from_docs(folder + link[1]), text)


def _from_docs(target: str) -> str:
    path, mark, anchor = target.partition("#")
    path = posixpath.normpath(path)
    for page, file in TEXTS.items():
        if path == file:
            return f"{page}.md{mark}{anchor}"
    inside = path.removeprefix("docs/")
    return f"{inside if inside != path else f'../{path}'}{mark}{anchor}"


def from_notebook(notebook: dict[str, Any]) -> str:
    """Return the cells of a notebook as Markdown, with what they printed and drew."""
    return "\n\n".join(part for cell in notebook["cells"] for part in _parts(cell))


def _parts(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    parts = [f"```python\n{source}\n```"]
    if text := printed(cell):
        parts.append(f"```{{code-block}} none\n:class: output\n\n{text}\n```")
    for output in cell["outputs"]:
        if picture := output.get("data", {}).get("image/png"):
            data = "".join(picture).replace("\n", "")
            parts.append(f"![what the cell has drawn](data:image/png;base64,{data})")
    return parts


def printed(cell: dict[str, Any]) -> str:
    """Return what a cell of code has printed."""
    return "".join(line for output in cell["outputs"] for line in output.get("text", ())).rstrip()


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the text ahead of what the page itself has."""
    path = TEXTS.get(docname)
    if path is None:
        return
    app.env.note_dependency(str(ROOT / path))
    text = (ROOT / path).read_text()
    if path.endswith(".ipynb"):
        text = from_notebook(json.loads(text))
    folder = path.rpartition("/")[0]
    own = source[0].partition("<!-- here -->")[2]
    source[0] = f"{from_docs(text, f'{folder}/' if folder else '')}\n\n{own}"


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
