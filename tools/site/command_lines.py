"""A directive for what a command says of its options."""

from __future__ import annotations

import os
import subprocess
import sys

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class CommandLine(SphinxDirective):  # type: ignore[misc]  # mypy does not see Sphinx
    """``.. command-line:: MODULE`` shows ``python -m MODULE --help``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a block of what it prints."""
        (module,) = self.arguments
        command = [sys.executable, "-m", module, "--help"]
        environ = {**os.environ, "COLUMNS": "84", "NO_COLOR": "1"}
        text = subprocess.run(command, check=True, text=True, env=environ, capture_output=True)
        return [nodes.literal_block(text.stdout, text.stdout, language="none")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
