"""Measuring a row: all contestants in one process, in turn, and the memory's limit among them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch

from fusedopt.bench import modes
from fusedopt.bench.contestants import OURS, Contestant, quiet
from fusedopt.bench.modes import Step
from fusedopt.bench.probe import bandwidth_probes, probed
from fusedopt.bench.results import RowResult, Timing, spread
from fusedopt.bench.rows import Row, parameters

# The first rounds take several times as long as others: memory has to settle.
WARM_UP = 2
FEWEST, MOST = 7, 300  # rounds after that
THIN = 3  # see `turns`
# A step that moves less than SMALL bytes finds some of its memory in caches: how much depends on
# who stepped before. So that the ratio to one peer does not depend on which others there are, a
# turn is then REPEATED steps. The last one counts, and the first is reported separately.
SMALL, REPEATED = 64_000_000, 4
# The time on a GPU begins before the host's part of a step, which would be a tenth of it: of a row
# that is not SMALL, as many steps are queued, and only the first one's is not hidden.
QUEUED = 8
Turn = list[float]
"""The seconds of its steps."""
_PROBE = "probe: "  # and the way


def measure(
    row: Row,
    contestants: list[Contestant],
    *,
    repeats: int = 0,
    budget: float = 10.0,
    progress: Callable[[str], None] = lambda text: None,
) -> RowResult:
    """Time the step of a row.

    Args:
        row: what to step.
        contestants: those of them that enter the row; fusedopt first.
        repeats: rounds with a turn of every contestant; 0 for what `turns` makes of the budget.
        budget: in seconds.
        progress: told what is being done.
    """
    torch.set_num_threads(row.threads)
    gc.collect()  # the row before may have left gigabytes in reference cycles
    timings: dict[str, Timing] = {}
    steps: dict[str, Step] = {}
    for contestant in contestants:
        if not contestant.enters(row) or contestant.missing:
            continue
        progress(contestant.name)
        timing = timings[contestant.name] = Timing(contestant.name)
        try:
            with quiet():
                _enter(contestant, row, timing, steps)
        except Exception as error:  # a peer may raise anything
            timing.failed = reason(error)
            steps.pop(contestant.name, None)
    probes, probe_bytes = bandwidth_probes(row)
    steps |= {_PROBE + way: probe for way, probe in probes.items()}
    taken, failed = _interleave(steps, row, repeats, budget, progress)
    for name, why in failed.items():
        timings[name].failed = why
    if any(contestant.compiles for contestant in contestants):
        torch._dynamo.reset()  # or it keeps the tensors
    ways = {way: taken.pop(_PROBE + way) for way in probes}
    fastest = min(ways, key=lambda way: _median_of(ways[way], -1))
    limit = probe_bytes / _median_of(ways[fastest], -1) / 1e9
    for name, turns_taken in taken.items():
        _fill(timings[name], turns_taken, row, limit)
        if row.device == "cuda":
            timings[name].host_microseconds = _host_seconds(steps[name], row.device) * 1e6
    ours = timings.get(OURS)
    if ours is not None and not ours.failed:
        for timing in timings.values():
            timing.ratio = None if timing.failed else timing.milliseconds / ours.milliseconds
    return RowResult(
        row=str(row),
        model=row.model,
        optimizer=row.optimizer,
        mode=row.mode,
        dtype=str(row.dtype).removeprefix("torch."),
        threads=row.threads,
        tensors=len(row.shapes),
        parameters=row.numel,
        bytes=row.bytes,
        limit_gigabytes_per_second=limit,
        limit_way=fastest,
        limit_spread=_spread_of(ways[fastest]),
        timings=list(timings.values()),
    )


def _enter(
    contestant: Contestant,
    row: Row,
    timing: Timing,
    steps: dict[str, Step],
) -> None:
    """Check the numbers of a contestant, let it touch all its pages, and add it to `steps`."""
    _require_memory(row)
    row = row._replace(dtype=contestant.dtype or row.dtype)
    timing.wrong = contestant.check(contestant.build, row)
    params = parameters(row)
    start = time.perf_counter()
    step = contestant.build(row, params)
    step()
    _synchronize(row.device)
    timing.first_step_seconds = time.perf_counter() - start
    if contestant.counted:
        timing.bytes_a_parameter = modes.bytes_moved(modes.optimizer_of(step)) / row.numel
    if contestant.compiles:  # the second step, too, where it is the first to find states
        second, steady = (_seconds(step, row.device) for _ in range(2))
        timing.compile_seconds = timing.first_step_seconds + second - 2 * steady
    steps[contestant.name] = step


def _interleave(
    steps: dict[str, Step],
    row: Row,
    repeats: int,
    budget: float,
    progress: Callable[[str], None],
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """Return the turns of each contestant, and who failed, and why."""
    steps_a_turn = REPEATED if row.bytes < SMALL else 1
    queued = QUEUED if row.device == "cuda" and row.bytes >= SMALL else 1
    taken: dict[str, list[Turn]] = {name: [] for name in steps}
    failed: dict[str, str] = {}

    def take_turns(names: Iterable[str]) -> None:
        for name in names:
            if name in failed:
                continue
            try:
                step = steps[name]
                turn = [_seconds(step, row.device, queued) for _ in range(steps_a_turn)]
                taken[name].append(turn)
            except Exception as error:  # such as a lack of memory
                if name.startswith(_PROBE):
                    raise
                failed[name] = reason(error)

    with without_collection(), quiet():
        for _ in range(WARM_UP):
            progress("warming up")
            take_turns(steps)
        once = {name: min(map(sum, taken[name])) for name in steps if name not in failed}
        rounds = turns(once, repeats, budget, thin=steps_a_turn == 1)
        for warm_up in taken.values():
            warm_up.clear()
        for i, names in enumerate(rounds):
            progress(f"round {i + 1} of {len(rounds)}")
            take_turns(names)
    return {name: taken[name] for name in steps if name not in failed}, failed


def turns(once: dict[str, float], repeats: int, budget: float, *, thin: bool) -> list[list[str]]:
    """Return for each round who takes a turn in it, in which order.

    All do, in an order drawn anew: one that always came after a step that frees gigabytes would pay
    for it. Nobody takes two turns one after the other.

    Args:
        once: the seconds of a turn of each.
        repeats: so many rounds with all; 0 for as many as fit into the budget.
        budget: in seconds.
        thin: whether, where there is time for few such rounds, those that take more than THIN times
            as long as fusedopt (or the fastest, if that is not among them) enter one round of THIN.
    """
    random = Random(0)
    fit = max(FEWEST, int(budget / sum(once.values())))
    fast = THIN * once.get(OURS, min(once.values()))
    slow = {name for name, seconds in once.items() if seconds > fast}
    if not thin or fit >= FEWEST * THIN or repeats:
        slow = set()
    elif slow:
        mean = sum(seconds / (THIN if name in slow else 1) for name, seconds in once.items())
        fit = max(FEWEST * THIN, int(budget / mean))
    rounds: list[list[str]] = []
    for i in range(repeats or min(MOST, fit)):
        names = [name for name in once if i % THIN == 0 or name not in slow]
        random.shuffle(names)
        if rounds and names[0] == rounds[-1][-1]:
            names.reverse()
        rounds.append(names)
    return rounds


def _fill(timing: Timing, turns_taken: list[Turn], row: Row, limit: float) -> None:
    median = _median_of(turns_taken, -1)
    timing.milliseconds = median * 1e3
    if len(turns_taken[0]) > 1:
        timing.cold_milliseconds = _median_of(turns_taken, 0) * 1e3
    timing.spread = _spread_of(turns_taken)
    counted = timing.bytes_a_parameter
    moved = row.bytes if counted is None else counted * row.numel
    timing.gigabytes_per_second = moved / median / 1e9
    timing.share_of_limit = timing.gigabytes_per_second / limit
    timing.samples = len(turns_taken)


def _median_of(turns_taken: list[Turn], step: int) -> float:
    """Return the median seconds of the first (0) or last (-1) steps of turns."""
    return statistics.median(turn[step] for turn in turns_taken)


def _spread_of(turns_taken: list[Turn]) -> float:
    return spread([turn[-1] for turn in turns_taken])


def _seconds(step: Step, device: str, queued: int = 1) -> float:
    """Return how long a step takes, one of so many in a row.

    On a GPU, from the first work in the stream to the last.
    """
    if device == "cuda":
        begin, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(queued):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / queued
    start = time.perf_counter()
    for _ in range(queued):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / queued


def _host_seconds(step: Step, device: str) -> float:
    """Return how long a step keeps the host, with nothing left to do on the device."""
    taken = []
    for _ in range(FEWEST):
        _synchronize(device)
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def without_collection() -> Iterator[None]:
    """Keep the garbage collector out of the timings."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def reason(error: Exception) -> str:
    """Return the first line of an error."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:160]


def _require_memory(row: Row) -> None:
    """Refuse what would make the machine swap, or end the process."""
    temporaries = 2  # of torch's foreach
    stays = row.numel * row.dtype.itemsize * (2 + row.states)
    comes = row.numel * row.dtype.itemsize * temporaries + 4 * math.prod(probed(row))
    needed = stays + comes * 5 // 4  # and something for compilers
    meminfo = Path("/proc/meminfo")
    if row.device == "cuda":
        available = torch.cuda.mem_get_info()[0]
    elif meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    else:
        return
    if needed > available:
        raise MemoryError(f"left out: {needed / 1e9:.1f} GB do not fit beside the others")
