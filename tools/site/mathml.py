"""Formulas as MathML, which browsers draw by themselves: no script, and nothing to fetch."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml import converter
from sphinx.application import Sphinx
from sphinx.util.math import wrap_displaymath


def _convert(latex: str, display: str) -> str:
    # (A word is one operator: of \mathrm it would make a letter each, with gaps between them.)
    return str(converter.convert(latex.replace(r"\mathrm", r"\operatorname"), display=display))


def visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_convert(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    # Lines that end in \\ are aligned, as Sphinx does it for TeX.
    latex = wrap_displaymath(node.astext(), None, False).strip()
    latex = latex.removeprefix(r"\begin{equation*}").removesuffix(r"\end{equation*}").strip()
    translator.body.append(f'<div class="math">{_convert(latex, "block")}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
