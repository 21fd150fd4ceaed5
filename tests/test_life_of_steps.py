"""What lives how long around a step: released gradients, Lookahead's count, compiled makers."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from tests.helpers import assert_same_bits, values

pytestmark = pytest.mark.cpu_only("not a test of what devices do")


def model_and_loss() -> tuple[torch.nn.Sequential, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    return model, lambda: model(values((16, 4), 3, torch.float32)).square().mean()


@pytest.mark.parametrize("keeps_handle", [False, True])
def test_a_released_model_is_freed(keeps_handle: bool) -> None:
    model, loss = model_and_loss()
    optimizer = fusedopt.AdamW(model.parameters())
    handle = fusedopt.release_gradients(model, optimizer)
    if not keeps_handle:
        del handle
    loss().backward()
    gone: list[weakref.ref[Any]] = [
        weakref.ref(x) for x in (model, optimizer, next(model.parameters()))
    ]
    gone += [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
    del model, loss, optimizer
    if keeps_handle:
        del handle
    gc.collect()
    assert [x() for x in gone] == [None] * len(gone)


def test_the_returned_handle_keeps_the_optimizer() -> None:
    model, loss = model_and_loss()
    before = next(model.parameters()).detach().clone()
    handle = fusedopt.release_gradients(model, fusedopt.SGD(model.parameters(), lr=0.1))
    gc.collect()
    loss().backward()
    assert not torch.equal(next(model.parameters()).detach(), before)
    handle.remove()


def test_an_optimizer_that_nobody_kept_is_missed() -> None:
    model, loss = model_and_loss()
    fusedopt.release_gradients(model, fusedopt.SGD(model.parameters(), lr=0.1))
    gc.collect()
    with pytest.raises(RuntimeError, match="keep it, or what release_gradients returned"):
        loss().backward()


@pytest.mark.filterwarnings("ignore:.*duplicate parameters:UserWarning")
@pytest.mark.parametrize("one_group", [True, False], ids=["one-group", "two-groups"])
def test_a_parameter_that_is_listed_twice_is_released_with_the_bits_of_a_step(
    one_group: bool,
) -> None:
    results = []
    for releases in (False, True):
        model, loss = model_and_loss()
        params = list(model.parameters())
        if one_group:
            optimizer = fusedopt.SGD([*params, params[0]], lr=0.1, momentum=0.9)
        else:
            optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9)
            optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], "lr": 0.05})
            optimizer.param_groups[1]["params"].append(params[0])
        handle = fusedopt.release_gradients(model, optimizer) if releases else None
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert (handle is not None) == releases
        results.append([p.detach().clone() for p in params])
    for found, expected in zip(*results, strict=True):
        assert_same_bits(found, expected)


@pytest.mark.parametrize("around", [fusedopt.SGD, torch.optim.SGD])
def test_lookahead_counts_a_step_behind_which_a_hook_fails(around: Any) -> None:
    results = []
    for fails in (False, True):
        p = Parameter(torch.ones(4))
        inner = around([p], lr=0.1)

        def fail(*_: Any) -> None:
            raise InterruptedError

        optimizer = fusedopt.Lookahead(inner, k=2)
        for step in range(5):
            p.grad = values((4,), step, torch.float32)
            hook = inner.register_step_post_hook(fail) if fails and step in (0, 1) else None
            if hook:
                with pytest.raises(InterruptedError):
                    optimizer.step()
                hook.remove()
            else:
                optimizer.step()
        assert optimizer.param_groups[0]["lookahead_step"] == 1
        results.append([p.detach(), optimizer.state[p]["slow"]])
    for found, expected in zip(*results, strict=True):
        assert_same_bits(found, expected)


def test_an_optimizer_made_in_a_compiled_function_has_all_that_it_needs() -> None:
    made: list[Any] = []

    def make(p: torch.Tensor) -> torch.Tensor:
        made.append(fusedopt.SGD([p], lr=0.1, momentum=0.9, max_grad_norm=1.0))
        return p * 2

    p = Parameter(torch.ones(3))
    torch.compile(make, backend="eager")(p)
    p.grad = torch.full((3,), 10.0)
    made[-1].step()
    assert made[-1].max_grad_norm == 1.0
    assert float((1 - p.detach()).norm()) == pytest.approx(0.1, rel=1e-4)
