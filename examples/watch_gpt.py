"""Watch the training of a small GPT: what each step does to each layer, in one picture.

The model and the text are those of `train_gpt.py`. It is trained three times, with the same
batches: in bfloat16 with float32 masters, which is healthy; in plain bfloat16, whose weights
stand still once updates are less than half a digit; and with masters again, but with one layer
that has died: the perceptron of block 1 gets biases so low that nothing comes through. All that
is drawn is `optimizer.statistics`, of every fifth step.

    python -m examples.watch_gpt --out docs/watching.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import fusedopt
from examples.train_gpt import BATCH, CLIP, CONTEXT, GPT, load_text, schedule_for, windows

EVERY = 5  # steps
RECIPE: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


class Watched(NamedTuple):
    """Of a run: the names of its parameters, and a row a step of each vector, a loss a step."""

    names: list[str]
    update_ratio: Tensor
    grad_norm: Tensor
    unmoved: Tensor
    losses: list[float]


def groups_of(model: GPT) -> list[dict[str, Any]]:
    """Named parameters, so that the statistics have names; only matrices decay."""
    named = list(model.named_parameters())
    return [
        {"params": [(name, p) for name, p in named if p.ndim > 1]},
        {"params": [(name, p) for name, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]


def train(steps: int, title: str, *, dead: bool = False, **options: Any) -> Watched:
    torch.manual_seed(0)
    model = GPT()
    if dead:
        torch.nn.init.constant_(model.blocks[1].up.bias, -20.0)  # type: ignore[arg-type,union-attr]  # a Block
    model.to(torch.bfloat16)
    optimizer = fusedopt.AdamW(
        groups_of(model), **RECIPE, max_grad_norm=CLIP, track_statistics=EVERY, **options
    )
    schedule = schedule_for(optimizer, steps)
    text, _ = load_text()
    random = np.random.default_rng(0)
    found: list[Any] = []
    losses = []
    for step in tqdm(range(1, steps + 1), desc=title, unit="step"):
        starts = random.integers(0, len(text) - CONTEXT, size=BATCH)
        loss = model.loss(*windows(text, starts))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % EVERY == 0:
            found.append(optimizer.statistics)
    ratio, norm, unmoved = (
        torch.stack([getattr(statistics, vector) for statistics in found])
        for vector in ("update_ratio", "grad_norm", "unmoved_share")
    )
    return Watched(found[0].names, ratio, norm, unmoved, losses)


# --- The picture -----------------------------------------------------------------------


def in_order_of_layers(names: list[str]) -> list[int]:
    """Matrices and the weights of norms, from the input to the output."""
    layers = ["token", "position", *(f"blocks.{i}" for i in range(9)), "norm", "head"]
    parts = ["norm1", "qkv", "out", "norm2", "up", "down"]

    def place(name: str) -> tuple[int, int]:
        layer = next(i for i, each in enumerate(layers) if name.startswith(each))
        return layer, next((i for i, part in enumerate(parts) if f".{part}." in name), 0)

    chosen = [i for i, name in enumerate(names) if name.endswith("weight")]
    return sorted(chosen, key=lambda i: place(names[i]))


def heat_map(
    axes: Axes, names: list[str], numbers: Tensor, title: str, limits: tuple[float, float]
) -> None:
    rows = in_order_of_layers(names)
    picture: npt.NDArray[np.float64] = numbers[:, rows].clamp(min=1e-12).log10().T.numpy()
    image = axes.imshow(
        picture,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        vmin=limits[0],
        vmax=limits[1],
        extent=(0, EVERY * len(numbers), len(rows) - 0.5, -0.5),
    )
    axes.set_yticks(range(len(rows)), [names[i].removesuffix(".weight") for i in rows], fontsize=6)
    axes.set(title=title, xlabel="training step")
    figure: Any = axes.figure
    figure.colorbar(image, ax=axes, label="power of ten", pad=0.01)


def draw(healthy: Watched, plain: Watched, dead: Watched, path: Path) -> None:
    figure = Figure(figsize=(13, 10), layout="constrained")
    (a, b), (c, d) = figure.subplots(2, 2)
    ratios = (-5.0, -1.0)
    for axes, run, title in (
        (a, healthy, "Update to weight, with masters: each layer learns"),
        (b, plain, "Update to weight, plain bfloat16: norms never do, the rest stops"),
    ):
        heat_map(axes, run.names, run.update_ratio, title, ratios)
    heat_map(c, dead.names, dead.grad_norm, "Gradient norm: block 1 has a dead perceptron", (-5, 0))
    steps = range(EVERY, EVERY * len(plain.unmoved) + 1, EVERY)
    for name, colour in (
        ("blocks.0.norm1.weight", "#1b3a6b"),
        ("blocks.0.qkv.weight", "#f5ad62"),
        ("blocks.3.up.weight", "#b5483a"),
        ("head.weight", "#4d9078"),
    ):
        share = plain.unmoved[:, plain.names.index(name)]
        d.plot(steps, 100 * share, color=colour, label=name)
    d.set(title="Plain bfloat16: weights that a step leaves as they are", xlabel="training step")
    d.set(ylabel="% of the elements", ylim=(0, 102))
    d.legend(loc="center left")
    d.grid(alpha=0.3)
    figure.suptitle("A small GPT, watched: optimizer.statistics of every fifth step")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, help="threads for torch (default: its own choice)")
    parser.add_argument("--out", type=Path, default=Path("watch_gpt.png"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    healthy = train(args.steps, "with masters", master_weights=True)
    plain = train(args.steps, "plain bfloat16")
    dead = train(args.steps, "with a dead layer", master_weights=True, dead=True)
    for title, run in (("with masters", healthy), ("plain", plain), ("dead layer", dead)):
        print(f"{title:<14} loss of the last 20 steps: {np.mean(run.losses[-20:]):.4f}")
    print(f"weights that the last step left as they were, plain: {plain.unmoved[-1].mean():.0%}")
    draw(healthy, plain, dead, args.out)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
