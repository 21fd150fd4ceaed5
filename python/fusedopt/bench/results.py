"""What a run of the benchmark found, and its JSON."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt._engine import engine

VERSION = 2
"""Of the JSON's structure."""

BUSY = 0.15
"""A spread above this says that others used the machine: what is derived from such times is not
shown, but the word "busy"."""


def spread(samples: list[float]) -> float:
    """Return the interquartile range as a share of the median."""
    if len(samples) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle


@dataclass
class Timing:
    """One contestant in one row: measured, or failed."""

    name: str
    milliseconds: float = 0.0
    """The median."""
    cold_milliseconds: float | None = None
    """The median of steps right after those of others, which empty caches; `milliseconds` is then
    of steps after the contestant's own. None where a row is too large for that to matter."""
    host_microseconds: float | None = None
    """The median time until a step returns, with nothing left to do on its GPU; None on a CPU."""
    spread: float = 0.0
    """The interquartile range, as a share of the median."""
    gigabytes_per_second: float = 0.0
    """The bytes that the row needs to move, over the time: comparable between contestants. Where
    those of each are counted, they are its own."""
    bytes_a_parameter: float | None = None
    """What its own tensors make it move: those it keeps both ways, gradients once; None where the
    row says it."""
    share_of_limit: float = 0.0
    """The same over the bandwidth that was measured in between."""
    ratio: float | None = None
    """The time over fusedopt's."""
    first_step_seconds: float = 0.0
    """From the construction of the optimizer to the end of its first step."""
    compile_seconds: float | None = None
    """What the first two steps took longer than the others, if they compiled the step."""
    samples: int = 0
    wrong: str = ""
    """How its numbers differ from float64's by more than rounding."""
    failed: str = ""
    """Why it has no times."""


@dataclass
class RowResult:
    """One row: all contestants, and the limit of the memory."""

    row: str
    model: str
    optimizer: str
    mode: str
    dtype: str
    threads: int
    tensors: int
    parameters: int
    bytes: int
    limit_gigabytes_per_second: float
    timings: list[Timing]
    limit_way: str = ""
    """Which way to move memory was the fastest: of `probe.bandwidth_probes`."""
    limit_spread: float = 0.0
    """The interquartile range of its times, as a share of the median."""

    def share(self, timing: Timing) -> str:
        """Return the share of the limit, or "busy" where the spread of either is above BUSY."""
        if max(timing.spread, self.limit_spread) > BUSY:
            return "busy"
        return f"{timing.share_of_limit:.0%}"

    def find(self, name: str) -> Timing | None:
        """Return the times of a contestant that did not fail."""
        return next((t for t in self.timings if t.name == name and not t.failed), None)


@dataclass
class Overhead:
    """The time of a step on many tiny tensors with fresh gradients, in microseconds a tensor."""

    optimizer: str
    tensors: int
    threads: int
    gather: float
    kernel: float
    rest: float
    totals: dict[str, float]
    """Of all contestants."""
    failed: dict[str, str] = field(default_factory=dict)
    spread: float = 0.0
    """The largest of the spreads of the times that the parts are made of."""

    def parts(self, digits: int) -> list[str]:
        """Return gather, kernel and rest, or "busy" for each.

        They are differences: where the machine was busy, they say nothing. Below 0 it was.
        """
        parts = [self.gather, self.kernel, self.rest]
        busy = self.spread > BUSY or min(parts) < 0
        return ["busy" if busy else f"{part:.{digits}f}" for part in parts]


@dataclass
class Training:
    """Real training iterations of one model: how much of one the update takes."""

    model: str
    optimizer: str
    mode: str
    threads: int
    contestant: str
    iteration_milliseconds: float = 0.0
    update_milliseconds: float = 0.0
    failed: str = ""

    @property
    def share(self) -> float:
        """Of the update in the iteration."""
        return self.update_milliseconds / self.iteration_milliseconds


@dataclass
class Report:
    """Everything that one run found."""

    machine: dict[str, str]
    missing: dict[str, str] = field(default_factory=dict)
    """Peers that could not be tried, and why."""
    rows: list[RowResult] = field(default_factory=list)
    overheads: list[Overhead] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    scaling: list[RowResult] = field(default_factory=list)
    memory: list[RowResult] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write JSON."""
        path.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n")


def read(path: Path) -> Report:
    """Read what `Report.write` has written."""
    data: dict[str, Any] = json.loads(path.read_text())
    version = data.pop("version", None)
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, expected {VERSION}: measure again")

    def rows(key: str) -> list[RowResult]:
        return [
            RowResult(**{**row, "timings": [Timing(**timing) for timing in row["timings"]]})
            for row in data.get(key, [])
        ]

    return Report(
        machine=data["machine"],
        missing=data["missing"],
        rows=rows("rows"),
        overheads=[Overhead(**overhead) for overhead in data["overheads"]],
        trainings=[Training(**training) for training in data["trainings"]],
        scaling=rows("scaling"),
        memory=rows("memory"),
    )


def machine(device: str) -> dict[str, str]:
    """Return what a figure is worth nothing without."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    facts = {
        "processor": processor,
        "instruction set": engine.isa,
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
        "measured": datetime.date.today().isoformat(),
        "limit": "the fastest of several ways to move memory",
    }
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    return facts
