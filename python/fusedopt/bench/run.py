"""One run of the benchmark: which rows, who takes part, and where the results go."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusedopt.bench import matrices, memory, table
from fusedopt.bench import rows as all_about_rows
from fusedopt.bench.contestants import Contestant, contestants
from fusedopt.bench.measure import measure
from fusedopt.bench.overhead import TENSORS, overhead
from fusedopt.bench.results import Report, machine
from fusedopt.bench.rows import Row
from fusedopt.bench.training import PEERS, TASKS, Task, train

Notify = Callable[[str], None]


class Job(NamedTuple):
    """A part of the run: it adds to the report and returns what to print."""

    name: str
    do: Callable[[Report, Notify], Group]


def run(options: argparse.Namespace) -> None:
    """Measure, print, and write the files that are asked for."""
    # The stream of now: sys.stdout is another one while a contestant is kept quiet.
    width = None if sys.stdout.isatty() else 110
    console = Console(file=sys.stdout, width=width)
    console.print("[dim]importing the peers ...[/dim]")
    entrants = contestants(options.peers, options.quick)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = Report(machine(options.device))
    savers = memory.contestants(options.peers, options.quick)
    report.missing = {each.name: each.missing for each in [*entrants, *savers] if each.missing}
    jobs = _chosen(plan(options, entrants, savers), options.rows)
    if not jobs:
        sys.exit(f"no row has the name --rows {' --rows '.join(options.rows)}; --list prints them")
    if options.list:
        for job in jobs:
            console.print(job.name, highlight=False)
        return
    console.print(", ".join(f"{key} {value}" for key, value in report.machine.items()))
    table.print_missing(console, report)
    for show in _results(jobs, report, console):
        console.print(show)
        if options.json:  # each time, so that a run that is interrupted leaves what it has
            report.write(options.json)
    table.print_summary(console, report)
    if options.plot:
        from fusedopt.bench import picture  # noqa: PLC0415  (matplotlib is not always there)

        if report.rows:
            picture.draw_rows(report.rows, options.plot, report.machine)
        if report.scaling:
            beside = options.plot.with_stem(options.plot.stem + "_scaling")
            picture.draw_scaling(report.scaling, beside, report.machine)


def _results(jobs: list[Job], report: Report, console: Console) -> Iterator[Group]:
    """Do all jobs under a progress bar, and yield what each has to show."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Without a thread that would redraw it in the middle of a step.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:

            def notify(text: str, name: str = job.name) -> None:
                progress.update(task, description=f"{name}: {text}", refresh=True)

            yield job.do(report, notify)
            progress.advance(task)


def _chosen(jobs: list[Job], wanted: list[str]) -> list[Job]:
    """Return the jobs of these names, and those that have all parts of a text in theirs."""
    names = {job.name.lower() for job in jobs}

    def chooses(text: str, name: str) -> bool:
        if text in names:
            return text == name
        return all(part.strip() in name for part in text.split(","))

    texts = [text.strip().lower() for text in wanted]
    return [job for job in jobs if not texts or any(chooses(t, job.name.lower()) for t in texts)]


def plan(
    options: argparse.Namespace, entrants: list[Contestant], savers: list[Contestant]
) -> list[Job]:
    """Return all parts of a run, before --rows chooses among them."""
    threads = options.threads or torch.get_num_threads()
    choose = all_about_rows.main_rows
    if options.quick:
        choose = all_about_rows.quick_rows
    elif options.every:
        choose = all_about_rows.all_rows
    chosen = [
        row
        for row in choose(threads, options.device)
        if not options.threads or row.threads == options.threads
    ]
    budget = 0.8 if options.quick else 10.0
    jobs = [_row_job(row, entrants, options.repeats, budget) for row in chosen]
    entrants_of_muon = matrices.contestants(options.peers, options.quick)
    of_muon = all_about_rows.matrix_rows(threads, options.device, quick=options.quick)
    jobs += [_row_job(row, entrants_of_muon, options.repeats, budget) for row in of_muon]
    modes = all_about_rows.memory_rows(threads, options.device, quick=options.quick)
    jobs += [_row_job(row, savers, options.repeats, budget, "memory") for row in modes]
    tiny = Row(f"{TENSORS} x 16", "AdamW", threads=threads, device=options.device)
    jobs.append(_overhead_job(tiny, entrants, options.repeats or (10 if options.quick else 0)))
    if not options.quick:
        jobs += _training_jobs(threads, options, entrants)
    if options.scaling:
        few = [each for each in entrants if each.name in PEERS]
        large = all_about_rows.scaling_rows(threads, options.device)
        jobs += [_row_job(row, few, options.repeats, budget, "scaling") for row in large]
    return jobs


def _row_job(
    row: Row, entrants: list[Contestant], repeats: int, budget: float, part: str = "rows"
) -> Job:
    def do(report: Report, notify: Notify) -> Group:
        result = measure(row, entrants, repeats=repeats, budget=budget, progress=notify)
        getattr(report, part).append(result)
        return table.row_table(result)

    return Job(str(row) if part == "rows" else f"{part}: {row}", do)


def _overhead_job(row: Row, entrants: list[Contestant], repeats: int) -> Job:
    def do(report: Report, notify: Notify) -> Group:
        result = overhead(row, entrants, repeats=repeats, progress=notify)
        report.overheads.append(result)
        return table.overhead_table(result)

    return Job(f"overhead: {row}", do)


def _training_jobs(
    threads: int, options: argparse.Namespace, entrants: list[Contestant]
) -> Iterable[Job]:
    for task in TASKS:
        for mode in ("plain", "clip"):
            row = Row("training", task.optimizer, mode, threads=threads, device=options.device)

            def do(report: Report, notify: Notify, task: Task = task, row: Row = row) -> Group:
                results = train(task, row, entrants, repeats=options.repeats, progress=notify)
                report.trainings += results
                return table.training_table(results)

            yield Job(f"training: {task.name}, {task.optimizer}, {mode}", do)
