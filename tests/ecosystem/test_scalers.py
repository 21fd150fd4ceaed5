"""Loss scales and checkpoints as others handle them: what docs/integrations.md says of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from torch.nn import Parameter

import fusedopt


def scaler_and_closure(amp_scaling: bool) -> tuple[Any, Parameter, Any, Any]:
    p = Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([p], lr=1.0, amp_scaling=amp_scaling)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.sum()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss

    closure()  # the scale is made by its first use, and inf checks want gradients
    return scaler, p, optimizer, closure


def test_a_closure_given_to_a_scaler_is_stepped_with_scaled_gradients() -> None:
    """Torch refuses it by keyword alone; the closure's gradients come after the unscaling."""
    scaler, p, optimizer, closure = scaler_and_closure(amp_scaling=False)
    scaler.step(optimizer, closure)
    assert torch.equal(p.detach(), torch.full((3,), 1.0 - 4.0))
    with pytest.raises(RuntimeError, match=r"[Cc]losure"):
        scaler.step(optimizer, closure=closure)


def test_with_amp_scaling_a_closure_s_gradients_are_unscaled() -> None:
    scaler, p, optimizer, closure = scaler_and_closure(amp_scaling=True)
    scaler.step(optimizer, closure)
    assert torch.equal(p.detach(), torch.zeros(3))


def test_with_amp_scaling_gradients_stay_scaled() -> None:
    scaler, p, optimizer, _ = scaler_and_closure(amp_scaling=True)
    scaler.step(optimizer)
    assert p.grad is not None
    assert torch.equal(p.grad, torch.full((3,), 4.0))
    assert torch.equal(p.detach(), torch.zeros(3))


@pytest.mark.parametrize("family", [fusedopt, torch.optim], ids=["fusedopt", "torch"])
def test_a_state_dict_that_is_not_copied_shares_its_tensors(family: Any) -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    first, second = family.Adam([p]), family.Adam([q])
    p.grad = q.grad = torch.ones(3)
    first.step()
    second.load_state_dict(first.state_dict())
    before = first.state[p]["exp_avg"].clone()
    second.step()
    assert not torch.equal(first.state[p]["exp_avg"], before)


def test_accelerate_updates_the_scale_after_each_of_several_optimizers() -> None:
    """The second one unscales by what the first one's update has made of the scale."""
    kwargs = GradScalerKwargs(init_scale=4.0, growth_interval=1)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[kwargs])
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [fusedopt.SGD([p], lr=1.0) for p in params]
    prepared = [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]
    for optimizer in prepared:
        optimizer.scaler = scaler
    loss = torch.stack([p.sum() for p in params]).sum()
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    for optimizer in prepared:
        optimizer.step()
    assert torch.equal(params[0].detach(), torch.zeros(3))
    assert torch.equal(params[1].detach(), torch.full((3,), 0.5))  # half of its step
