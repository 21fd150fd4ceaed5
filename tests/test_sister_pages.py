"""docs/adding_a_codec.md and its sister: the files and names that they mention exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fusedopt

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "docs" / f"adding_{what}.md" for what in ("a_codec", "an_instruction_set")]
ROWS = [
    (page, *row)
    for page in PAGES
    for row in re.findall(r"^\| `(.+?)` \| `(\w+)` \|", page.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(
    ("page", "file", "name"), ROWS, ids=lambda x: x.stem if isinstance(x, Path) else x
)
def test_each_place_exists(page: Path, file: str, name: str) -> None:
    assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), (
        f"{page.name}: {file} has no {name}"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_the_prose_quotes_exists(page: Path) -> None:
    prose = re.sub(r"^\|.*\n", "", page.read_text(), flags=re.MULTILINE)
    files = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")]
    source = "\n".join(path.read_text() for path in files)
    for quoted in re.findall(r"`([\w/.]+)`", prose):
        exists = (ROOT / quoted).exists() or re.search(rf"\b{quoted}\b", source)
        assert exists or hasattr(fusedopt, quoted), quoted


def test_the_tables_cover_each_switch_over_dtypes() -> None:
    """A file that names a 16-bit dtype has a row in the page on codecs."""
    rows = {file for page, file, _ in ROWS if page.stem == "adding_a_codec"}
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and re.search(r"DType::f16|RawTensor::f16|\bFloat16\b", path.read_text()):
            name = path.relative_to(ROOT).as_posix()
            assert name in rows | {"csrc/numeric/vec.h"}, name
