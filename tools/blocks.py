"""Blocks of a page that a program makes, between a comment that begins one and one that ends it."""

from __future__ import annotations

import re
from pathlib import Path


def rewrite(page: Path, block: str, lines: list[str]) -> None:
    """Replace what stands between the two comments that name the block."""
    begin, end = f"<!-- begin {block} -->\n", f"<!-- end {block} -->"
    text = page.read_text()
    pattern = f"({re.escape(begin)}).*?({re.escape(end)})"
    body = "".join(f"{line}\n" for line in lines)
    page.write_text(re.sub(pattern, lambda m: m[1] + body + m[2], text, flags=re.DOTALL))
