"""What a step costs besides its bytes: many tiny tensors, each with a fresh gradient.

Every step follows a real backward pass, which leaves all gradients in new tensors, as training
does. Three models are stepped in turn, and their differences are the parts of the overhead:

- rest: a step with one empty tensor. All that happens once a step: hooks, closure, groups.
- gather: what 2000 empty tensors take longer. Reading, checking and booking each of them.
- kernel: what 2000 tensors of 16 elements take longer than empty ones. The arithmetic, waiting
  for memory included.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from fusedopt.bench.contestants import OURS, Contestant, quiet
from fusedopt.bench.measure import reason, without_collection
from fusedopt.bench.modes import Step
from fusedopt.bench.results import Overhead, spread
from fusedopt.bench.rows import Row

TENSORS, ELEMENTS = 2000, 16
_EMPTY, _ONE = "empty", "one"


class _Model:
    """Parameters whose gradients come from autograd, each from an operator of its own."""

    def __init__(self, tensors: int, elements: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            torch.randn(elements, generator=generator).requires_grad_() for _ in range(tensors)
        ]
        self._factors = [torch.randn(elements, generator=generator) for _ in range(tensors)]

    def backward(self) -> None:
        """Replace all gradients."""
        for p in self.params:
            p.grad = None
        pairs = zip(self.params, self._factors, strict=True)
        loss = torch.stack([(p * factor).sum() for p, factor in pairs]).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def overhead(
    row: Row,
    contestants: list[Contestant],
    *,
    tensors: int = TENSORS,
    repeats: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> Overhead:
    """Measure the overhead of an optimizer; of the row, only its options count."""
    torch.set_num_threads(row.threads)
    steps: dict[str, tuple[_Model, Step]] = {}
    failed: dict[str, str] = {}

    def enter(name: str, contestant: Contestant, model: _Model) -> None:
        progress(name)
        try:
            with quiet():
                step = contestant.build(row, model.params)
                for _ in range(3):
                    model.backward()
                    step()
            steps[name] = model, step
        except Exception as error:  # a peer may raise anything
            failed[name] = reason(error)

    for contestant in contestants:
        if contestant.enters(row) and not contestant.missing:
            enter(contestant.name, contestant, _Model(tensors, ELEMENTS))
            if contestant.name == OURS:
                enter(_EMPTY, contestant, _Model(tensors, 0))
                enter(_ONE, contestant, _Model(1, 0))

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with without_collection(), quiet():
        for i in range(rounds := repeats or 30):
            progress(f"round {i + 1} of {rounds}")
            for name, (model, step) in steps.items():
                model.backward()
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    each = {name: statistics.median(times) * 1e6 / tensors for name, times in seconds.items()}
    empty, one = each.pop(_EMPTY), each.pop(_ONE)
    return Overhead(
        optimizer=row.optimizer,
        tensors=tensors,
        threads=row.threads,
        gather=empty - one,
        kernel=each[OURS] - empty,
        rest=one,
        totals=each,
        failed=failed,
        spread=max(spread(seconds[name]) for name in (OURS, _EMPTY, _ONE)),
    )
