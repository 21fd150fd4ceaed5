"""Steps while a mode is to see torch's operators, and of tensors without values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fusedopt
from tests.helpers import all_params, each_optimizer, oracle, set_gradients, values
from tests.registry import Config
from tests.test_memory_modes import MODES, each_mode, each_plain_config, parameters

pytestmark = pytest.mark.cpu_only("the tensors of a mode are torch's")


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Takes down the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


def params_of(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [Parameter(values(shape, seed, dtype)) for seed, shape in enumerate([(5,), (3, 4)])]


def near(ours: Any, expected: Any) -> None:
    for p, q in zip(all_params(ours), all_params(expected), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


@each_plain_config
@each_mode
def test_first_steps_in_the_memory_modes_leave_what_the_engine_leaves(
    config: Config, mode: str
) -> None:
    def stepped(watching: Any) -> Any:
        params: Any = parameters(torch.bfloat16, [(64, 96), (130,)])
        optimizer = config.cls(params, **config.kwargs, **MODES[mode])
        for step in range(2):
            set_gradients(params, step)
            with watching:
                optimizer.step()
        return optimizer

    ours, expected = stepped(Seen()), stepped(nullcontext())
    for p, q in zip(all_params(ours), all_params(expected), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-2, atol=1e-2)
        state, theirs = ours.state[p], expected.state[q]
        assert {key: x.dtype for key, x in state.items()} == {
            key: x.dtype for key, x in theirs.items()
        }


@each_optimizer
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
def test_a_mode_sees_the_step_and_the_step_is_made(config: Config, options: dict[str, Any]) -> None:
    ours = config.cls(params_of(), **config.kwargs, **options)
    expected = oracle(config)(params_of(), **config.kwargs)
    for step in range(3):
        set_gradients(all_params(ours), step)
        set_gradients(all_params(expected), step)
        if options.get("max_grad_norm"):
            torch.nn.utils.clip_grad_norm_(all_params(expected), 0.5)
        with Seen() as seen:
            ours.step()
        expected.step()
        assert any("add" in name or "sub" in name for name in seen.operators)
    near(ours, expected)


def test_a_mode_sees_nothing_of_a_step_that_is_skipped() -> None:
    (p,) = params = params_of()[:1]
    optimizer = fusedopt.Adam(params, skip_nonfinite=True)
    before = p.detach().clone()
    p.grad = torch.full_like(p, torch.inf)
    with Seen():
        optimizer.step()
    assert torch.equal(p.detach(), before)
    assert optimizer.skipped_steps == 1
    assert not optimizer.state


each_dispatch = pytest.mark.parametrize("pre", [False, True], ids=["", "pre-dispatch"])


@each_dispatch
@each_optimizer
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_a_traced_step_steps(config: Config, options: dict[str, Any], pre: bool) -> None:
    """The graph moves the parameters that it is called with, as an eager step does."""

    def step(weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        params = [w.detach() for w in weights]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        config.cls(params, **config.kwargs, **options).step()
        return params

    weights = [p.detach().clone() for p in params_of()]
    gradients = [values((5,), 7, torch.float32), values((3, 4), 8, torch.float32)]
    graph = make_fx(step, pre_dispatch=pre)(copy.deepcopy(weights), gradients)
    others = [x * 2 for x in gradients]
    traced = graph(copy.deepcopy(weights), others)
    eager = step(copy.deepcopy(weights), others)
    for found, expected, before in zip(traced, eager, weights, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, before)


@each_dispatch
def test_a_traced_step_that_may_be_skipped_is_refused(pre: bool) -> None:
    def step(p: Tensor, gradient: Tensor) -> Tensor:
        p = p.detach()
        p.grad = gradient
        fusedopt.SGD([p], lr=0.1, skip_nonfinite=True).step()
        return p

    with pytest.raises(RuntimeError, match="skip_nonfinite=False"):
        make_fx(step, pre_dispatch=pre)(torch.ones(3), torch.ones(3))


@each_dispatch
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_a_traced_clip_clips(norm_type: float, pre: bool) -> None:
    def clipped(gradient: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.zeros_like(gradient)
        p.grad = gradient.clone()
        norm = fusedopt.clip_grad_norm_([p], 0.5, norm_type)
        assert p.grad is not None
        return p.grad, norm

    gradient = values((3, 4), 1, torch.float32)
    graph = make_fx(clipped, pre_dispatch=pre)(torch.ones(3, 4))
    for found, expected in zip(graph(gradient), clipped(gradient), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("around", [fusedopt.SGD, torch.optim.SGD])
def test_lookahead_under_a_mode(around: Callable[..., Any]) -> None:
    optimizers = [fusedopt.Lookahead(around(params_of(), lr=0.1), k=2) for _ in range(2)]
    for step in range(4):
        for i, optimizer in enumerate(optimizers):
            set_gradients(all_params(optimizer), step)
            if i == 0:
                with Seen():
                    optimizer.step()
            else:
                optimizer.step()
    near(*optimizers)


def test_counters_of_operations_change_nothing() -> None:
    ours, plain = fusedopt.AdamW(params_of()), fusedopt.AdamW(params_of())
    for optimizer in (ours, plain):
        set_gradients(all_params(optimizer), 0)
    with FlopCounterMode(display=False):
        ours.step()
    plain.step()
    near(ours, plain)


def test_a_norm_under_a_mode_takes_any_layout() -> None:
    tensors = [torch.tensor([3.0, 0.0]).to_sparse(), torch.zeros(0), torch.tensor([4.0j])]
    with Seen():
        assert float(fusedopt.get_total_norm(tensors)) == 5
        assert float(fusedopt.get_total_norm(tensors, float("inf"))) == 4


# ---- without values ------------------------------------------------------------------------------


def whole_step(model: torch.nn.Module, x: Tensor, name: str) -> list[Tensor]:
    """Train as memory estimators do; return all norms."""
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(fusedopt, name)(
        model.parameters(), lr=1e-3, max_grad_norm=1.0, skip_nonfinite=True, **momentum
    )
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sum().backward()
        norms.append(fusedopt.clip_grad_norm_(model.parameters(), 1.0))
        norms.append(optimizer.clip_grad_norm_(1.0, float("inf")))
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(fusedopt.get_total_norm(gradients, 1.0))
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert all(optimizer.state[p] for p in model.parameters())
    return norms


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "RAdam", "Lion"])
def test_a_model_on_meta_is_trained_without_values(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = torch.nn.Linear(4, 3, device="meta")
    norms = whole_step(model, torch.ones(2, 4, device="meta"), name)
    assert all(norm.is_meta and norm.shape == () for norm in norms)
    assert [str(w.message) for w in recwarn if "no kernel" not in str(w.message)] == []


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "RAdam", "Lion"])
def test_a_fake_model_is_trained_without_values(name: str) -> None:
    with FakeTensorMode():
        norms = whole_step(torch.nn.Linear(4, 3), torch.ones(2, 4), name)
    assert all(type(norm).__name__ == "FakeTensor" and norm.shape == () for norm in norms)
