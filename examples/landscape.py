"""The paths of the optimizers over two functions of two variables, in one picture.

Rosenbrock's valley is curved and flat; Beale's has steep walls and a long, level floor. Every
optimizer starts at the same point and takes the same number of steps.

    python examples/landscape.py --out landscape.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

import fusedopt

Points = npt.NDArray[np.float64]


class Landscape(NamedTuple):
    name: str
    height: Callable[[Any, Any], Any]
    start: tuple[float, float]
    minimum: tuple[float, float]
    window: tuple[float, float, float, float]
    """Left, right, bottom, top."""


def rosenbrock(x: Any, y: Any) -> Any:
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def beale(x: Any, y: Any) -> Any:
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


LANDSCAPES = [
    Landscape("Rosenbrock", rosenbrock, (-1.5, 2.0), (1.0, 1.0), (-2.0, 2.0, -0.8, 3.0)),
    Landscape("Beale", beale, (0.5, -1.3), (3.0, 0.5), (-0.2, 4.2, -1.8, 1.4)),
]


class Walker(NamedTuple):
    """An optimizer, with a learning rate for each landscape that suits it there."""

    make: Callable[[list[Tensor], float], Optimizer]
    rates: tuple[float, float]
    colour: str


# Three panels, from the oldest ideas to the newest.
PANELS: list[dict[str, Walker]] = [
    {
        "SGD": Walker(lambda p, lr: fusedopt.SGD(p, lr=lr), (0.001, 0.01), "#7f7f7f"),
        "momentum": Walker(
            lambda p, lr: fusedopt.SGD(p, lr=lr, momentum=0.9), (0.001, 0.003), "#1f77d0"
        ),
        "Nesterov": Walker(
            lambda p, lr: fusedopt.SGD(p, lr=lr, momentum=0.9, nesterov=True),
            (0.001, 0.003),
            "#d62728",
        ),
    },
    {
        "Adagrad": Walker(lambda p, lr: fusedopt.Adagrad(p, lr=lr), (0.2, 0.5), "#c98a00"),
        "RMSprop": Walker(lambda p, lr: fusedopt.RMSprop(p, lr=lr), (0.01, 0.02), "#d62728"),
        "Adam": Walker(lambda p, lr: fusedopt.Adam(p, lr=lr), (0.1, 0.1), "#1f77d0"),
    },
    {
        "AdamW": Walker(
            lambda p, lr: fusedopt.AdamW(p, lr=lr, weight_decay=0.01), (0.1, 0.1), "#1f77d0"
        ),
        "RAdam": Walker(lambda p, lr: fusedopt.RAdam(p, lr=lr), (0.002, 0.02), "#8e44ad"),
        "Lion": Walker(lambda p, lr: fusedopt.Lion(p, lr=lr), (0.01, 0.005), "#1e8449"),
        "Lookahead(Adam)": Walker(
            lambda p, lr: fusedopt.Lookahead(fusedopt.Adam(p, lr=lr)), (0.1, 0.1), "#e67e22"
        ),
    },
]


def path(
    make: Callable[[list[Tensor], float], Optimizer], lr: float, land: Landscape, steps: int
) -> Points:
    """Return the start and where each step led, one point a row."""
    point = torch.tensor(land.start, dtype=torch.float64, requires_grad=True)
    optimizer = make([point], lr)
    points = [point.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        land.height(point[0], point[1]).backward()
        optimizer.step()
        points.append(point.detach().clone())
    return torch.stack(points).numpy()


def draw_landscape(axes: Axes, land: Landscape) -> None:
    left, right, bottom, top = land.window
    x, y = np.meshgrid(np.linspace(left, right, 300), np.linspace(bottom, top, 300))
    # Heights span five powers of ten.
    height = np.log10(land.height(x, y) + 1e-3)
    axes.contourf(x, y, height, levels=24, cmap="Blues_r", alpha=0.45)
    axes.contour(x, y, height, levels=12, colors="white", linewidths=0.6, alpha=0.7)
    axes.plot(*land.start, "o", color="black", ms=6, zorder=4)
    axes.plot(*land.minimum, "*", color="black", ms=13, zorder=4)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def draw(steps: int, out: Path, panels: Sequence[dict[str, Walker]] = PANELS) -> None:
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.subplots(len(LANDSCAPES), len(panels), squeeze=False)
    for row, land in enumerate(LANDSCAPES):
        for column, panel in enumerate(panels):
            axes = grid[row][column]
            draw_landscape(axes, land)
            for name, walker in panel.items():
                points = path(walker.make, walker.rates[row], land, steps)
                label = f"{name}, lr={walker.rates[row]:g}"
                axes.plot(*points.T, color=walker.colour, lw=1.5, alpha=0.9, label=label)
                axes.plot(*points[-1], "s", color=walker.colour, mec="white", ms=7, zorder=3)
            axes.legend(loc="lower right", fontsize=9, framealpha=0.9)
            axes.set_title(land.name)
    figure.suptitle(f"{steps} steps from the dot; the star is the minimum, a square is the end")
    figure.savefig(out, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("landscape.png"))
    args = parser.parse_args()
    draw(args.steps, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
