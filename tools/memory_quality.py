"""Trains the demo's GPT in every memory mode: the picture and the losses of docs/memory.md.

``python -m tools.memory_quality`` takes some ten minutes on two cores, and writes docs/memory.json,
which ``python -m tools.memory_page --write`` puts into the page.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from examples import train_gpt
from examples.train_gpt import MEMORY, RECIPES
from tools import small_gpt

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "memory.json"
PICTURE = DOCS / "memory.png"

OPTIMIZER = "AdamW"
SEEDS = 5
STEPS, TESTS = 700, 20
COLOURS = {
    "float32": "#000000",
    "float32-mxfp8": "#8c8c8c",
    "bfloat16": "#d62728",
    "exact": "#1f77b4",
    "exact-bfloat16": "#17a2b8",
    "exact-mxfp8": "#2ca02c",
    "random": "#ff9f1c",
    "random-mxfp8": "#9467bd",
}


def train(job: tuple[str, int]) -> list[float]:
    """The held-out losses of one mode and seed: of the same start and batches in all modes."""
    mode, seed = job
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    start = small_gpt.make()
    model = copy.deepcopy(start).to(MEMORY[mode].dtype)
    optimizer = train_gpt.fused_side(OPTIMIZER, model, start, MEMORY[mode], seed)
    return small_gpt.held_out_losses(model, optimizer, seed, STEPS, TESTS)


def measure(workers: int = 2) -> dict[str, Any]:
    jobs = [(mode, seed) for seed in range(SEEDS) for mode in MEMORY]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        runs = list(tqdm(pool.imap(train, jobs), total=len(jobs), unit="run"))
    losses: dict[str, list[list[float]]] = {mode: [] for mode in MEMORY}
    for (mode, _), run in zip(jobs, runs, strict=True):
        losses[mode].append(run)
    return {
        "weights": small_gpt.weights(),
        "steps": STEPS,
        "torch": torch.__version__,
        "losses": losses,  # of each mode and seed, at equal distances
    }


# ---- the table and the picture -------------------------------------------------------------------


def _spread(values: list[float], digits: str = ".4f") -> str:
    return f"{statistics.fmean(values):{digits}} ± {statistics.stdev(values):.4f}"


def table(results: dict[str, Any]) -> list[str]:
    """Mean and standard deviation over the seeds, and of the differences with equal seeds."""
    lines = [
        "| mode | held-out loss | more than float32 with the same seed |",
        "|---|--:|--:|",
    ]
    last = {mode: [run[-1] for run in runs] for mode, runs in results["losses"].items()}
    for mode, losses in last.items():
        apart = [a - b for a, b in zip(losses, last["float32"], strict=True)]
        more = "" if mode == "float32" else _spread(apart, "+.4f")
        lines.append(f"| `{mode}` | {_spread(losses)} | {more} |")
    seeds = len(last["float32"])
    lines += [
        "",
        f"Nats a byte, mean ± standard deviation over {seeds} seeds: the GPT of "
        f"[`examples/train_gpt.py`](../examples/train_gpt.py) with {results['weights']:,} weights, "
        f"{results['steps']:,} steps of {OPTIMIZER} (`{_recipe()}`), torch {results['torch']}.",
    ]
    return lines


def _recipe() -> str:
    return ", ".join(f"{name}={value}" for name, value in RECIPES[OPTIMIZER].items())


def draw(results: dict[str, Any], path: Path = PICTURE) -> None:
    """Losses on the left; how much more than float32's they are, seed by seed, on the right."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = {mode: np.array(runs) for mode, runs in results["losses"].items()}
    for mode, runs in losses.items():
        at = np.arange(1, runs.shape[1] + 1) * results["steps"] / runs.shape[1]
        style = {"color": COLOURS[mode], "lw": 2.5 if mode in ("float32", "bfloat16") else 1.3}
        left.plot(at, runs.mean(axis=0), label=mode, **style)
        apart = runs - losses["float32"]
        mean, deviation = apart.mean(axis=0), apart.std(axis=0, ddof=1)
        right.plot(at, mean, label=mode, **style)
        right.fill_between(
            at, mean - deviation, mean + deviation, color=COLOURS[mode], alpha=0.12, lw=0
        )
    late = losses["float32"].mean(axis=0)
    left.set_ylim(late[-1] - 0.1, late[1])
    left.set(title="Held-out loss, mean of the seeds", ylabel="cross-entropy (nats per byte)")
    right.set(title="More than float32 with the same seed, ± standard deviation")
    for axes in (left, right):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle("A small GPT on the Python standard library, in every memory mode")
    figure.savefig(path, dpi=110)


def main() -> None:
    results = measure()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(results)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
