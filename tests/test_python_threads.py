"""Several threads of Python, each with an optimizer of its own, do not disturb one another."""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor

import fusedopt
from fusedopt import _core  # noqa: F401  (its import is what decides about the GIL)

THREADS, STEPS = 4, 40


def trained(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(n, generator=generator).requires_grad_() for n in (1, 33, 4097)]
    optimizer = fusedopt.AdamW(params, lr=1e-2, max_grad_norm=1.0)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in params]


def test_threads_have_the_bits_that_each_would_have_alone() -> None:
    expected = [trained(seed) for seed in range(THREADS)]
    got: dict[int, list[Tensor]] = {}
    start = threading.Barrier(THREADS)

    def run(seed: int) -> None:
        start.wait()
        got[seed] = trained(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(THREADS):
        for mine, alone in zip(got[seed], expected[seed], strict=True):
            assert torch.equal(mine, alone)


def test_the_module_keeps_the_gil() -> None:
    """A free-threaded Python enables it when the module, which does not say otherwise, comes."""
    assert getattr(sys, "_is_gil_enabled", lambda: True)()
