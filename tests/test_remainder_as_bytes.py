"""Checkpoints have what a bfloat16 parameter lacks of float32 as bytes, which any rank can send."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from tests.reference import same_bits
from tests.test_memory_modes import layouts, parameters, set_gradients

SHAPES = [(8, 3, 5, 11), (), (0, 3), (7,)]


def trained(params: list[Tensor], optimizer: Any, steps: range) -> Any:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
    return optimizer


def make(params: list[Tensor]) -> Any:
    return fusedopt.AdamW(params, master_weights=True)


def test_they_are_the_bytes_of_the_state_not_a_copy() -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = trained(params, make(params), range(2))
    for p, state in zip(params, optimizer.state_dict()["state"].values(), strict=True):
        remainder = optimizer.state[p]["remainder"]
        assert remainder.dtype == torch.int16
        assert (state["remainder"].dtype, state["remainder"].shape) == (torch.uint8, (*p.shape, 2))
        assert state["remainder"].data_ptr() == remainder.data_ptr()


def of_integers(x: Tensor, p: Tensor) -> Tensor:
    return x.clone().view(torch.int16).squeeze(-1)


def in_another_layout(x: Tensor, p: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize("form", [lambda x, p: x, of_integers, in_another_layout])
def test_any_form_of_them_is_loaded(form: Any) -> None:
    (start,) = parameters(torch.bfloat16, SHAPES[:1])
    for layout in [start.detach(), *layouts(start.detach())]:
        p = layout.detach().requires_grad_()
        optimizer = trained([p], make([p]), range(2))
        q = p.detach().clone().requires_grad_()
        saved = copy.deepcopy(optimizer.state_dict())
        state = saved["state"][0]
        state["remainder"] = form(state["remainder"], p)
        resumed = make([q])
        resumed.load_state_dict(saved)
        assert same_bits(resumed._master(q), optimizer._master(p))
        trained([p], optimizer, range(2, 4))
        trained([q], resumed, range(2, 4))
        assert same_bits(resumed._master(q), optimizer._master(p))


def test_hooks_see_what_is_returned() -> None:
    params = parameters(torch.bfloat16, SHAPES)
    optimizer = trained(params, make(params), range(1))
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, whole: seen.append(whole))
    returned = optimizer.state_dict()
    assert seen == [returned]
