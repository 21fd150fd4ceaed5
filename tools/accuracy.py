"""How near optimizers stay to float64, ours and torch's: docs/accuracy.md and its summary.

``python -m tools.accuracy`` measures that in about half an hour. Each optimizer steps five kinds
of gradients in each dtype, and a textbook formula in float64 steps the same gradients.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import fusedopt

DOCS = pathlib.Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- accuracy: begin -->\n", "<!-- accuracy: end -->\n"

STEPS = (100, 10_000, 100_000)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("constant", "nearly constant", "decaying", "spiking", "random")
SIZE = 64  # elements of each kind, whose gradients are of sizes from 0.02 to 7
SPIKE = 100  # times as large as others is every 97th of the spiking gradients


class Case(NamedTuple):
    """An optimizer with arguments, and its formula."""

    name: str
    kwargs: dict[str, Any]
    textbook: Callable[[Any, float], Iterator[dict[str, Any]]]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.kwargs.items())})"


# ---- formulas ------------------------------------------------------------------------------------

# Generators: they are sent gradients and yield what state and parameter are afterwards.
State = dict[str, Any]
Formula = Any


def adam(p: Any, lr: float, decay: float = 0.0, rectify: bool = False) -> Formula:
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    m = v = np.zeros_like(p)
    t = 0
    g = yield {}
    while True:
        t += 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        step, root = m / (1 - beta1**t), np.sqrt(v / (1 - beta2**t))
        if rectify:
            most = 2 / (1 - beta2) - 1
            rho = most - 2 * t * beta2**t / (1 - beta2**t)
            if rho > 5:
                ratio = (rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho)
                corrected = np.sqrt(1 - beta2**t) / (np.sqrt(v) + eps)
                p = p - lr * step * np.sqrt(ratio) * corrected
            else:
                p = p - lr * step
        else:
            p = p - lr * decay * p - lr * step / (root + eps)
        g = yield {"p": p, "exp_avg": m, "exp_avg_sq": v}


def rmsprop(p: Any, lr: float, centered: bool = False, alpha: float = 0.99) -> Formula:
    v = mean = variance = np.zeros_like(p)
    g = yield {}
    while True:
        v = alpha * v + (1 - alpha) * g * g
        # What v - mean * mean is, without taking the difference of two nearly equal numbers.
        variance = alpha * (variance + (1 - alpha) * (g - mean) ** 2)
        mean = mean + (1 - alpha) * (g - mean)
        p = p - lr * g / (np.sqrt(variance if centered else v) + 1e-8)
        g = yield {"p": p, "square_avg": v, **({"grad_avg": mean} if centered else {})}


def momentum(p: Any, lr: float, mu: float) -> Formula:
    buf = np.zeros_like(p)
    g = yield {}
    while True:
        buf = mu * buf + g
        p = p - lr * buf
        g = yield {"p": p, "momentum_buffer": buf}


def adagrad(p: Any, lr: float) -> Formula:
    total = np.zeros_like(p)
    g = yield {}
    while True:
        total = total + g * g
        p = p - lr * g / (np.sqrt(total) + 1e-10)
        g = yield {"p": p, "sum": total}


def lion(p: Any, lr: float, decay: float) -> Formula:
    m = np.zeros_like(p)
    g = yield {}
    while True:
        p = p - lr * decay * p - lr * np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        g = yield {"p": p, "exp_avg": m}


CASES = [
    Case("SGD", {"lr": 0.01, "momentum": 0.9}, lambda p, lr: momentum(p, lr, 0.9)),
    Case("SGD", {"lr": 0.001, "momentum": 0.999}, lambda p, lr: momentum(p, lr, 0.999)),
    Case("Adam", {"lr": 0.001}, adam),
    Case("AdamW", {"lr": 1e-5}, lambda p, lr: adam(p, lr, decay=0.01)),
    Case("RAdam", {"lr": 0.001}, lambda p, lr: adam(p, lr, rectify=True)),
    Case("RMSprop", {"lr": 0.01}, rmsprop),
    Case("RMSprop", {"lr": 0.01, "centered": True}, lambda p, lr: rmsprop(p, lr, centered=True)),
    Case("Adagrad", {"lr": 0.01}, adagrad),
    Case("Lion", {"lr": 1e-4, "weight_decay": 0.01}, lambda p, lr: lion(p, lr, 0.01)),
]


# ---- measuring -----------------------------------------------------------------------------------


def gradients(seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the gradients of step 1, 2, ..., all kinds one after the other, and their sizes."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(SIZE, generator=generator, dtype=torch.float64)

    size = torch.exp(6 * torch.rand(SIZE, generator=generator, dtype=torch.float64) - 4)
    size = size * normal().sign()
    t = 0
    while True:
        t += 1
        spike = SPIKE if t % 97 == 50 else 1.0
        kinds = [
            (size, size),
            (size * (1 + 1e-3 * normal()), size),
            (size / (1 + t / 100), size / (1 + t / 100)),
            (size * spike * normal(), size),
            (size * normal(), size),
        ]
        yield torch.cat([g for g, _ in kinds]), torch.cat([s.abs() for _, s in kinds])


class Error(NamedTuple):
    """The largest relative error over the elements of one kind, and how many are NaN."""

    size: float
    nan: int


def contestants(case: Case, start: Tensor) -> dict[str, tuple[Tensor, Any]]:
    """Return a parameter and its optimizer for each implementation that there is."""
    makers: dict[str, Callable[[Any], Any]] = {
        "fusedopt": lambda p: getattr(fusedopt, case.name)([p], **case.kwargs)
    }
    torch_class = getattr(torch.optim, case.name, None)
    if torch_class is not None:
        makers["loop"] = lambda p: torch_class([p], foreach=False, **case.kwargs)
        if case.name in ("SGD", "Adam", "AdamW", "Adagrad"):
            makers["fused"] = lambda p: torch_class([p], fused=True, **case.kwargs)
    made: dict[str, tuple[Tensor, Any]] = {}
    for name, make in makers.items():
        p = torch.nn.Parameter(start.clone())
        made[name] = (p, make(p))
    return made


def errors_of(
    found: dict[str, Tensor], true: State, start: Tensor, sizes: Tensor
) -> dict[str, list[Error]]:
    """Return the errors of the parameter and its states, by kind.

    Of squares, relative to them; of averages of signed gradients, which may cancel, at least to the
    size of a gradient; of parameters, at least to the way that they went.
    """
    errors = {}
    for key, value in found.items():
        expected = torch.from_numpy(true[key])
        least = torch.zeros_like(expected)
        if key == "p":
            least = (expected - start.double()).abs()
        elif key in ("exp_avg", "grad_avg", "momentum_buffer"):
            least = sizes
        scale = torch.maximum(expected.abs(), least).clamp(min=1e-300)
        relative = ((value.detach().double() - expected).abs() / scale).reshape(-1, SIZE)
        errors[key] = [
            Error(x.nan_to_num(nan=0, posinf=math.inf).max().item(), int(x.isnan().sum()))
            for x in relative
        ]
    return errors


Results = dict[tuple[int, str], dict[str, list[Error]]]


@np.errstate(all="ignore")  # what float16 cannot hold is infinite in the formulas as well
def measure(case: Case, dtype: torch.dtype, steps: tuple[int, ...]) -> Results:
    """Return errors by (step, implementation)."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(SIZE * len(KINDS), generator=generator, dtype=torch.float64).to(dtype)
    made = contestants(case, start)
    textbook = case.textbook(start.double().numpy(), case.kwargs["lr"])
    next(textbook)
    results: Results = {}
    for t, (gradient, sizes) in zip(range(1, max(steps) + 1), gradients(), strict=False):
        stored = gradient.to(dtype)
        true = textbook.send(stored.double().numpy())  # type: ignore[attr-defined]
        for name, (p, optimizer) in made.items():
            p.grad = stored.clone()
            optimizer.step()
            if t in steps:
                states = {k: v for k, v in optimizer.state[p].items() if k != "step"}
                results[t, name] = errors_of({"p": p, **states}, true, start, sizes)
    return results


# ---- the pages -----------------------------------------------------------------------------------


class Cell(NamedTuple):
    """Ours, beside the better of torch's loop and fused; None where torch has no such optimizer."""

    ours: Error
    torch: Error | None

    def __str__(self) -> str:
        return _text(self.ours) + (f" ({_text(self.torch)})" if self.torch else "")

    @property
    def ratio(self) -> float:
        """How many times as far as torch's ours is from float64; NaN counts as infinitely far."""
        assert self.torch is not None
        ours, others = (math.inf if e.nan else e.size for e in (self.ours, self.torch))
        return 1.0 if ours == others else ours / others if others else math.inf


def _text(error: Error) -> str:
    if error.nan:
        return f"{error.nan} NaN"
    return (
        "inf"
        if math.isinf(error.size)
        else f"{error.size:.0e}".replace("e-0", "e-").replace("e+0", "e")
    )


def cells(result: Results, t: int, key: str) -> list[Cell]:
    others = [result[t, name][key] for name in ("loop", "fused") if (t, name) in result]
    return [
        Cell(ours, min((o[i] for o in others), key=lambda e: (e.nan, e.size), default=None))
        for i, ours in enumerate(result[t, "fusedopt"][key])
    ]


def table(results: dict[str, Results], steps: Sequence[int]) -> str:
    """Return the rows of one dtype."""
    lines = [
        "| optimizer | of | steps | " + " | ".join(KINDS) + " |",
        "|---|---|--:|" + "---|" * len(KINDS),
    ]
    for case, result in results.items():
        for key in result[steps[0], "fusedopt"]:
            name = "parameter" if key == "p" else f"`{key}`"
            for t in steps:
                row = " | ".join(map(str, cells(result, t, key)))
                lines.append(f"| {case} | {name} | {t:,} | {row} |")
    return "\n".join(lines) + "\n"


def summary(all_results: dict[str, dict[str, Results]], steps: Sequence[int]) -> str:
    """Return how often ours is nearer to float64 than the better of torch's, and how often not."""
    lines = [
        "| dtype | compared | torch has NaN, we do not | we have NaN, torch does not "
        "| nearer, 1.5 times and more | farther, 1.5 times and more | farthest |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for dtype, results in all_results.items():
        found = {
            f"{case}, {key}, {kind}, {t:,} steps": cell
            for case, result in results.items()
            for key in result[steps[0], "fusedopt"]
            for t in steps
            for kind, cell in zip(KINDS, cells(result, t, key), strict=True)
            if cell.torch
        }
        kept = [c for c in found.values() if c.torch and c.torch.nan and not c.ours.nan]
        lost = [c for c in found.values() if c.torch and c.ours.nan and not c.torch.nan]
        nearer = [c for c in found.values() if c.ratio < 1 / 1.5 and c not in kept]
        farther = [c for c in found.values() if c.ratio > 1.5 and c not in lost]
        worst = max(found, key=lambda name: found[name].ratio)
        lines.append(
            f"| {dtype} | {len(found)} | {len(kept)} | {len(lost)} | {len(nearer)} "
            f"| {len(farther)} | {found[worst]}: {worst} |"
        )
    return "\n".join(lines) + "\n"


HEAD = f"""# How near to float64

The largest relative error over {SIZE} elements against the optimizer's formula in float64, which
gets the same gradients, after as many steps. In brackets the better of torch's for-loop and fused.
Errors of squares are relative to them; of averages of signed gradients, which may cancel, at least
to the size of a gradient; of parameters, at least to the way that they went. Parameters, gradients
and states all have the dtype. What it sums up to: [Numerics](numerics.md#how-near-to-float64).

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    all_results: dict[str, dict[str, Results]] = {}
    for name, dtype in DTYPES.items():
        for case in CASES:
            print(name, case, flush=True)
            all_results.setdefault(name, {})[str(case)] = measure(case, dtype, tuple(steps))
    version = torch.__version__.split("+")[0]
    measured = f"Measured by `python -m tools.accuracy` with torch {version}.\n"
    tables = [f"\n## {name}\n\n{table(results, steps)}" for name, results in all_results.items()]
    (DOCS / "accuracy.md").write_text(HEAD + measured + "".join(tables))
    page = DOCS / "numerics.md"
    block = f"{BEGIN}{summary(all_results, steps)}\n{measured}{END}"
    page.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: block, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
