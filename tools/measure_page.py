"""Measures the rows of docs/performance.md anew: without --rows, those of PAGE.

    python -m tools.measure_page [--rows TEXT]... [--runs NAME...]

Each row gets a process of its own, so that nothing depends on which contestants came before: how
the allocator treats the temporary arrays of peers does, by a factor of two. What is found replaces
the row of that name, so that one may measure some rows now and others later, on the same machine.
Each machine has files of its own, named after its processor's maker. After that comes a second run,
without overhead, training and scaling, and then two runs of some rows with memory that stays in the
process: see RUNS.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from fusedopt.bench.results import Report, machine, read
from fusedopt.bench.rows import MODELS, optimizers

DOCS = Path(__file__).parent.parent / "docs"
BENCH = [sys.executable, "-m", "fusedopt.bench", "--scaling"]
ONCE = ("memory:", "overhead:", "training:", "scaling:")  # parts of which there is no second run

CLIPPED = ("GPT-2 124M", "ResNet-50", "LoRA r16 of a 7B model", "YOLOv8 n", "1000 x 1K")

# The rows of the page, on all threads and on one.
PAGE = {
    *(
        f"{model}, {each}"
        for model in ("GPT-2 124M", "1 x 100M", "10 x 1M")
        for each in optimizers()
    ),
    *(f"{model}, AdamW" for model in MODELS),
    *(f"{model}, AdamW, clip" for model in CLIPPED),
    *(f"GPT-2 124M, {each}, clip" for each in ("SGD", "RMSprop", "Lion")),
    "GPT-2 124M, AdamW, GradScaler and clip",
    "GPT-2 124M, AdamW, bfloat16",
    "10 x 1M, AdamW, bfloat16",
    "GPT-2 124M, AdamW, clip, bfloat16",
    "GPT-2 124M, Lion, bfloat16",
}
ON_ONE_THREAD = {"GPT-2 124M, AdamW", "10 x 1M, AdamW", "1000 x 1K, AdamW"}

# Some rows whose peers have large temporary arrays. glibc returns such memory to the kernel after
# each step, and what it takes to get it anew changes from hour to hour; with KEEP, it does not.
KEPT = {"GPT-2 124M, AdamW", "GPT-2 124M, RMSprop", "GPT-2 124M, Lion", "ResNet-50, AdamW"}
KEEP = {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000"}


class Run(NamedTuple):
    """What is measured for a file."""

    suffix: str
    has: Callable[[str], bool]
    environment: dict[str, str]

    def path(self, facts: dict[str, str]) -> Path:
        """Return its file, of the machine of these facts."""
        return DOCS / f"performance_{maker(facts['processor'])}{self.suffix}.json"


def maker(processor: str) -> str:
    """Return what the files of a processor's maker are called."""
    return re.sub(r"\W.*", "", processor).lower() or "unknown"


def _is_of(rows: set[str], on_one_thread: set[str], name: str) -> bool:
    row, _, threads = name.rpartition(", ")
    return row in (on_one_thread if threads == "1 thread" else rows)


def is_on_page(name: str) -> bool:
    """Return whether the page has this part."""
    return name.startswith(ONCE) or _is_of(PAGE, ON_ONE_THREAD, name)


def _is_repeated(name: str) -> bool:
    return not name.startswith(ONCE)


def _is_kept(name: str) -> bool:
    return _is_of(KEPT, set(), name)


RUNS = {
    "first": Run("", lambda name: True, {}),
    "again": Run("_again", _is_repeated, {}),
    "kept": Run("_kept", _is_kept, KEEP),
    "kept-again": Run("_kept_again", _is_kept, KEEP),
}

T = TypeVar("T")


def chosen(rows: list[str]) -> list[str]:
    """Return the names of all parts that these texts choose, or of those on the page."""
    options = [option for text in rows for option in ("--rows", text)]
    command = [*BENCH, "--list", "--peers", "none", *options]
    listed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [name for name in listed.splitlines()[1:] if rows or is_on_page(name)]


def measured(name: str, environment: dict[str, str]) -> Report:
    """Run the benchmark for one part."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [*BENCH, "--rows", name, "--json", str(path)]
        subprocess.run(command, check=True, env={**os.environ, **environment})
        return read(path)


def merge(report: Report, found: Report) -> None:
    """Put what was found in the place of what the report has of the same names, or at its end.

    Raises:
        ValueError: what the report has is of another machine.
    """
    for fact in ("processor", "instruction set", "threads", "system", "torch"):
        if report.machine[fact] != found.machine[fact]:
            raise ValueError(
                f"the page is of {fact} {report.machine[fact]}, and this is {found.machine[fact]}: "
                "measure all rows anew, without --rows"
            )

    def replace(old: list[T], new: list[T], name: Callable[[T], object]) -> None:
        places = {name(each): i for i, each in enumerate(old)}
        for each in new:
            if name(each) in places:
                old[places[name(each)]] = each
            else:
                old.append(each)

    report.machine, report.missing = found.machine, found.missing
    replace(report.rows, found.rows, lambda row: row.row)
    replace(report.scaling, found.scaling, lambda row: row.row)
    replace(report.memory, found.memory, lambda row: row.row)
    replace(report.overheads, found.overheads, lambda each: each.optimizer)
    replace(
        report.trainings,
        found.trainings,
        lambda each: (each.model, each.optimizer, each.mode, each.contestant),
    )


def main() -> None:
    """Measure, and write each part to the files as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", action="append", default=[], metavar="TEXT")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    names = chosen(options.rows)
    if not names:
        parser.error("no row has such a name: python -m fusedopt.bench --scaling --list")
    for run in (RUNS[name] for name in options.runs):
        parts = [name for name in names if run.has(name)]
        path = run.path(machine("cpu"))
        fresh = not options.rows or not path.exists()
        report = Report(machine("cpu")) if fresh else read(path)
        for i, name in enumerate(parts):
            print(f"part {i + 1} of {len(parts)}, for {path.name}", flush=True)
            merge(report, measured(name, run.environment))
            report.write(path)


if __name__ == "__main__":
    main()
