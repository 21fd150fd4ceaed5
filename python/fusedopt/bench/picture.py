"""Pictures of results: bytes over time against the memory's limit, and how the cost grows."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fusedopt.bench.contestants import OURS
from fusedopt.bench.results import RowResult, Timing

_OURS, _TORCH, _LIBRARY = "#1b3a6b", "#ee8434", "#9aa5b1"
_LIMIT, _WRONG = "#b3243a", "#b3243a"
_COLUMNS = 3
_TITLE = 66  # characters of the title above a column
_BAR = 0.27  # inches a contestant


def draw_rows(rows: list[RowResult], path: Path, machine: dict[str, str]) -> None:
    """Draw one panel a row: how fast each contestant moves the bytes that the row needs."""
    columns = min(_COLUMNS, len(rows))
    lines = [rows[i : i + columns] for i in range(0, len(rows), columns)]
    heights = [max(len(_timed(row)) for row in line) * _BAR + 0.95 for line in lines]
    figure = Figure(figsize=(5.4 * columns, sum(heights) + 0.7), layout="constrained")
    grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
    for i, line in enumerate(lines):
        for j, row in enumerate(line):
            _panel(figure.add_subplot(grid[i, j]), row, max(len(_timed(row)) for row in line))
    title = (
        "Bytes that a step has to move over its time: longer is faster; the red line is the "
        "memory's limit. Behind the times: how many times fusedopt's."
    )
    heading = [*textwrap.wrap(title, _TITLE * columns), _describe(machine)]
    figure.suptitle("\n".join(heading), fontsize=11)
    figure.savefig(path, dpi=100)


def _describe(machine: dict[str, str]) -> str:
    return f"{machine['processor']}, torch {machine['torch']}, fusedopt {machine['fusedopt']}"


def _timed(row: RowResult) -> list[Timing]:
    return [timing for timing in row.timings if not timing.failed]


def _panel(axes: Any, row: RowResult, bars_beside: int) -> None:
    timings = _timed(row)[::-1]  # matplotlib's first bar is at the bottom
    limit = row.limit_gigabytes_per_second
    widths = [timing.gigabytes_per_second for timing in timings]
    longest = max([limit, *widths])
    bars = axes.barh(
        range(len(timings)), widths, height=0.78, color=[_colour(timing) for timing in timings]
    )
    for bar, timing in zip(bars, timings, strict=True):
        if timing.wrong:
            bar.set(hatch="////", edgecolor=_WRONG, linewidth=0)
        inside = bar.get_width() > 0.62 * longest
        axes.text(
            bar.get_width() + longest * (-0.012 if inside else 0.012),
            bar.get_y() + bar.get_height() / 2,
            _label(timing),
            ha="right" if inside else "left",
            va="center",
            fontsize=8,
            color="white" if inside and not timing.wrong else "black",
            bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1}
            if timing.wrong and inside
            else None,
        )
    axes.axvline(limit, color=_LIMIT, linewidth=1.4)
    axes.set_ylim(len(timings) - bars_beside - 0.6, len(timings) - 0.4)  # bars of one height
    axes.set_yticks(range(len(timings)), [timing.name for timing in timings], fontsize=8.5)
    axes.set_xlim(0, longest * 1.04)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("GB/s", fontsize=8, loc="right", labelpad=1)
    axes.set_title(row.row, fontsize=10, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)


def _colour(timing: Timing) -> str:
    if timing.name.startswith(OURS):
        return _OURS
    return _TORCH if timing.name.startswith("torch") and "-" not in timing.name else _LIBRARY


def _label(timing: Timing) -> str:
    text = (
        f"{timing.milliseconds:#.3g}".rstrip(".")
        if timing.milliseconds < 1000
        else f"{timing.milliseconds:.0f}"
    )
    text += " ms"
    if timing.ratio is not None and timing.name != OURS:
        text += f", {timing.ratio:.2f}x"
    return f"{text}, wrong numbers" if timing.wrong else text


def draw_scaling(rows: list[RowResult], path: Path, machine: dict[str, str]) -> None:
    """Draw time over parameters, both logarithmic, with the line that the memory allows."""
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = figure.add_subplot()
    names = [timing.name for timing in rows[0].timings]
    for name, marker in zip(names, "osD^v<>", strict=False):
        points = [(row.parameters, t.milliseconds) for row in rows if (t := row.find(name))]
        colour = _colour(Timing(name))
        axes.loglog(*zip(*points, strict=True), marker, color=colour, ms=6, ls="-", label=name)
    largest = max(rows, key=lambda row: row.parameters)
    sizes = [row.parameters for row in rows]
    per_parameter = largest.bytes / largest.parameters
    floor = [n * per_parameter / largest.limit_gigabytes_per_second / 1e6 for n in sizes]
    label = f"{largest.limit_gigabytes_per_second:.0f} GB/s, {per_parameter:.0f} bytes a parameter"
    axes.loglog(sizes, floor, "--", color=_LIMIT, label=f"the memory: {label}")
    ticks = [10.0**i for i in range(math.ceil(math.log10(max(floor))) + 1)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks(sizes, [f"{n // 1_000_000}M" for n in sizes])
    axes.minorticks_off()
    axes.set(xlabel="parameters, in one tensor", ylabel="milliseconds a step")
    axes.set_title(f"{largest.optimizer}: time of a step\n{_describe(machine)}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=100)
