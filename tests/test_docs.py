"""The guide: its snippets run, its tables are those of the examples, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.train_digits import RECIPES

DOCS = Path(__file__).parent.parent / "docs"
GUIDE = (DOCS / "choosing.md").read_text()
README = (DOCS.parent / "README.md").read_text()
MEMORY = (DOCS / "memory.md").read_text()

SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


def test_the_snippets_of_the_guide_run_in_order() -> None:
    assert len(SNIPPETS) == GUIDE.count("```python")
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for code in SNIPPETS:
        exec(compile(code, "docs/choosing.md", "exec"), namespace)


def test_the_snippets_on_memory_run_in_order() -> None:
    snippets = re.findall(r"```python\n(.*?)```", MEMORY, re.DOTALL)
    assert len(snippets) == MEMORY.count("```python")
    namespace: dict[str, Any] = {}
    for code in snippets:
        exec(compile(code, "docs/memory.md", "exec"), namespace)


def test_the_snippets_on_spikes_run() -> None:
    text = (DOCS / "spikes.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/spikes.md", "exec"), {})


def test_the_snippets_of_the_readme_run_in_order(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 1)

    def loss_of(model: torch.nn.Module) -> torch.Tensor:
        loss: torch.Tensor = model(torch.ones(2, 3, dtype=next(model.parameters()).dtype)).sum()
        return loss

    namespace: dict[str, Any] = {"model": model, "loss_of": loss_of, "path": tmp_path / "model.pt"}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), namespace)


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("name", RECIPES)
def test_starting_values_are_those_of_the_example(name: str) -> None:
    (vision,) = re.findall(rf"^\| {re.escape(name)} \| `(lr=[^`]*)` ", GUIDE, re.MULTILINE)
    arguments = eval(f"dict({vision})")
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = RECIPES[name]([{"params": [p]}])
    optimizer = getattr(optimizer, "optimizer", optimizer)  # of Lookahead: the wrapped one's
    documented = type(optimizer)([p], **arguments)
    assert optimizer.defaults == documented.defaults


@pytest.mark.parametrize("block", ["costs", "digits"])
def test_tables_have_every_optimizer(block: str) -> None:
    table = GUIDE.split(f"<!-- begin {block} -->\n")[1].split(f"<!-- end {block} -->")[0]
    rows = [cells(line)[0] for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == list(RECIPES)


def anchors(page: Path) -> set[str]:
    """Return what links to the headings of a page end in."""
    return {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        to = DOCS / file if file else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target
