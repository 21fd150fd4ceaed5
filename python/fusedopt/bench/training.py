"""The update inside real training: forward, backward, clip and step, and the share of the two."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fusedopt.bench.contestants import OURS, Contestant, quiet
from fusedopt.bench.measure import reason, without_collection
from fusedopt.bench.models import GPT, ResNet
from fusedopt.bench.modes import Step
from fusedopt.bench.results import Training
from fusedopt.bench.rows import Row

PEERS = (OURS, "torch fused")


class Task(NamedTuple):
    """What is trained, and how."""

    name: str
    optimizer: str
    model: Callable[[], ResNet | GPT]


TASKS = [
    Task("ResNet-18, 8 images of 64 x 64", "SGD", ResNet),
    Task("GPT of 124M, 256 tokens", "AdamW", GPT),
]


def train(
    task: Task,
    row: Row,
    contestants: list[Contestant],
    *,
    repeats: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Training]:
    """Train copies of one model in turn; of the row, only its options count."""
    torch.set_num_threads(row.threads)
    torch.manual_seed(0)
    model = task.model()
    results: list[Training] = []
    entered: list[tuple[Training, ResNet | GPT, Step]] = []
    for contestant in contestants:
        if contestant.name not in PEERS or not contestant.enters(row):
            continue
        result = Training(task.name, row.optimizer, row.mode, row.threads, contestant.name)
        results.append(result)
        twin = copy.deepcopy(model)
        progress(contestant.name)
        try:
            with quiet():
                step = contestant.build(row, list(twin.parameters()))
                _iterate(twin, step)
        except Exception as error:  # a peer may raise anything
            result.failed = reason(error)
        else:
            entered.append((result, twin, step))

    seconds: list[list[tuple[float, float]]] = [[] for _ in entered]
    with without_collection():
        for i in range(rounds := repeats or 15):
            progress(f"iteration {i + 1} of {rounds}")
            for times, (_, twin, step) in zip(seconds, entered, strict=True):
                times.append(_iterate(twin, step))
    for times, (result, _, _) in zip(seconds, entered, strict=True):
        whole, update = zip(*times, strict=True)
        result.iteration_milliseconds = statistics.median(whole) * 1e3
        result.update_milliseconds = statistics.median(update) * 1e3
    return results


def _iterate(model: ResNet | GPT, step: Step) -> tuple[float, float]:
    """Return the seconds of one iteration, and of the update in it."""
    start = time.perf_counter()
    model.zero_grad()
    model.loss().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    before = time.perf_counter()
    step()
    end = time.perf_counter()
    return end - start, end - before
