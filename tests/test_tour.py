"""examples/tour.ipynb runs, and prints what it is shown to print."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch

from tools.site import ROOT
from tools.site.root_pages import from_notebook, printed

NOTEBOOK = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def without_figures(text: str) -> str:
    """Leave out what depends on the machine: digits, and names of instruction sets."""
    return re.sub(r"[\d.,]+(e-\d+)?", "#", text.partition(" with kernels for ")[0])


def test_the_cells_run_and_print_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    known: dict[str, Any] = {}
    for number, cell in enumerate(CODE):
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile("".join(cell["source"]), f"tour.ipynb, cell {number}", "exec"), known)
        assert without_figures(out.getvalue().rstrip()) == without_figures(printed(cell))
    assert known["same"]
    assert known["accuracy"](known["model"]) > 0.85
    assert all(bool(p.isfinite().all()) for p in known["small"].parameters())
    assert known["optimizer"].skipped_steps == 1
    known["plt"].close("all")
    assert torch.is_grad_enabled()


def test_it_was_run_from_top_to_bottom() -> None:
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    assert not any(out.get("name") == "stderr" for cell in CODE for out in cell["outputs"])


def test_its_links_lead_somewhere() -> None:
    for cell in NOTEBOOK["cells"]:
        for target in re.findall(r"\]\(([^)\s#]+)", "".join(cell["source"])):
            assert (ROOT / "examples" / target).exists(), target


def test_the_site_shows_code_and_output_and_the_picture() -> None:
    page = from_notebook(NOTEBOOK)
    assert page.count("```python\n") == len(CODE)
    assert page.count("data:image/png;base64,") == 1
    for cell in CODE:
        assert printed(cell) in page
