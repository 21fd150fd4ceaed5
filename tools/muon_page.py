"""Trains the demo's GPT with AdamW and with MuonWithAuxAdam: the picture and table of docs/muon.md.

``python -m tools.muon_page`` takes some ten minutes on two cores, and writes docs/muon.json,
docs/muon.png and a block of docs/muon.md; with ``--write`` it draws again what the first has.

Both optimizers are tuned by the same search, with a seed of its own: the learning rates of RATES,
and further ones until the best of both is between others. All else is the same: weight decay,
schedule, clipping, batches, start.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import fusedopt
from examples import train_gpt
from tools import small_gpt
from tools.blocks import rewrite

DOCS = Path(__file__).parent.parent / "docs"
PAGE, RESULTS, PICTURE = DOCS / "muon.md", DOCS / "muon.json", DOCS / "muon.png"

RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)  # to begin with
WEIGHT_DECAY, BETAS = 0.1, (0.9, 0.95)
SEEDS, SEARCH_SEED = 4, 100
STEPS, TESTS = 350, 35
OPTIMIZERS = {"AdamW": "#1f77b4", "MuonWithAuxAdam": "#d62728"}


Search = dict[str, dict[float, float]]  # of each optimizer: the last loss with a learning rate


class Run(NamedTuple):
    """One training."""

    optimizer: str
    lr: float
    seed: int


def make_optimizer(name: str, model: torch.nn.Module, lr: float) -> Any:
    options: dict[str, Any] = {
        **{"lr": lr, "weight_decay": WEIGHT_DECAY, "betas": BETAS},
        "max_grad_norm": train_gpt.CLIP,
    }
    if name == "AdamW":
        return fusedopt.AdamW(fusedopt.decay_groups(model), **options)
    return fusedopt.MuonWithAuxAdam(fusedopt.muon_groups(model), **options)


def train(run: Run) -> list[float]:
    """The held-out losses: of the same start and batches with both optimizers."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    model = small_gpt.make()
    optimizer = make_optimizer(run.optimizer, model, run.lr)
    return small_gpt.held_out_losses(model, optimizer, run.seed, STEPS, TESTS)


def best_rate(losses: dict[float, float]) -> float:
    return min(losses, key=lambda lr: math.inf if math.isnan(losses[lr]) else losses[lr])


def rates_beyond(search: Search) -> set[float]:
    """Return learning rates that are still to be tried: beside a best one that is at an edge."""
    found: set[float] = set()
    for losses in search.values():
        best = best_rate(losses)
        if best == max(losses):
            found.add(2 * best)
        if best == min(losses):
            found.add(best / 2)
    return found


def measure(workers: int = 2) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(workers) as pool:

        def losses_of(runs: list[Run]) -> list[list[float]]:
            return list(tqdm(pool.imap(train, runs), total=len(runs), unit="run"))

        search: Search = {name: {} for name in OPTIMIZERS}
        rates: set[float] = set(RATES)
        while rates:
            tried = [Run(name, lr, SEARCH_SEED) for name in OPTIMIZERS for lr in sorted(rates)]
            for run, losses in zip(tried, losses_of(tried), strict=True):
                search[run.optimizer][run.lr] = losses[-1]
            rates = rates_beyond(search)
        best = {name: best_rate(found) for name, found in search.items()}
        runs = [Run(name, best[name], seed) for seed in range(SEEDS) for name in OPTIMIZERS]
        found: dict[str, list[list[float]]] = {name: [] for name in OPTIMIZERS}
        for run, losses in zip(runs, losses_of(runs), strict=True):
            found[run.optimizer].append(losses)
    return {
        "weights": small_gpt.weights(),
        "steps": STEPS,
        "torch": torch.__version__,
        "search": {name: sorted(losses.items()) for name, losses in search.items()},
        "lr": best,
        "losses": found,  # of each seed, at equal distances
    }


# ---- the table and the picture -------------------------------------------------------------------


def steps_to(losses: list[float], level: float, steps: int) -> int | None:
    """Return the first step that was tested at which a loss is at this level, or below."""
    for i, loss in enumerate(losses, 1):
        if loss <= level:
            return i * steps // len(losses)
    return None


def reached(results: dict[str, Any]) -> list[int | None]:
    """Return, for each seed, in how many steps Muon has reached AdamW's last loss."""
    adamw, muon = (results["losses"][name] for name in OPTIMIZERS)
    return [steps_to(m, a[-1], results["steps"]) for a, m in zip(adamw, muon, strict=True)]


def table(results: dict[str, Any]) -> list[str]:
    lines = [
        "| | lr, of the search | held-out loss | steps to AdamW's last loss, seed by seed |",
        "|---|--:|--:|--:|",
    ]
    steps = results["steps"]
    tried = ", ".join(f"{lr:g}" for lr, _ in results["search"]["AdamW"])
    for name in OPTIMIZERS:
        last = [losses[-1] for losses in results["losses"][name]]
        took = ", ".join(str(each or "not") for each in reached(results))
        lines.append(
            f"| `{name}` | {results['lr'][name]:g} "
            f"| {statistics.fmean(last):.4f} ± {statistics.stdev(last):.4f} "
            f"| {steps if name == 'AdamW' else took} |"
        )
    lines += [
        "",
        f"Nats a byte, mean ± standard deviation over {len(last)} seeds: the GPT of "
        f"[`examples/train_gpt.py`](../examples/train_gpt.py) with {results['weights']:,} weights, "
        f"{steps} steps, tested every {steps // len(results['losses'][name][0])}; "
        f"`weight_decay={WEIGHT_DECAY}, betas={BETAS}`, warm-up and cosine, clipped at "
        f"{train_gpt.CLIP:g}; each tuned over lr {tried} with another seed; "
        f"torch {results['torch']}.",
    ]
    return lines


def draw(results: dict[str, Any], path: Path = PICTURE) -> None:
    """The search on the left; losses of all seeds on the right."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in OPTIMIZERS.items():
        rates, losses = zip(*results["search"][name], strict=True)
        left.plot(rates, losses, "o-", color=colour, label=name)
        runs = np.array(results["losses"][name])
        at = np.arange(1, runs.shape[1] + 1) * results["steps"] / runs.shape[1]
        for run in runs:
            right.plot(at, run, color=colour, lw=0.6, alpha=0.5)
        right.plot(at, runs.mean(axis=0), color=colour, lw=2.2, label=name)
    level = float(np.mean([run[-1] for run in results["losses"]["AdamW"]]))
    right.axhline(level, color="#1f77b4", lw=0.8, ls="--")
    mean = np.mean(results["losses"]["MuonWithAuxAdam"], axis=0)
    if (step := steps_to(list(mean), level, results["steps"])) is not None:
        right.axvline(step, color="#d62728", lw=0.8, ls="--")
    right.set_ylim(float(mean[-1]) - 0.05, float(mean[1]))
    left.set_xscale("log")
    left.set_xticks(rates, labels=[f"{lr:g}" for lr in rates])
    left.minorticks_off()
    left.set(title="The search: last loss of one seed", xlabel="lr")
    right.set(title="Held-out loss, each seed and their mean", xlabel="training step")
    left.set_ylabel("cross-entropy (nats per byte)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle("A small GPT on the Python standard library, both optimizers tuned alike")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="draw again what was measured before")
    if not parser.parse_args().write:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    draw(results)
    rewrite(PAGE, "training", table(results))
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
