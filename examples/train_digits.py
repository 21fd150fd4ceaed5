"""A complete training run to start your own from: scikit-learn's images of handwritten digits.

Everything that a real run needs is here once: a split into training, validation and held-out
images, a mask for weight decay, schedules, clipping, early stop, a checkpoint of the best epoch
that a later run resumes, and a progress bar. Early stop and checkpoint look at the validation
images alone, so the accuracy on the held-out ones is an honest one.

    python examples/train_digits.py --optimizer Lion --schedule cosine
    python examples/train_digits.py --optimizer Lion --schedule cosine --resume
    python examples/train_digits.py --all     # every optimizer: one picture, one table
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from tqdm import tqdm

import fusedopt

Groups = list[dict[str, Any]]

# Starting values for images, those of docs/choosing.md.
RECIPES: dict[str, Callable[[Groups], Any]] = {
    "SGD": lambda groups: fusedopt.SGD(groups, lr=0.1, weight_decay=5e-4),
    "momentum": lambda groups: fusedopt.SGD(groups, lr=0.02, momentum=0.9, weight_decay=5e-4),
    "Nesterov": lambda groups: fusedopt.SGD(
        groups, lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4
    ),
    "Adagrad": lambda groups: fusedopt.Adagrad(groups, lr=0.01),
    "RMSprop": lambda groups: fusedopt.RMSprop(groups, lr=1e-3, weight_decay=1e-5),
    "Adam": lambda groups: fusedopt.Adam(groups, lr=1e-3, weight_decay=1e-5),
    "AdamW": lambda groups: fusedopt.AdamW(groups, lr=1e-3, weight_decay=0.05),
    "RAdam": lambda groups: fusedopt.RAdam(
        groups, lr=1e-3, weight_decay=0.05, decoupled_weight_decay=True
    ),
    "Lion": lambda groups: fusedopt.Lion(groups, lr=2e-4, weight_decay=0.25),
    "Lookahead(AdamW)": lambda groups: fusedopt.Lookahead(
        fusedopt.AdamW(groups, lr=2e-3, weight_decay=0.05)
    ),
}

# ---- the images ----------------------------------------------------------------------------------


class Split(NamedTuple):
    images: Tensor
    labels: Tensor


def load_splits() -> tuple[Split, Split, Split]:
    """Training, validation and held-out images: the same for every run, digits in proportion."""
    digits = load_digits()
    pixels, labels = digits.images[:, None] / 16.0, digits.target
    rest, *held_out = _split(pixels, labels)
    training, *validation = _split(*rest)
    return tuple(  # type: ignore[return-value]  # of three
        Split(torch.tensor(x, dtype=torch.float32), torch.tensor(y))
        for x, y in (training, *validation, *held_out)
    )


def _split(pixels: Any, labels: Any) -> tuple[Any, Any]:
    parts = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    return (parts[0], parts[2]), (parts[1], parts[3])


# ---- the model -----------------------------------------------------------------------------------


def make_model() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def parameter_groups(model: nn.Module) -> Groups:
    """Weight decay is for the weights that multiply: not for biases, nor for scales of norms."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim >= 2]},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


# ---- schedule ------------------------------------------------------------------------------------


def make_schedule(name: str, optimizer: Optimizer, steps: int) -> LRScheduler:
    """One of torch's schedules over so many steps; plateau alone is stepped by epochs."""
    warmup = max(1, steps // 10)
    makers: dict[str, Callable[[], LRScheduler]] = {
        "constant": lambda: ConstantLR(optimizer, factor=1.0),
        "step": lambda: StepLR(optimizer, step_size=max(1, steps // 3), gamma=0.1),
        "cosine": lambda: CosineAnnealingLR(optimizer, T_max=steps),
        "plateau": lambda: ReduceLROnPlateau(optimizer, factor=0.3, patience=2),
        "warmup-cosine": lambda: SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
                CosineAnnealingLR(optimizer, T_max=max(1, steps - warmup)),
            ],
            milestones=[warmup],
        ),
    }
    return makers[name]()


SCHEDULES = ("constant", "step", "cosine", "plateau", "warmup-cosine")


# ---- training ------------------------------------------------------------------------------------


# What a checkpoint has of a run.
PARTS = ("model", "optimizer", "schedule")
NUMBERS = ("epoch", "best_loss", "best_epoch", "training_losses", "validation_losses")


@dataclass
class Run:
    """One training run and what was measured on the way."""

    name: str
    model: nn.Module
    optimizer: Any  # an Optimizer with what fusedopt adds to it
    schedule: LRScheduler
    epoch: int = 0
    best_loss: float = math.inf
    best_epoch: int = 0
    training_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    seconds_in_step: float = 0.0

    def save(self, path: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in PARTS}
        torch.save({**parts, **{name: getattr(self, name) for name in NUMBERS}}, path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name in PARTS:
            getattr(self, name).load_state_dict(saved[name])
        for name in NUMBERS:
            setattr(self, name, saved[name])


@dataclass(frozen=True)
class Settings:
    epochs: int = 30
    batch: int = 32
    schedule: str = "warmup-cosine"
    max_norm: float = 5.0
    patience: int = 8
    seed: int = 0


def start(name: str, settings: Settings, training: Split) -> Run:
    torch.manual_seed(settings.seed)  # every optimizer starts from the same weights
    model = make_model()
    optimizer = RECIPES[name](parameter_groups(model))
    optimizer.max_grad_norm = settings.max_norm  # clips inside of step()
    steps = settings.epochs * math.ceil(len(training.labels) / settings.batch)
    return Run(name, model, optimizer, make_schedule(settings.schedule, optimizer, steps))


def train_epoch(run: Run, settings: Settings, training: Split) -> float:
    """Show every training image once, and return the mean loss."""
    # The order depends on the epoch alone, so that a resumed run sees what it would have seen.
    generator = torch.Generator().manual_seed(1000 * settings.seed + run.epoch)
    order = torch.randperm(len(training.labels), generator=generator)
    run.model.train()
    total = 0.0
    for first in range(0, len(order), settings.batch):
        chosen = order[first : first + settings.batch]
        loss = F.cross_entropy(run.model(training.images[chosen]), training.labels[chosen])
        run.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        began = time.perf_counter()
        run.optimizer.step()
        run.seconds_in_step += time.perf_counter() - began
        if not isinstance(run.schedule, ReduceLROnPlateau):
            run.schedule.step()
        total += loss.item() * len(chosen)
    return total / len(training.labels)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Return the mean loss and the accuracy."""
    model.eval()
    logits = model(split.images)
    accuracy = (logits.argmax(1) == split.labels).float().mean()
    return F.cross_entropy(logits, split.labels).item(), accuracy.item()


def train(run: Run, settings: Settings, splits: tuple[Split, Split, Split], best: Path) -> float:
    """Train until the validation loss stops falling; return the held-out accuracy at its best."""
    training, validation, held_out = splits
    progress = tqdm(total=settings.epochs, initial=run.epoch, desc=f"{run.name:<16}", unit="epoch")
    while run.epoch < settings.epochs and run.epoch - run.best_epoch < settings.patience:
        run.training_losses.append(train_epoch(run, settings, training))
        loss, accuracy = evaluate(run.model, validation)
        run.validation_losses.append(loss)
        if isinstance(run.schedule, ReduceLROnPlateau):
            run.schedule.step(loss)
        run.epoch += 1
        if loss < run.best_loss:
            run.best_loss, run.best_epoch = loss, run.epoch
            run.save(best)
        progress.update()
        norm = run.optimizer.grad_norm.item()
        progress.set_postfix_str(f"validation {loss:.4f}, {accuracy:.1%}; gradient norm {norm:.2g}")
    progress.close()
    model = make_model()
    model.load_state_dict(torch.load(best, weights_only=True)["model"])
    return evaluate(model, held_out)[1]


# ---- all optimizers ------------------------------------------------------------------------------


def train_each(
    names: list[str], settings: Settings, out: Path, resume: bool = False
) -> tuple[list[Run], list[float]]:
    """Train with each optimizer; return the runs and their held-out accuracies."""
    splits = load_splits()
    runs, accuracies = [], []
    for name in names:
        run, best = start(name, settings, splits[0]), out / f"{name}.pt"
        if resume:
            run.load(best)
        runs.append(run)
        accuracies.append(train(run, settings, splits, best))
    return runs, accuracies


def print_table(runs: list[Run], accuracies: list[float]) -> None:
    print(f"\n{'optimizer':<16}{'held-out accuracy':>18}{'epochs':>8}{'best':>6}{'s in step':>11}")
    for run, accuracy in zip(runs, accuracies, strict=True):
        print(
            f"{run.name:<16}{accuracy:>18.1%}{run.epoch:>8}{run.best_epoch:>6}"
            f"{run.seconds_in_step:>11.2f}"
        )


def draw(runs: list[Run], path: Path) -> None:
    """All loss curves, training on the left and validation on the right."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    colours = ["#8c8c8c", "#4c9be8", "#1b3a6b", "#e3a008", "#f26b38", "#9b2226", "#ff5c8a"]
    colours += ["#8e44ad", "#2a9d5c", "#00b3a4"]
    for number, (run, colour) in enumerate(zip(runs, colours, strict=False)):
        style = {"color": colour, "lw": 1.6, "ls": "--" if number % 3 == 2 else "-"}
        for side, losses in zip(axes, (run.training_losses, run.validation_losses), strict=True):
            side.plot(range(1, len(losses) + 1), losses, label=run.name, **style)
    for side, title in zip(axes, ("Training loss", "Validation loss"), strict=True):
        side.set(title=title, xlabel="epoch", yscale="log")
        side.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("cross-entropy (nats)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle("Handwritten digits: one model, one schedule, every optimizer")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optimizer", choices=RECIPES, default="AdamW")
    parser.add_argument("--all", action="store_true", help="train with every optimizer")
    parser.add_argument("--schedule", choices=SCHEDULES, default=Settings.schedule)
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--max-norm", type=float, default=Settings.max_norm, help="for clipping")
    parser.add_argument("--patience", type=int, default=Settings.patience)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--resume", action="store_true", help="go on from the best checkpoint")
    parser.add_argument("--out", type=Path, default=Path("train_digits"), help="folder of results")
    args = parser.parse_args()
    settings = Settings(
        epochs=args.epochs,
        schedule=args.schedule,
        max_norm=args.max_norm,
        patience=args.patience,
        seed=args.seed,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # images this small leave nothing for a second one to do
    names = list(RECIPES) if args.all else [args.optimizer]
    runs, accuracies = train_each(names, settings, args.out, args.resume)
    print_table(runs, accuracies)
    draw(runs, args.out / "losses.png")
    print(f"picture: {args.out / 'losses.png'}")


if __name__ == "__main__":
    main()
