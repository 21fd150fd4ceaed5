"""Pages of optimizers: a short text each, and what one template makes for all of them.

docs/optimizers/NAME.md begins with data, in YAML:

- ``rule``: its file in csrc/rules;
- ``variants``: names, and expressions that make the optimizer of ``params`` and ``options``;
- ``paths``: walkers of examples/landscape.py to draw; or ``picture``, one that is there already;
- ``what``: what a picture shows, for those who do not see it.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from sphinx.application import Sphinx

import fusedopt
from examples import landscape
from examples.train_gpt import MEMORY
from tools import memory_page
from tools.site import ROOT

PAGES = ROOT / "docs" / "optimizers"
DRAWN = ROOT / "build" / "site-pictures"
TEMPLATE = Path(__file__).with_name("optimizer_page.md")


def optimizers() -> dict[str, type[Any]]:
    """Return what has a page: the public optimizers, by the names of their pages."""
    public = {name.lower(): x for name, x in vars(fusedopt).items() if inspect.isclass(x)}
    return {name: x for name, x in public.items() if issubclass(x, torch.optim.Optimizer)}


def split(page: str) -> tuple[dict[str, Any], str]:
    """Return the data and the text of a page."""
    _, data, text = page.split("---\n", 2)
    return yaml.safe_load(data), text.strip()


# ---- what is kept --------------------------------------------------------------------------------


def variant(name: str, expression: str) -> dict[str, Any]:
    """Return what a variant of an optimizer keeps, in every mode."""

    def make(params: list[Any], **options: Any) -> Any:
        return eval(expression, {"fusedopt": fusedopt, "params": params, "options": options})

    counts = {mode: memory_page.count_of(make, mode, side=128) for mode in MEMORY}
    texts = {
        m: f"{memory_page.text(n.states)} / {memory_page.text(n.kept)}" for m, n in counts.items()
    }
    keys = state_of(make)
    return {
        "name": name,
        "bytes": texts,
        "tensors": ", ".join(f"`{key}`" for key, x in keys.items() if x.ndim) or "nothing",
        "numbers": ", ".join(f"`{key}`" for key, x in keys.items() if not x.ndim) or "none",
    }


def state_of(make: Any) -> dict[str, torch.Tensor]:
    """Return the state of a parameter after a step."""
    p = torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones_like(p)
    optimizer = make([p])
    optimizer.step()
    return {key: x for key, x in optimizer.state[p].items() if isinstance(x, torch.Tensor)}


# ---- where it goes -------------------------------------------------------------------------------


@functools.cache
def walked(name: str, column: int) -> tuple[str, landscape.Points]:
    """Return the label of a walker, and where it went on one of the functions."""
    walkers = {name: walker for panel in landscape.PANELS for name, walker in panel.items()}
    make, rates, _ = walkers[name]
    land, rate = landscape.LANDSCAPES[column], rates[column]
    return f"{name}, lr={rate:g}", landscape.path(make, rate, land, steps=500)


def draw(names: list[str], path: Path) -> None:
    """Draw the paths of some walkers: the last one in colour, on top."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    greys = [{"color": "0.45", "ls": style} for style in ("-", "--")]
    styles = dict(zip(names, [*greys[: len(names) - 1], {"color": "#d62728"}], strict=True))
    for column, axes in enumerate(figure.subplots(1, len(landscape.LANDSCAPES))):
        landscape.draw_landscape(axes, landscape.LANDSCAPES[column])
        for name, style in styles.items():
            label, points = walked(name, column)
            axes.plot(*points.T, label=label, lw=1.5, **style)
            axes.plot(*points[-1], "s", color=style["color"], mec="white", ms=7, zorder=3)
        axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
        axes.set_title(landscape.LANDSCAPES[column].name, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


# ---- the pages -----------------------------------------------------------------------------------


def render(page: str, source: str) -> str:
    """Return what the template makes of a page, and draw its picture."""
    data, text = split(source)
    cls = optimizers()[page]
    if data.get("paths"):
        draw(data["paths"], DRAWN / f"{page}.png")
        *others, last = data["paths"]
        data["what"] = f"Paths of {last}, beside {' and '.join(others)}, over two functions"
    module = inspect.getsourcefile(cls)
    assert module is not None
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        text=text,
        name=cls.__name__,
        rule=data["rule"],
        references=[name for name in dir(cls) if name.endswith("reference")],
        picture=data.get("picture"),
        paths=data.get("paths"),
        what=data.get("what"),
        drawn=f"../../build/site-pictures/{page}.png",
        modes=MEMORY,
        variants=[variant(*each) for each in data["variants"].items()],
        source=f"python/fusedopt/{Path(module).name}",
    )


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    folder, _, page = docname.rpartition("/")
    if folder == "optimizers" and page != "index":
        app.env.note_dependency(str(TEMPLATE))
        source[0] = render(page, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
