"""The rows that gpu_check.py measures, what each is to reach, and their measurement.

In a process of its own, with the build that is to be measured.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """A row, and what it is to reach."""

    model: str
    optimizer: str
    mode: str
    dtype: str
    peer: str
    """The contestant whose time is divided by fusedopt's; empty for the share of the bandwidth."""
    least: float


ASKED = [
    Asked("1 x 100M", "AdamW", "plain", "float32", "", 0.90),
    Asked("1 x 100M", "AdamW", "plain", "float32", "torch fused", 1.0),
    Asked("1 x 100M", "AdamW", "clip", "float32", "torch fused", 1.2),
    Asked("2000 x 1K", "AdamW", "plain", "float32", "torch fused", 3.0),
    Asked("1 x 100M", "SGD", "plain", "bfloat16", "torch fused", 1.2),
    Asked("ResNet-50", "AdamW", "plain", "float32", "torch fused", 1.5),
    Asked("1 x 100M", "RMSprop", "plain", "float32", "torch foreach", 2.5),
    Asked("1 x 100M", "Lion", "plain", "float32", "lion-pytorch", 1.0),
]
BUDGET = 8.0  # seconds of steps a row
TINY = "3 x 1K"  # in place of each model in a rehearsal


def compare(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield each figure asked for beside the one measured; None where there is none."""
    for asked in ASKED:
        figures: dict[str, Any] = dict.fromkeys(("measured", "milliseconds", "host_microseconds"))
        for row in rows:
            if (row["model"], row["optimizer"], row["mode"], row["dtype"]) != asked[:4]:
                continue
            timings = {each["name"]: each for each in row["timings"] if not each["failed"]}
            if ours := timings.get("fusedopt"):
                figures["milliseconds"] = ours["milliseconds"]
                figures["host_microseconds"] = ours["host_microseconds"]
                if not asked.peer:
                    figures["measured"] = ours["share_of_limit"]
                elif asked.peer in timings:
                    figures["measured"] = timings[asked.peer]["ratio"]
        yield {**asked._asdict(), **figures}


def print_asked(rows: Iterable[dict[str, Any]]) -> None:
    print(f"\n{'row':<36} {'against':<20} {'asked':>6} {'measured':>9} {'host us':>8}")
    for row in rows:
        name = f"{row['model']}, {row['optimizer']}, {row['mode']}, {row['dtype']}"
        against = row["peer"] or "bandwidth of a copy"
        measured = "none" if row["measured"] is None else f"{row['measured']:.2f}"
        host = "none" if row["host_microseconds"] is None else f"{row['host_microseconds']:.0f}"
        short = row["measured"] is not None and row["measured"] < row["least"]
        end = " SHORT" if short else ""
        print(f"{name:<36} {against:<20} {row['least']:>6.2f} {measured:>9} {host:>8}{end}")


def measure(results: Path, seconds: float, rehearse: bool) -> bool:
    """Measure the rows for which there is time, and add each to the results; True if all were."""
    import torch  # noqa: PLC0415  (compare() needs none of it)

    from fusedopt import _core, _engine  # noqa: PLC0415
    from fusedopt.bench.contestants import contestants  # noqa: PLC0415
    from fusedopt.bench.measure import measure as measure_row  # noqa: PLC0415
    from fusedopt.bench.results import Report, machine  # noqa: PLC0415
    from fusedopt.bench.rows import Row  # noqa: PLC0415

    end, longest = time.monotonic() + seconds, 0.0
    device = "cpu" if rehearse else "cuda"
    if rehearse:
        _engine.engine = _core.Engine(device="emulated")
    report = Report(machine(device))
    entrants = contestants("", quick=True)
    report.missing = {each.name: each.missing for each in entrants if each.missing}
    for model, optimizer, mode, dtype in dict.fromkeys(asked[:4] for asked in ASKED):
        begin = time.monotonic()
        if begin + longest > end:
            print("there is no time for the other rows", flush=True)
            return False
        shapes = TINY if rehearse else model
        row = Row(shapes, optimizer, mode, getattr(torch, dtype), threads=1, device=device)
        print(row, flush=True)
        found = measure_row(row, entrants, budget=0.01 if rehearse else BUDGET)
        found.model = model
        report.rows.append(found)
        add(results, asdict(report))
        longest = max(longest, time.monotonic() - begin)
        if not rehearse:
            torch.cuda.empty_cache()
    return True


def add(results: Path, report: dict[str, Any]) -> None:
    """Put a report into the results, and these to where they are wanted."""
    data = json.loads(results.read_text()) if results.exists() else {}
    data["report"] = report
    data["asked"] = list(compare(report["rows"]))
    whole = results.with_suffix(".part")
    whole.write_text(json.dumps(data, indent=1) + "\n")
    whole.replace(results)
    if out := os.environ.get("OUT"):
        shutil.copy(results, out)


if __name__ == "__main__":
    done = measure(Path(sys.argv[1]), float(sys.argv[2]), rehearse="--rehearse" in sys.argv)
    sys.exit(0 if done else 1)
