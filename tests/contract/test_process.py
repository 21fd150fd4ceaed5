"""Threads, forks, and what a step leaves alone in the process."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import sys

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from tests.helpers import (
    assert_same_bits,
    parameters,
    run_script,
    set_gradients,
    threads_of_a_step,
    train,
)


@pytest.mark.cpu_only("devices have threads of their own")
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_set_num_threads_is_obeyed_from_any_thread(two_threads: None) -> None:
    used = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        used.append(threads_of_a_step(1_000_000))
    assert used == [1, 2, 1]


def test_two_python_threads_step_two_optimizers(two_threads: None) -> None:
    shapes = [(100_000,), (7,), (300, 200)]

    def trained(_: int) -> list[Parameter]:
        params = parameters(shapes, torch.float32)
        train(fusedopt.AdamW(params), params, 10)
        return params

    expected = trained(0)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for params in pool.map(trained, range(4)):
            for p, q in zip(params, expected, strict=True):
                assert_same_bits(p.detach(), q.detach())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("gradients", ["fresh", "kept"])
def test_a_forked_child_steps_on(gradients: str, two_threads: None) -> None:
    ahead, behind = parameters([(200_000,)]), parameters([(200_000,)])
    leader, follower = fusedopt.AdamW(ahead), fusedopt.AdamW(behind)
    for optimizer, params, steps in ((leader, ahead, 3), (follower, behind, 2)):
        set_gradients(params, 0)
        for _ in range(steps):
            optimizer.step()
    if gradients == "fresh":
        set_gradients(behind, 0)  # elsewhere
    expected = ahead[0].detach().numpy().tobytes()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)  # kills a child that waits for threads which it does not have
            follower.step()
            os._exit(0 if behind[0].detach().numpy().tobytes() == expected else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_import_and_step_leave_flush_to_zero_alone() -> None:
    run_script(
        """
import torch

def subnormals_survive():
    many = torch.full((100_000,), 1e-40)
    return 5e-324 * 1.0 > 0 and bool((many * 0.5 > 0).all())

torch.set_num_threads(2)
assert subnormals_survive()
import fusedopt
assert subnormals_survive()
p = torch.nn.Parameter(torch.full((100_000,), 1e-40))
p.grad = torch.full((100_000,), 1e-40)
fusedopt.SGD([p], lr=0.5).step()
assert (p > 0).all() and (p < 1e-40).all()
assert subnormals_survive()
"""
    )
