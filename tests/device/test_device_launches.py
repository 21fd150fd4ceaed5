"""Before the first launch all is there; while launches wait, others run; nothing is asked twice."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt import _core, _engine, _memory
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    parameters,
    set_gradients,
    train,
    values,
)
from tests.registry import PLAIN_CONFIGS, Config


def of_two_kinds() -> tuple[list[Parameter], Optimizer]:
    """Return parameters that take a launch each, with memory of its own before it."""
    params = [*parameters([(5,), (3, 4)], torch.float32), *parameters([(7,)], torch.bfloat16)]
    return params, fusedopt.AdamW(params, lr=0.1, capturable=True, max_grad_norm=0.5)


class Asked:
    """Counts what is asked of the device's memory, and refuses it from some number on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.most = 0, 1_000_000
        for name in ("empty", "scalar"):
            monkeypatch.setattr(_memory, name, self._counted(getattr(_memory, name)))

    def _counted(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*args: Any) -> Tensor:
            if self.count >= self.most:
                raise MemoryError("no more of it")
            self.count += 1
            return make(*args)

        return counted


@pytest.mark.parametrize("warm", [False, True])
def test_out_of_memory_anywhere_leaves_all_parameters(
    warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch)
    params, optimizer = of_two_kinds()
    train(optimizer, params, 1)
    asked.count = 0
    train(optimizer, params, range(1, 2))
    needed = asked.count
    assert needed > 0
    for most in range(needed):
        if not warm:  # an engine that does not know how much steps take
            monkeypatch.setattr(_engine, "engine", _core.Engine(device="emulated"))
        asked.count, asked.most = 0, most
        before = [p.detach().clone() for p in params]
        set_gradients(params, 2)
        with pytest.raises(MemoryError):
            optimizer.step()
        for p, q in zip(params, before, strict=True):
            assert_same_bits(p.detach(), q)
            assert float(optimizer.state[p]["step"]) == 2


@pytest.mark.parametrize(
    ("options", "most"), [({}, 0), ({"max_grad_norm": 0.5}, 2), ({"skip_nonfinite": True}, 3)]
)
def test_a_step_takes_its_memory_at_once(
    options: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it returns, which outlives it."""
    asked = Asked(monkeypatch)
    params = [*parameters([(5,), (3, 4)], torch.float32), *parameters([(7,)], torch.bfloat16)]
    optimizer = fusedopt.AdamW(params, lr=0.1, **options)
    train(optimizer, params, 2)
    asked.count = 0
    train(optimizer, params, range(2, 3))
    assert asked.count <= most


def test_other_threads_run_while_launches_wait() -> None:
    numel = 3_000_000  # an emulated launch of many milliseconds
    p = Parameter(torch.zeros(numel))
    p.grad = torch.ones(numel)
    begun = threading.Event()
    dropped: list[float] = []

    class Watched(fusedopt.SGD):
        def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
            begun.set()
            return super()._scalars(group, t)

    optimizer = Watched([p], lr=1.0)

    def drop() -> None:
        begun.wait()
        p.grad = None
        dropped.append(time.perf_counter())

    thread = threading.Thread(target=drop)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # the GIL changes hands where it is released, and nowhere else
    try:
        thread.start()
        optimizer.step()
        over = time.perf_counter()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert dropped[0] < over
    assert torch.equal(p.detach(), torch.full((numel,), -1.0))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)
def test_usual_parameters_are_read_without_python(
    config: Config, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients need no Python object."""
    asked: list[Tensor] = []
    grad: Any = torch.Tensor.grad

    def get(p: Tensor) -> Any:
        asked.append(p)
        return grad.__get__(p)

    monkeypatch.setattr(torch.Tensor, "grad", property(get, grad.__set__))
    monkeypatch.setattr(_engine, "engine", _core.Engine(device="emulated"))
    assert _engine.engine.fast_gather
    params = parameters([(5,), (3, 4), (0, 3), ()], torch.float32)
    optimizer = config.cls(params, **config.kwargs, **options)
    train(optimizer, params, 2)
    set_gradients(params, 2)
    asked.clear()
    optimizer.step()
    assert not asked


@pytest.mark.parametrize("fails", [False, True])
def test_memory_that_comes_to_be_shared_is_found(fails: bool) -> None:
    """Also if the step that would have found it has failed."""

    def trained(engine: Any) -> Optimizer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_engine, "engine", engine)
            params = parameters([(20_000,), (20_000,), (5,)], torch.float32)
            optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9)
            train(optimizer, params, 2)
            both = values((28_000,), 7, torch.float32)
            params[0].data, params[1].data = both[:20_000], both[8_000:]
            set_gradients(params, 2)
            if fails:
                state = optimizer.state[params[2]]
                momentum, state["momentum_buffer"] = state["momentum_buffer"], torch.zeros(6)
                with pytest.raises(ValueError, match="momentum_buffer"):
                    optimizer.step()
                state["momentum_buffer"] = momentum
            optimizer.step()
            train(optimizer, params, range(3, 4))
        return optimizer

    actual = trained(_engine.engine)
    expected = trained(_core.Engine(device="none"))
    assert_same_state(actual, expected, assert_same_bits)


def test_usual_parameters_among_others() -> None:
    """Each kind that has to be read one by one, in one step with many that have not."""

    def trained(engine: Any) -> Optimizer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_engine, "engine", engine)
            params = parameters([(3, 4)] * 200, torch.float32)
            optimizer = fusedopt.AdamW(params, lr=0.1, capturable=True, max_grad_norm=0.5)
            for step in range(4):
                set_gradients(params, step)
                for i, p in enumerate(params):
                    assert p.grad is not None
                    if i % 7 == 0:
                        p.grad = p.grad.t().contiguous().t()
                    elif i % 11 == 0:
                        p.grad = torch._neg_view(p.grad)
                    elif i % 13 == 0:
                        p.grad = None
                optimizer.step()
        return optimizer

    actual = trained(_core.Engine(device="emulated"))
    expected = trained(_core.Engine(device="emulated", fast_gather=False))
    assert_same_state(actual, expected, assert_same_bits)
