"""Writes what docs/memory.md and README.md say of memory: bytes of live tensors, and losses.

    python -m tools.memory_page [--write]

Without ``--write``, a block that is not what this makes is an error; the growth of a process,
which is never twice the same, may be off by GROWTH_WITHIN then. The losses are those of
docs/memory.json, which tools/memory_quality.py measures, and the times those of
docs/memory_speed.json, which tools/memory_speed.py does.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from examples.train_gpt import MEMORY
from tools import memory_quality, memory_speed
from tools.blocks import rewrite

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "memory.md", ROOT / "README.md"

SIDE = 1024  # of the matrix whose bytes are counted
LARGE = 6144  # of that whose memory is measured: 38 million elements
GROWTH_WITHIN = 0.1  # bytes an element

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": lambda params, **kwargs: fusedopt.SGD(params, lr=1e-3, **kwargs),
    "SGD, momentum": lambda params, **kwargs: fusedopt.SGD(params, lr=1e-3, momentum=0.9, **kwargs),
    "Adagrad": fusedopt.Adagrad,
    "RMSprop": fusedopt.RMSprop,
    "RMSprop, momentum, centered": lambda params, **kwargs: fusedopt.RMSprop(
        params, momentum=0.9, centered=True, **kwargs
    ),
    "Adam": fusedopt.Adam,
    "AdamW": fusedopt.AdamW,
    "AdamW, amsgrad": lambda params, **kwargs: fusedopt.AdamW(params, amsgrad=True, **kwargs),
    "RAdam": fusedopt.RAdam,
    "Lion": fusedopt.Lion,
    "Lookahead(AdamW)": lambda params, **kwargs: fusedopt.Lookahead(
        fusedopt.AdamW(params, **kwargs)
    ),
}


class Bytes(NamedTuple):
    """Of one element, once a step has made the states."""

    parameter: float
    gradient: float
    states: float
    moved: float

    @property
    def kept(self) -> float:
        return self.parameter + self.gradient + self.states


def _matrix(mode: str, side: int) -> Parameter:
    p = Parameter(torch.ones(side, side, dtype=MEMORY[mode].dtype))
    p.grad = torch.full_like(p, 0.01)
    return p


def count(optimizer: str, mode: str) -> Bytes:
    """Count the bytes of a large matrix and of what belongs to it."""
    return count_of(OPTIMIZERS[optimizer], mode)


def count_of(make: Callable[..., Any], mode: str, side: int = SIDE) -> Bytes:
    """Do so with any optimizer, which is made of parameters and the options of the mode."""
    p = _matrix(mode, side)
    assert p.grad is not None
    made = make([p], **MEMORY[mode].options)
    made.step()
    state = {key: x.nbytes for key, x in made.state[p].items() if isinstance(x, Tensor)}
    states = sum(state.values())
    moved = p.grad.nbytes + 2 * (p.nbytes + states)  # all but the gradient is written, too
    if isinstance(made, fusedopt.Lookahead):  # which touches its weights in every k-th step
        moved -= int(2 * state["slow"] * (1 - 1 / made.k))
    each = (x / p.numel() for x in (p.nbytes, p.grad.nbytes, states, moved))
    return Bytes(*each)


def text(number: float) -> str:
    """Write a number of bytes with two digits behind the point, where they say something."""
    return f"{number:.2f}".rstrip("0").rstrip(".")


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in [header, rule, *rows]]


# ---- the blocks ----------------------------------------------------------------------------------


def each() -> list[str]:
    """Every optimizer and mode."""
    rows = []
    for optimizer in OPTIMIZERS:
        counts = [count(optimizer, mode) for mode in MEMORY]
        rows.append([optimizer, *(f"{text(n.kept)} / {text(n.moved)}" for n in counts)])
    return table(["kept / moved", *(f"`{mode}`" for mode in MEMORY)], rows)


def modes() -> list[str]:
    """What AdamW keeps in every mode."""
    header = ["mode", "model", "arguments", "parameter", "gradient", "states", "kept", "moved"]
    rows = []
    for mode, memory in MEMORY.items():
        n = count("AdamW", mode)
        numbers = (n.parameter, n.gradient, n.states, n.kept, n.moved)
        dtype = str(memory.dtype).removeprefix("torch.")
        rows.append([f"`{mode}`", dtype, _arguments(memory.options), *map(text, numbers)])
    return table(header, rows)


def _arguments(options: dict[str, Any]) -> str:
    written = (f"{name}={str(x) if x != 'mxfp8' else repr(x)}" for name, x in options.items())
    return ", ".join(f"`{each}`" for each in written).replace("'", '"') or "none"


HEADLINE = {
    "float32": "as torch",
    "exact": "the bits of float32 training, for the same gradients",
    "exact-mxfp8": "exact weights, moments in 8 bits",
    "random-mxfp8": "the least; weights rounded up or down at random",
}


def headline() -> list[str]:
    """Return the table of the README."""
    rows = []
    for mode, what in HEADLINE.items():
        n, memory = count("AdamW", mode), MEMORY[mode]
        dtype = str(memory.dtype).removeprefix("torch.")
        rows.append(
            [
                f"{dtype} model, {_arguments(memory.options)}" if memory.options else dtype,
                text(n.kept),
                text(n.kept - n.gradient),
                what,
            ]
        )
    return table(["AdamW", "bytes a parameter", "gradients released", "weights"], rows)


def losses() -> list[str]:
    return memory_quality.table(json.loads(memory_quality.RESULTS.read_text()))


def times() -> list[str]:
    return memory_speed.table(json.loads(memory_speed.RESULTS.read_text()))


def growth() -> list[str]:
    """How much a process grows by a large AdamW, beside what its tensors have."""
    rows = []
    for mode in MEMORY:
        grown = grow_in_a_process(mode)
        rows.append([f"`{mode}`", text(count("AdamW", mode).kept), f"{grown:.2f}"])
    lines = table(["mode", "tensors", "process"], rows)
    return [*lines, "", f"Bytes an element; a matrix of {LARGE:,} x {LARGE:,}, two steps."]


# ---- the memory of a process ---------------------------------------------------------------------


def grow_in_a_process(mode: str, side: int = LARGE) -> float:
    """Return by how many bytes an element a new process grows at most: Linux only."""
    command = [sys.executable, "-m", "tools.memory_page", "--grow", mode, str(side)]
    return float(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def _grow(mode: str, side: int) -> float:
    fusedopt.AdamW([_matrix(mode, 64)], **MEMORY[mode].options).step()  # what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # lets the peak begin anew
    before = _peak()
    p = _matrix(mode, side)
    optimizer = fusedopt.AdamW([p], **MEMORY[mode].options)
    for _ in range(2):
        optimizer.step()
    return (_peak() - before) / p.numel()


def _peak() -> int:
    """Return the most memory that this process has had, in bytes."""
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(peak)


# ---- pages ---------------------------------------------------------------------------------------

# Those that are the same on every machine, and where they are.
BLOCKS: list[tuple[Path, str, Callable[[], list[str]]]] = [
    (PAGE, "modes", modes),
    (PAGE, "each", each),
    (PAGE, "losses", losses),
    (PAGE, "times", times),
    (README, "memory", headline),
]


def block(page: Path, name: str) -> list[str]:
    """Return the lines of a block of a page."""
    _, begin, rest = page.read_text().partition(f"<!-- begin {name} -->\n")
    body, end, _ = rest.partition(f"<!-- end {name} -->")
    if not begin or not end:
        raise SystemExit(f"{page.name} has no block {name}")
    return body.splitlines()


def stale() -> list[str]:
    """Return the names of the blocks that are not what this makes."""
    return [name for page, name, make in BLOCKS if block(page, name) != make()]


def main() -> None:
    if sys.argv[1:2] == ["--grow"]:
        print(_grow(sys.argv[2], int(sys.argv[3])))
    elif sys.argv[1:] == ["--write"]:
        for page, name, make in BLOCKS:
            rewrite(page, name, make())
        rewrite(PAGE, "growth", growth())
        memory_quality.draw(json.loads(memory_quality.RESULTS.read_text()))
    elif names := stale():
        raise SystemExit(f"not up to date: {names}; run python -m tools.memory_page --write")


if __name__ == "__main__":
    main()
