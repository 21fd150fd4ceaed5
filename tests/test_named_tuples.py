"""What the engine reads by position has the order that Python gives it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fusedopt._engine import Group, Scaling
from fusedopt._spikes import Watch

STEP = Path(__file__).parent.parent / "csrc" / "step"
OTHER_NAMES = {"has_no_sign": "unsigned"}


@pytest.mark.parametrize(
    ("header", "tuples"), [("group.h", Group), ("asked.h", Scaling), ("spikes.h", Watch)]
)
def test_fields_are_read_in_their_order(
    header: str, tuples: type[Group] | type[Scaling] | type[Watch]
) -> None:
    text = (STEP / header).read_text()
    read = re.findall(r"(\w+)(?:\s*=\s*|\{)fields_\.next<", text)
    assert tuple(OTHER_NAMES.get(name, name) for name in read) == tuples._fields
