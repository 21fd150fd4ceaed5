"""Measure and draw what docs/choosing.md shows: its pictures, and its blocks marked begin and end.

python -m tools.make_guide
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

import fusedopt
from examples import landscape, train_digits
from examples.train_digits import RECIPES
from fusedopt.bench.results import machine
from fusedopt.bench.rows import Row, parameters
from tools.blocks import rewrite

DOCS = Path(__file__).parent.parent / "docs"
CYCLE, CYCLES = 5, 5  # every fifth step of Lookahead does more


def state_tensors(optimizer: Optimizer, params: list[Tensor]) -> int:
    return sum(key != "step" for key in optimizer.state[params[0]])


def costs() -> list[str]:
    """Step times of all optimizers, interleaved; they share parameters and gradients."""
    row = Row("GPT-2 124M", "AdamW")
    params = parameters(row)
    optimizers = {name: make([{"params": params}]) for name, make in RECIPES.items()}
    for optimizer in optimizers.values():  # makes the state, and touches every page of it
        optimizer.step()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in tqdm(range(CYCLE * CYCLES), desc="costs", leave=False, disable=None):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            times[name].append(1e3 * (time.perf_counter() - began))
    lines = [
        "| | state tensors | bytes kept a parameter | bytes moved a parameter | ms a step |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, optimizer in optimizers.items():
        states = state_tensors(optimizer, params)
        kept, moved = 4 + 4 * states, 12.0 + 8 * states
        if isinstance(optimizer, fusedopt.Lookahead):  # which moves one of them now and then
            moved += 8 / optimizer.k - 8
        lines.append(f"| {name} | {states} | {kept} | {moved:g} | {_median(times[name])} |")
    facts = machine("cpu")
    lines += [
        "",
        f"Medians of {CYCLES} cycles of {CYCLE} interleaved steps, {row.numel / 1e6:.0f} million "
        f"parameters: {facts['processor']}, {facts['instruction set']}, {facts['threads']} threads,"
        f" torch {facts['torch']}.",
    ]
    return lines


def _median(times: list[float]) -> str:
    """Return the mean over a cycle of the medians over all cycles."""
    cycle = [statistics.median(times[step::CYCLE]) for step in range(CYCLE)]
    return f"{statistics.fmean(cycle):.0f}"


def digits() -> list[str]:
    """Train with every optimizer, and draw the losses."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        runs, accuracies = train_digits.train_each(list(RECIPES), train_digits.Settings(), out)
        train_digits.draw(runs, out / "losses.png")
        shutil.copy(out / "losses.png", DOCS / "digits.png")
    lines = ["| | held-out accuracy | epochs | s in `step` |", "|---|--:|--:|--:|"]
    for run, accuracy in zip(runs, accuracies, strict=True):
        lines.append(f"| {run.name} | {accuracy:.1%} | {run.epoch} | {run.seconds_in_step:.2f} |")
    return lines


def main() -> None:
    landscape.draw(500, DOCS / "landscape.png")
    rewrite(DOCS / "choosing.md", "costs", costs())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rewrite(DOCS / "choosing.md", "digits", digits())
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
