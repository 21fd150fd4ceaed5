"""Links to files of the repository lead to pages of the site that show them.

In docs/ they are relative paths, which lead to the file on a code host and on a disk. MyST takes
them as downloads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

from tools.site import ROOT
from tools.site.root_pages import TEXTS

FOLDER = "source"


class LinksToSources(SphinxTransform):  # type: ignore[misc]  # mypy does not see Sphinx
    """Turns what MyST takes as downloads into links."""

    default_priority = 500

    def apply(self, **_: Any) -> None:
        """Do it in one document, and keep in mind the files that it links to."""
        shown = self.env.metadata[self.env.docname].setdefault("sources", [])
        for node in list(self.document.findall(addnodes.download_reference)):
            file = ROOT / "docs" / self.env.relfn2path(node["reftarget"])[0]
            path = os.path.relpath(file, ROOT)
            page = next((page for page, text in TEXTS.items() if text == path), None)
            if page is None:
                page = f"{FOLDER}/{path}"
                shown.append(path)
            uri = self.app.builder.get_relative_uri(self.env.docname, page)
            node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield a page for each file that documents link to."""
    paths = {path for data in app.env.metadata.values() for path in data.get("sources", ())}
    for path in sorted(paths):
        text = (ROOT / path).read_text()
        lexer = get_lexer_for_filename(path).aliases[0]
        code = app.builder.highlighter.highlight_block(text, lexer)
        yield f"{FOLDER}/{path}", {"title": path, "body": f"<h1>{path}</h1>{code}"}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(LinksToSources)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
