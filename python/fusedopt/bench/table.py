"""Results as tables in the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fusedopt.bench.contestants import OURS
from fusedopt.bench.results import Overhead, Report, RowResult, Timing, Training


def _table(columns: list[str], left: tuple[str, ...] = ("",)) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=True)
    for name in columns:
        table.add_column(
            name, justify="left" if name in left else "right", no_wrap=name not in left
        )
    return table


def _under(title: str, *parts: Table | Text) -> Group:
    return Group(Text(title, style="bold"), *parts, "")  # a table's own title wraps at its width


def _notes(failed: dict[str, str]) -> list[Text]:
    return [Text(f"  {name} failed: {why}", style="dim") for name, why in failed.items()]


def row_table(result: RowResult) -> Group:
    """Return one row of the benchmark as a table of its contestants."""
    if any(timing.bytes_a_parameter is not None for timing in result.timings):
        title = f"Memory modes, {result.row}: "
    else:
        title = f"{result.row}: {result.bytes / 1e6:,.6g} MB a step, "
    title += f"at most {result.limit_gigabytes_per_second:.1f} GB/s"
    timed = [timing for timing in result.timings if not timing.failed]
    cells = {timing.name: _cells(timing, result.share(timing)) for timing in timed}
    some = next(iter(cells.values()), {})
    columns = [name for name in some if any(each[name] for each in cells.values())]
    table = _table(["", *columns])
    for timing in result.timings:
        if not timing.failed:
            style = "green" if timing.name == OURS else "red" if timing.wrong else None
            texts = (cells[timing.name][name] for name in columns)
            table.add_row(timing.name, *texts, style=style)
    wrong = [
        Text(f"  {t.name} has wrong numbers: {t.wrong}", style="red")
        for t in result.timings
        if t.wrong
    ]
    failed = {t.name: t.failed for t in result.timings if t.failed}
    return _under(title, table, *wrong, *_notes(failed))


def _milliseconds(time: float | None) -> str:
    return "" if time is None else f"{time:.3f} ms"


def _cells(timing: Timing, share: str) -> dict[str, str]:
    compiling = timing.compile_seconds
    counted = timing.bytes_a_parameter
    return {
        "bytes": "" if counted is None else f"{counted:.2f}",
        "median": _milliseconds(timing.milliseconds),
        "spread": f"{timing.spread:.0%}",
        "GB/s": f"{timing.gigabytes_per_second:.1f}",
        "of limit": share,
        "to fusedopt": "" if timing.ratio is None else f"{timing.ratio:.2f}x",
        "after others": _milliseconds(timing.cold_milliseconds),
        "host": "" if (host := timing.host_microseconds) is None else f"{host:.0f} us",
        "first step": f"{timing.first_step_seconds:.3f} s",
        "compile": "" if compiling is None else f"{compiling:.1f} s",
    }


def first_steps_table(result: RowResult) -> Group:
    """Return the time to the first step of each contestant of a row as a row of its own."""
    table = _table(["", "seconds"])
    for timing in result.timings:
        if not timing.failed:
            table.add_row(timing.name, f"{timing.first_step_seconds:.3f}")
    return _under(f"{result.row}: from the constructor to the first step", table)


def overhead_table(overhead: Overhead) -> Group:
    """Return the overhead as a table: our parts, and everyone's total."""
    title = f"{overhead.optimizer} on {overhead.tensors} tiny tensors with fresh gradients, "
    title += f"{overhead.threads} threads"
    table = _table(["", "us a tensor", "gather", "kernel", "rest"])
    for name, total in overhead.totals.items():
        parts = overhead.parts(3) if name == OURS else ()
        table.add_row(name, f"{total:.3f}", *parts)
    return _under(title, table, *_notes(overhead.failed))


def training_table(trainings: list[Training]) -> Group:
    """Return training runs of one model as a table."""
    one = trainings[0]
    title = f"Training {one.model}: {one.optimizer}, {one.mode}, {one.threads} threads"
    table = _table(["", "iteration", "update", "share"])
    for t in trainings:
        if not t.failed:
            times = (f"{t.iteration_milliseconds:.2f} ms", f"{t.update_milliseconds:.2f} ms")
            table.add_row(t.contestant, *times, f"{t.share:.1%}")
    return _under(title, table, *_notes({t.contestant: t.failed for t in trainings if t.failed}))


def print_missing(console: Console, report: Report) -> None:
    """Say which peers were not tried, and why."""
    for name, reason in report.missing.items():
        console.print(f"[dim]{name} is missing: {reason}[/dim]", highlight=False)


def print_summary(console: Console, report: Report) -> None:
    """Print a line for each row: fusedopt, and the best of its peers whose numbers are right."""
    columns = ["", "fusedopt", "of limit", "best peer", "to fusedopt"]
    table = _table(columns, left=("", "best peer"))
    for row in report.rows:
        ours, peer = row.find(OURS), best_peer(row)
        table.add_row(
            row.row,
            _milliseconds(ours.milliseconds) if ours else "failed",
            row.share(ours) if ours else "",
            peer.name if peer else "none",
            f"{peer.ratio:.2f}x" if peer and peer.ratio else "",
        )
    if report.rows:
        console.print(_under("Summary", table))
        slowest = max(report.rows, key=lambda row: max(t.first_step_seconds for t in row.timings))
        console.print(first_steps_table(slowest))


def best_peer(row: RowResult) -> Timing | None:
    """Return the fastest contestant, fusedopt apart, whose numbers are right."""
    peers = [
        timing
        for timing in row.timings
        if not timing.name.startswith(OURS) and not timing.failed and not timing.wrong
    ]
    return min(peers, key=lambda timing: timing.milliseconds, default=None)
