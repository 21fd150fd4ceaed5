"""What the site is made of: every public name and optimizer has its place, and snippets run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fusedopt
from tools.site import ROOT
from tools.site.root_pages import from_docs

PAGES = ROOT / "docs" / "optimizers"
PUBLIC = {
    name
    for name, x in vars(fusedopt).items()
    if not name.startswith("_") and not isinstance(x, ModuleType)
}
OPTIMIZERS = {
    name
    for name in PUBLIC
    if inspect.isclass(x := getattr(fusedopt, name)) and issubclass(x, torch.optim.Optimizer)
}
each_optimizer = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


def text_of(name: str) -> str:
    return (PAGES / f"{name.lower()}.md").read_text()


def test_every_optimizer_has_a_page_and_every_page_an_optimizer() -> None:
    pages = {page.stem for page in PAGES.glob("*.md")} - {"index"}
    assert pages == {name.lower() for name in OPTIMIZERS}


def test_every_public_name_is_documented() -> None:
    """The optimizers by the template of their pages, all others by docs/api.md."""
    reference = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^\.\. auto\w+:: fusedopt\.(\w+)$", reference, re.MULTILINE))
    assert documented | OPTIMIZERS >= PUBLIC
    assert len(PUBLIC) >= 19
    linked = set(re.findall(r"\[`(\w+)`\]\(optimizers/", reference))
    assert linked == OPTIMIZERS


def test_every_integration_is_documented() -> None:
    reference = (ROOT / "docs" / "api.md").read_text()
    for module in (ROOT / "python/fusedopt/integrations").glob("[a-z]*.py"):
        for name in re.findall(r"^(?:class|def) ([A-Za-z]\w*)", module.read_text(), re.MULTILINE):
            assert f":: fusedopt.integrations.{module.stem}.{name}\n" in reference, name


@each_optimizer
def test_the_defaults_that_a_page_explains_are_those_of_the_class(name: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| .+ \|$", text_of(name), re.MULTILINE)
    parameters = inspect.signature(getattr(fusedopt, name)).parameters
    explained = {argument: eval(default) for argument, default in rows}
    assert explained == {argument: parameters[argument].default for argument in explained}
    assert explained.keys() == set(parameters) - OF_ALL


# Arguments of many optimizers, which their pages need not explain one by one.
OF_ALL = {"params", "optimizer", "maximize", "foreach", "fused", "capturable", "differentiable"}
OF_ALL |= set(inspect.signature(fusedopt._base.Fused).parameters)


@each_optimizer
def test_the_snippet_of_a_page_runs(name: str) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", text_of(name), re.DOTALL)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
    known: dict[str, Any] = {"fusedopt": fusedopt, "torch": torch, "model": model}
    exec(compile(snippet, f"docs/optimizers/{name.lower()}.md", "exec"), known)
    model(torch.randn(2, 4)).square().mean().backward()
    known["optimizer"].step()


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.name)
def test_links_of_optimizers_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
        assert (PAGES / target).exists(), target


def test_links_of_the_root_lead_to_the_pages_of_the_site() -> None:
    text = "[a](docs/choosing.md#x) ![b](docs/b.png) [c](csrc/c.h) [d](CHANGELOG.md#top) [e](#e)"
    expected = "[a](choosing.md#x) ![b](b.png) [c](../csrc/c.h) [d](changes.md#top) [e](#e)"
    assert from_docs(text) == expected
    assert from_docs("[f](f.py) [g](../docs/g.md) [h](https://h.org)", "examples/") == (
        "[f](../examples/f.py) [g](g.md) [h](https://h.org)"
    )
