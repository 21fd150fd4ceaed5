"""Times a step in every memory mode, all in turn: what they cost in time, for docs/memory.md.

``python -m tools.memory_speed`` takes a few minutes and 11 GB, wants a quiet machine, and writes
docs/memory_speed.json, which ``python -m tools.memory_page --write`` puts into the page.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fusedopt
from examples.train_gpt import MEMORY
from fusedopt.bench.contestants import OURS, Contestant
from fusedopt.bench.measure import measure
from fusedopt.bench.modes import Step
from fusedopt.bench.results import machine
from fusedopt.bench.rows import Row

RESULTS = Path(__file__).parent.parent / "docs" / "memory_speed.json"
MODEL = "GPT-2 124M"
ONE_THREAD = "AdamW, 1 thread"
COLUMNS = ("AdamW", ONE_THREAD, "Lion", "SGD")  # the last with momentum, as the benchmark has it
SECONDS = 25.0  # a column
BUSY = 0.15  # a spread that a quiet machine does not have


def contestant(mode: str) -> Contestant:
    """Return fusedopt in a mode; in float32 it is what the others are compared with."""
    dtype, options = MEMORY[mode].dtype, MEMORY[mode].options

    def build(row: Row, params: list[Tensor]) -> Step:
        step: Step = getattr(fusedopt, row.optimizer)(params, **row.arguments, **options).step
        return step

    return Contestant(
        OURS if mode == "float32" else mode,
        lambda row: True,
        build,
        dtype=dtype,
        check=lambda build, row: "",  # the benchmark's own row of the modes looks at numbers
        counted=True,
    )


def column(name: str, model: str = MODEL, seconds: float = SECONDS) -> dict[str, Any]:
    """Measure one column: of each mode, its milliseconds, spread and bytes a parameter."""
    threads = 1 if name == ONE_THREAD else torch.get_num_threads()
    row = Row(model, name.partition(",")[0], threads=threads, device="cpu")
    found = measure(row, [contestant(mode) for mode in MEMORY], budget=seconds)
    timings = {OURS if mode == "float32" else mode: mode for mode in MEMORY}
    return {
        "row": found.row,
        "limit": found.limit_gigabytes_per_second,
        "modes": {timings[t.name]: asdict(t) for t in found.timings},
    }


def table(results: dict[str, Any]) -> list[str]:
    """How many times as fast as float32, and what bytes alone would make of it."""
    columns = results["columns"]
    lines = [
        f"| times as fast as `float32` | by bytes | {' | '.join(columns)} |",
        f"|---|--:|{'--:|' * len(columns)}",
    ]
    first = next(iter(columns.values()))["modes"]
    for mode in first:
        by_bytes = first["float32"]["bytes_a_parameter"] / first[mode]["bytes_a_parameter"]
        faster = [
            c["modes"]["float32"]["milliseconds"] / c["modes"][mode]["milliseconds"]
            for c in columns.values()
        ]
        lines.append(f"| `{mode}` | {by_bytes:.2f} | {' | '.join(f'{x:.2f}' for x in faster)} |")
    took = ", ".join(f"{c['modes']['float32']['milliseconds']:.0f} ms" for c in columns.values())
    samples = min(t["samples"] for c in columns.values() for t in c["modes"].values())
    apart = max(t["spread"] for c in columns.values() for t in c["modes"].values())
    facts = results["machine"]
    return [
        *lines,
        "",
        f"{MODEL} shapes, {facts['threads']} threads where nothing else is said, medians of "
        f"{samples} rounds and more in which all modes step in turn, quartiles up to {apart:.0%} "
        f"of the median apart; `float32` took {took}. "
        f"*By bytes* is what moving fewer of them would give AdamW if nothing else took time. "
        f"{facts['processor']}, {facts['instruction set']}, torch {facts['torch']}.",
    ]


def busy(results: dict[str, Any]) -> list[str]:
    """Return what was measured while something else ran."""
    return [
        f"{name}, {mode}: spread {timing['spread']:.0%}"
        for name, c in results["columns"].items()
        for mode, timing in c["modes"].items()
        if timing["spread"] > BUSY
    ]


def main() -> None:
    results: dict[str, Any] = {"machine": machine("cpu"), "columns": {}}
    for name in COLUMNS:
        print(f"measuring {name}", flush=True)
        results["columns"][name] = column(name)
    print("\n".join(table(results)))
    if noise := busy(results):
        print("the machine was busy:", *noise, sep="\n  ")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
