"""How the engine reads tensors: usual ones on all threads, without Python; others one by one."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt import _core, _engine
from tests.helpers import (
    SHAPES,
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_config,
    each_optimizer,
    oracle,
    parameters,
    run_script,
    set_gradients,
    slow_gather,
    train,
    values,
)
from tests.registry import Config

MANY = 300  # parameters are read on more than one thread


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- both ways, on some tensors ------------------------------------------------------------------


@each_config
def test_the_slow_gather_gives_the_same_bits(config: Config) -> None:
    params, other_params = parameters(), parameters()
    optimizer = config.cls(params, **config.kwargs)
    other = config.cls(other_params, **config.kwargs)
    train(optimizer, params, 3)
    with slow_gather():
        train(other, other_params, 3)
    assert_same_state(other, optimizer, assert_same_bits)


def test_the_fast_gather_is_used() -> None:
    assert _core.Engine().fast_gather
    assert not _core.Engine(fast_gather=False).fast_gather
    with torch.inference_mode(), torch.device("meta"):
        assert _core.Engine().fast_gather


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("_cdata", property(lambda tensor: 1)),
        ("_cdata", property(lambda tensor: tensor.absent)),
        ("dtype", torch.int64),
        ("data_ptr", lambda tensor: 1),
        ("shape", (2, 2)),
        ("stride", lambda tensor: (1,) * tensor.dim()),
        ("_version", 1),
        ("is_neg", lambda tensor: True),
        ("grad", property(lambda tensor: tensor.detach(), lambda tensor, value: None)),
    ],
)
def test_a_torch_that_the_fast_gather_misreads_is_read_slowly(
    name: str, lie: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "dtype":  # by which the tensors are made that the two ways are compared on
        monkeypatch.setattr(torch, "bfloat16", lie)
    else:
        monkeypatch.setattr(torch.Tensor, name, lie, raising=False)
    assert not _core.Engine().fast_gather
    with torch.inference_mode():
        assert not _core.Engine().fast_gather


class Evasive(torch.Tensor):
    """A wrapper whose class is asked what it is, and fails to say."""

    @staticmethod
    def __new__(cls, size: tuple[int, ...], policy: dict[str, Any]) -> Evasive:
        made: Evasive = torch.Tensor._make_wrapper_subclass(cls, size, **policy)
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch passes func first, its stub has none
        cls, func: Any, *args: Any, **kwargs: Any
    ) -> Any:
        raise NotImplementedError(func)


@pytest.mark.parametrize(
    "policy",
    [
        {"dispatch_sizes_strides_policy": "strides"},
        {"dispatch_sizes_strides_policy": "sizes"},
        {"dispatch_device": True},
        {"dispatch_layout": True},
    ],
    ids=str,
)
def test_a_tensor_that_cannot_be_read_leaves_no_error(policy: dict[str, Any], gather: str) -> None:
    evasive = Evasive((3,), policy)
    _, _, others = _engine.engine.norm([evasive, torch.ones(4)], 2.0, 1)
    assert [each is evasive for each in others] == [True]


# ---- usual parameters among others ---------------------------------------------------------------


def crowd() -> list[Parameter]:
    """Return many parameters, some of them transposed."""
    params = parameters([SHAPES[i % len(SHAPES)] for i in range(MANY)])
    return [
        Parameter(p.detach().transpose(0, 1)) if i % 11 == 1 and p.dim() > 1 else p
        for i, p in enumerate(params)
    ]


def give_gradients(params: list[Parameter], step: int) -> None:
    """Give most parameters a plain gradient, and others one of each kind that is none."""
    set_gradients(params, step)
    for i, p in enumerate(params):
        assert p.grad is not None
        if i % 7 == 0 or (i % 19 == 5 and step == 0):  # never, or too late to count with the others
            p.grad = None
        elif i % 13 == 3 and p.dim() > 1:
            p.grad = p.grad.transpose(0, 1).contiguous().transpose(0, 1)
        elif i % 17 == 4:
            p.grad = torch._neg_view(p.grad)
        elif i % 23 == 6:
            p.grad = torch.imag(torch.complex(p.grad, p.grad).conj())


@each_config
def test_usual_parameters_among_others(config: Config) -> None:
    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        params = crowd()
        half = MANY // 2
        optimizer = make([{"params": params[:half]}, {"params": params[half:]}], **config.kwargs)
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
        return optimizer

    with slow_gather():
        slow = trained(config.cls)
    assert_same_state(slow, trained(oracle(config)), assert_within)
    for count in (1, 2, 3):
        with threads(count):
            assert_same_state(trained(config.cls), slow, assert_same_bits)


@each_optimizer
def test_groups_in_different_steps(config: Config, two_threads: None) -> None:
    """The scalars that the oldest state lets one expect are not those of all parameters."""

    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        params, late = parameters([(5,)] * MANY), parameters([(4,)] * MANY)
        optimizer = make(params, **config.kwargs)
        train(optimizer, params, 2)
        optimizer.add_param_group({"params": late})
        train(optimizer, params + late, range(2, 5))
        return optimizer

    assert_same_state(trained(config.cls), trained(oracle(config)), assert_within)


@each_optimizer
def test_a_parameter_that_is_listed_again_behind_an_older_one(config: Config, gather: str) -> None:
    """Its second step of one has the scalars of the next number."""

    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        a, b = parameters([(5,), (5,)])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = make([b, a, b], **config.kwargs)
        for step in range(4):
            set_gradients([a, b] if step else [a], step)
            optimizer.step()
        return optimizer

    assert_same_state(trained(config.cls), trained(oracle(config)), assert_within)


def test_a_group_that_steps_nothing_may_have_any_options(gather: str) -> None:
    p, frozen = parameters([(5,), (5,)])
    groups: list[dict[str, Any]] = [{"params": [p]}, {"params": [frozen], "betas": (1.0, 0.999)}]
    optimizer = fusedopt.AdamW(groups)
    expected = fusedopt.AdamW(q := parameters([(5,)]))
    for step in range(2):
        set_gradients([p], step)
        set_gradients(q, step)
        optimizer.step()
        expected.step()
    assert_same_bits(p.detach(), q[0].detach())
    frozen.grad = torch.ones_like(frozen)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()


class Meddling(Parameter):
    """Runs Python code when it is asked for its gradient."""

    meddle: Callable[[], None]

    @property
    def grad(self) -> Any:  # type: ignore[override]  # torch has an attribute
        self.meddle()
        return torch.ones(2)


def test_a_state_that_goes_while_others_are_read(gather: str) -> None:
    first, last = parameters([(5,), (3, 4)])
    last = Parameter(last.detach().t())  # not a usual one: it is read after the others
    meddling = Meddling(torch.zeros(2))
    meddling.meddle = lambda: None
    optimizer = fusedopt.AdamW([first, meddling, last])
    set_gradients([first, last], 0)
    optimizer.step()
    others: list[dict[str, Any]] = []

    def replace() -> None:
        if optimizer.state.pop(last, None) is not None:
            others.extend({"step": torch.tensor(7.0)} for _ in range(100))

    meddling.meddle = replace
    optimizer.step()
    assert optimizer.state[last]["step"].item() == 1
    assert {other["step"].item() for other in others} == {7}


def test_an_error_among_many_changes_nothing(two_threads: None, gather: str) -> None:
    params = parameters([(5,)] * MANY)
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 2)
    expected = [p.detach().clone() for p in params]
    set_gradients(params, 2)
    optimizer.state[params[200]]["exp_avg"] = torch.zeros(6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"exp_avg of params\[200\] has shape \(6,\)"):
        optimizer.step()
    for p, q in zip(params, expected, strict=True):
        assert_same_bits(p.detach(), q)
        assert optimizer.state[p]["step"].item() == 2


def test_many_gradients_that_ask_python() -> None:
    """Only the thread with the GIL may read them: another would wait for it for ever."""
    output = run_script("""
import torch, fusedopt
from tests.test_gather import MANY, Evasive

class Answering(Evasive):
    @classmethod
    def __torch_dispatch__(cls, func, *args, **kwargs):
        answers = {"sym_size": (3,), "sym_stride": (1,), "sym_numel": 3, "is_contiguous": True}
        return answers[func.__name__.split(".")[0]]

torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.ones(3)) for _ in range(MANY)]
for p in params:
    p.grad = Answering((3,), {"dispatch_sizes_strides_policy": "sizes"})
try:
    fusedopt.SGD(params, lr=0.1).step()
except UserWarning as warning:  # an error here
    print(str(warning)[:26], sum(p.tolist() == [1, 1, 1] for p in params))
""")
    assert output == "fusedopt.SGD has no kernel 300"


# ---- other Python code, meanwhile ----------------------------------------------------------------


class Watched(fusedopt.SGD):
    """Calls a function when it is asked for its scalars, which is before anything is read."""

    watch: Callable[[], None]

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        self.watch()
        return super()._scalars(group, t)


def test_gradients_that_another_thread_drops_while_kernels_run() -> None:
    numel = 40_000_000  # a step of many milliseconds, without the GIL
    p = Parameter(torch.zeros(numel))
    p.grad = torch.ones(numel)
    optimizer = Watched([p], lr=1.0)
    begun = threading.Event()
    optimizer.watch = begun.set
    dropped: list[float] = []

    def drop() -> None:
        begun.wait()
        p.grad = None
        dropped.append(time.perf_counter())

    thread = threading.Thread(target=drop)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # the GIL changes hands where it is released, and nowhere else
    try:
        thread.start()
        with threads(1):
            optimizer.step()
        over = time.perf_counter()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert dropped[0] < over
    assert p.grad is None
    assert torch.equal(p.detach(), torch.full((numel,), -1.0))


def test_a_step_inside_a_step(two_threads: None) -> None:
    params, inner_params = parameters([(5,)] * MANY), parameters([(4,)] * 2 * MANY)
    optimizer, inner = Watched(params, lr=0.5), fusedopt.SGD(inner_params, lr=0.5)
    expected = [p.detach() - 0.5 * values((5,), 1000 + i) for i, p in enumerate(params)]
    expected += [p.detach() - 0.5 * values((4,), 1000 + i) for i, p in enumerate(inner_params)]
    set_gradients(params, 0)
    set_gradients(inner_params, 0)
    inner_steps = [inner.step]

    def step_inside() -> None:
        if inner_steps:
            inner_steps.pop()()

    optimizer.watch = step_inside
    optimizer.step()
    for p, q in zip(params + inner_params, expected, strict=True):
        assert_same_bits(p.detach(), q)
