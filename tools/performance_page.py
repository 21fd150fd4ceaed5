"""Writes the figures of docs/performance_*.json into docs/performance.md and README.md, and draws.

performance_MAKER.json is of a machine, named after its processor's maker. Of the same machine,
performance_MAKER_again.json is a second run, of the same rows or of some of them; the two files
performance_MAKER_kept*.json are runs with memory that stays in the process.

    python -m tools.performance_page [--check]

A block of a page between ``<!-- figures: NAME -->`` and ``<!-- end -->`` is what the function of
that name below returns. With --check, nothing is written, and a page that is not up to date is an
error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from fusedopt.bench.contestants import OURS
from fusedopt.bench.picture import draw_rows, draw_scaling
from fusedopt.bench.results import Report, RowResult, Timing, read
from fusedopt.bench.table import best_peer
from tools.measure_page import RUNS, maker

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [DOCS / "performance.md", DOCS.parent / "README.md"]
PEERS = ["torch fused", "torch fused + grad_scale", "torch foreach", "torch loop", "torch.compile"]
PEERS += ["DeepSpeed"]
IN_README = "GPT-2 124M, AdamW,"  # the row that the README shows

# Where the memory's limit varies by more than this within a run, others use the memory, too.
BUSY = 1.3
# As near as a second run's ratio should be to the first's.
SAME = 0.1


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    """Return a Markdown table, its first column to the left; nothing where it has no lines."""
    lines = list(lines)
    if not lines:
        return ""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, rule, *lines])


def step_table(rows: list[RowResult]) -> str:
    """Return fusedopt's figures and the ratios of its peers for some rows."""
    peers = [peer for peer in PEERS if any(row.find(peer) for row in rows)]
    others = {t.name for row in rows for t in row.timings} - {*PEERS}
    lines = []
    for row in rows:
        name = row.row.removesuffix("s").removesuffix(f", {row.threads} thread")
        if ours := row.find(OURS):
            cells = [f"{ours.milliseconds:.2f} ms", f"{ours.gigabytes_per_second:.1f}"]
            cells += [row.share(ours)]
        else:
            cells = ["failed", "", ""]
        cells += [ratio(row, peer) for peer in peers]
        rest = [t for t in row.timings if t.name in others and t.name[:8] != OURS and not t.failed]
        if best := min(rest, key=lambda t: t.milliseconds, default=None):
            cells.append(f"{ratio(row, best.name)} {best.name}")
        else:
            cells.append("")
        lines.append([name, *cells])
    return table(["", "fusedopt", "GB/s", "of limit", *peers, "best of the rest"], lines)


def ratio(row: RowResult, peer: str, *, cold: bool = False) -> str:
    """Return a peer's time over fusedopt's, or the time itself where fusedopt has none.

    cold: of steps right after those of others.
    """

    def time(timing: Timing | None) -> float | None:
        if timing is None:
            return None
        return timing.cold_milliseconds if cold else timing.milliseconds

    found = row.find(peer)
    ours, theirs = time(row.find(OURS)), time(found)
    if found is None or theirs is None:
        return ""
    text = f"{theirs / ours:.2f}x" if ours else f"{theirs:.2f} ms"
    return f"{text} (wrong)" if found.wrong else text


def select(report: Report, mode: str, dtype: str = "float32", one: bool = False) -> list[RowResult]:
    """Return the rows of one variant; `one` for those on a single thread."""
    threads = 1 if one else int(report.machine["threads"])
    return [r for r in report.rows if (r.mode, r.dtype, r.threads) == (mode, dtype, threads)]


# ---- the blocks of the page ----------------------------------------------------------------------


def machine(report: Report) -> str:
    """What was measured, and where."""
    facts = dict(report.machine)
    most = int(facts["threads"])  # fewer reach less of the bandwidth
    large = [row for row in report.rows if row.bytes > 1e9 and row.threads == most]
    limits = [row.limit_gigabytes_per_second for row in large]
    if limits:
        low, high = min(limits), max(limits)
        facts["memory"] = f"{low:.0f} to {high:.0f} GB/s in rows that move more than 1 GB a step"
        if high > BUSY * low:
            facts["memory"] += "; the machine was busy, so that only ratios say something"
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())


def peers(report: Report) -> str:
    """Who was missing, failed, or computed something else."""
    lines = [f"- {name} was missing: {reason}" for name, reason in report.missing.items()]
    for kind in ("failed", "wrong"):
        seen: dict[tuple[str, str], list[RowResult]] = {}
        for row in [*report.rows, *report.memory]:
            for timing in row.timings:
                if reason := getattr(timing, kind):
                    seen.setdefault((timing.name, reason), []).append(row)
        verb = "failed" if kind == "failed" else "has wrong numbers"
        for (name, reason), rows in seen.items():
            more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
            lines.append(f"- {name} {verb} in {rows[0].row}{more}: {reason}")
    return "\n".join(lines) or "All took part, and all numbers were right."


def float32(report: Report) -> str:
    """The step alone."""
    return step_table(select(report, "plain"))


def cold(report: Report) -> str:
    """Small rows: steps after the contestant's own, and after others'."""
    peers = ["torch fused", "DeepSpeed"]
    lines = []
    for row in report.rows:
        ours = row.find(OURS)
        if ours and ours.cold_milliseconds:
            after_own = [f"{ours.milliseconds:.2f} ms", *(ratio(row, peer) for peer in peers)]
            after_others = [f"{ours.cold_milliseconds:.2f} ms"]
            after_others += [ratio(row, peer, cold=True) for peer in peers]
            lines.append([row.row, *after_own, *after_others])
    names = [OURS, *peers]
    return table(["", *names, *(f"{name}, after others" for name in names)], lines)


def clip(report: Report) -> str:
    """The step with clipping."""
    return step_table(select(report, "clip"))


def scaler(report: Report) -> str:
    """The step with a GradScaler and clipping."""
    return step_table(select(report, "scaler"))


def bfloat16(report: Report) -> str:
    """The step in half the bytes."""
    return step_table(select(report, "plain", "bfloat16") + select(report, "clip", "bfloat16"))


def one_thread(report: Report) -> str:
    """The step on one thread."""
    return step_table(select(report, "plain", one=True))


def first_step(report: Report) -> str:
    """Where the first step takes longest: how long that is for everyone."""
    row = max(report.rows, key=lambda row: max(t.first_step_seconds for t in row.timings))
    lines = []
    for t in row.timings:
        if not t.failed:
            compiling = "" if t.compile_seconds is None else f"{t.compile_seconds:.1f} s"
            lines.append([t.name, f"{t.first_step_seconds:.2f} s", compiling])
    return f"{row.row}:\n\n" + table(["", "to the end of the first step", "compiling"], lines)


def overhead(report: Report) -> str:
    """Microseconds a tensor."""
    lines = []
    for each in report.overheads:
        for name, total in each.totals.items():
            cells = each.parts(2) if name == OURS else ["", "", ""]
            lines.append([f"{each.optimizer}, {name}", f"{total:.2f}", *cells])
    return table(["microseconds a tensor", "in all", "gather", "kernel", "the rest"], lines)


def training(report: Report) -> str:
    """The update in real training."""
    lines = []
    for t in report.trainings:
        name = f"{t.model}, {t.optimizer}{', clip' * (t.mode == 'clip')}: {t.contestant}"
        if t.failed:
            lines.append([name, "failed", "", ""])
        else:
            times = f"{t.iteration_milliseconds:.1f} ms", f"{t.update_milliseconds:.2f} ms"
            lines.append([name, *times, f"{t.share:.1%}"])
    return table(["", "iteration", "clip and step", "share"], lines)


def scaling(report: Report) -> str:
    """The time over the parameters."""
    lines = []
    for row in report.scaling:
        if ours := row.find(OURS):
            each = ours.milliseconds * 1e6 / row.parameters
            peer = best_peer(row)
            times = f"{ours.milliseconds:.3f} ms", f"{each:.3f} ns", row.share(ours)
            lines.append(
                [f"{row.parameters / 1e6:g}M", *times, ratio(row, peer.name if peer else "")]
            )
    return table(["parameters", "AdamW", "each", "of limit", "torch fused"], lines)


def memory(report: Report) -> str:
    """What keeps less, with the bytes of each."""
    lines = []
    for row in report.memory:
        for t in row.timings:
            if not t.failed:
                cells = [f"{t.bytes_a_parameter or 0:.2f}", f"{t.milliseconds:.1f} ms"]
                cells += [f"{t.gigabytes_per_second:.1f}", row.share(t)]
                lines.append([t.name, *cells, ratio(row, t.name)])
    return table(["", "bytes a parameter", "a step", "GB/s", "of limit", "to fusedopt"], lines)


def again(report: Report) -> str:
    """How far the ratios of a second run are from those of the first."""
    return repeated(report, _run_of(report, "again"))


def kept(report: Report) -> str:
    """The step where memory stays in the process."""
    return step_table(_run_of(report, "kept").rows)


def kept_again(report: Report) -> str:
    """How far the ratios are apart there."""
    return repeated(_run_of(report, "kept"), _run_of(report, "kept-again"))


def _run_of(report: Report, name: str) -> Report:
    """Return another run on the machine of a report; an empty one if there was none."""
    path = RUNS[name].path(report.machine)
    return read(path) if path.exists() else Report(report.machine)


def repeated(first: Report, again: Report) -> str:
    """Return how far the ratios of two runs are apart."""
    second = {row.row: row for row in again.rows}
    lines, near, everything = [], 0, 0
    for row in first.rows:
        pairs = [
            (abs(timing.ratio / other.ratio - 1), timing.name, other.ratio, timing.ratio)
            for timing in row.timings
            if timing.name != OURS
            and row.row in second
            and (other := second[row.row].find(timing.name))
            and timing.ratio
            and other.ratio
        ]
        if not pairs:
            continue
        near += sum(apart <= SAME for apart, *_ in pairs)
        everything += len(pairs)
        apart, peer, ratio, before = max(pairs)
        numbers = f"{before:.2f}x", f"{ratio:.2f}x", f"{apart:.0%}"
        lines.append([row.row, str(len(pairs)), peer, *numbers])
    if not lines:
        return ""
    header = ["", "ratios", "farthest apart", "first run", "second run", "difference"]
    summary = f"{near} of {everything} ratios are within {SAME:.0%} of those of the first run."
    return summary + "\n\n" + table(header, lines)


def share(report: Report) -> str:
    """Return what the README says of its rule."""
    lines = []
    for row in select(report, "plain"):
        ours = row.find(OURS)
        if row.row.startswith(IN_README) and ours:
            share = row.share(ours)
            text = f": {share} of what the memory allows"
            if share == "busy":
                text = ", while others used the machine, too"
            lines = [
                f"A step of GPT-2 with it, in float32 on {row.threads} threads, takes "
                f"{ours.milliseconds:.1f} ms{text}",
                f"(row {row.row}, of [Performance](docs/performance.md#the-step-float32)).",
            ]
    return "\n".join(lines)


BLOCKS: list[Callable[[Report], str]] = [
    *(machine, peers, float32, cold, clip, scaler, bfloat16, one_thread),
    *(first_step, overhead, training, scaling, memory, again, kept, kept_again, share),
]


# ---- the page ------------------------------------------------------------------------------------


def page(text: str, reports: list[Report]) -> str:
    """Return the page with the figures of each report: those of each machine under its name."""
    blocks = {block.__name__: block for block in BLOCKS}

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        texts = {_title(report): blocks[name](report) for report in reports}
        if len(reports) > 1:
            texts = {of: f"**{of}**\n\n{text}" for of, text in texts.items() if text}
        figures = "\n\n".join(texts.values())
        return f"<!-- figures: {name} -->\n{figures}\n<!-- end -->"

    return re.sub(r"<!-- figures: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def _title(report: Report) -> str:
    facts = report.machine
    return f"{facts['processor']}, {facts['threads']} threads, {facts['measured']}"


def draw(report: Report) -> None:
    """Draw the pictures of the page that are of one machine."""
    name = f"performance_{maker(report.machine['processor'])}"
    chosen = [
        row
        for row in select(report, "plain") + select(report, "clip")
        if row.model == "GPT-2 124M" or (row.optimizer == "AdamW" and row.mode == "plain")
    ]
    if chosen:
        draw_rows(chosen, DOCS / f"{name}.png", report.machine)
    if report.scaling:
        draw_scaling(report.scaling, DOCS / f"{name}_scaling.png", report.machine)


def draw_short(reports: list[Report]) -> None:
    """Draw the picture of the README: one row, on each machine."""
    rows = [
        replace(row, row=f"{row.row}: {report.machine['processor'].split('(')[0]}")
        for report in reports
        for row in select(report, "plain")
        if row.row.startswith(IN_README)
    ]
    draw_rows(rows, DOCS / "performance_short.png", reports[0].machine)


def machines() -> list[Report]:
    """Return the first runs of all machines."""
    first = [path for path in DOCS.glob("performance_*.json") if path.stem.count("_") == 1]
    return [read(path) for path in sorted(first)]


def main() -> None:
    """Write, or check."""
    reports = machines()
    for path in PAGES:
        old = path.read_text()
        new = page(old, reports)
        if sys.argv[1:] != ["--check"]:
            path.write_text(new)
        elif new != old:
            sys.exit(f"{path} is not what tools/performance_page.py makes: run it")
    if sys.argv[1:] != ["--check"]:
        for report in reports:
            draw(report)
        draw_short(reports)


if __name__ == "__main__":
    main()
