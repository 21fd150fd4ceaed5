"""Gradients that are not walked as their parameter is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import _core, _engine
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    parameters,
    squares,
    values,
)

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("arrange", GRADIENTS.values(), ids=GRADIENTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_gradient_has_the_bits_of_a_contiguous_one(
    arrange: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    p, q = (Parameter(values((6, 50), 0, dtype)) for _ in range(2))
    actual, expected = fusedopt.AdamW([p]), fusedopt.AdamW([q])
    for step in range(2):
        p.grad = arrange(values((6, 50), 1 + step, dtype))
        q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        before = p.grad.clone()
        actual.step()
        expected.step()
        assert_same_bits(p.grad, before)
    assert_same_state(actual, expected, assert_same_bits)


@pytest.mark.parametrize(
    "arrange",
    [
        *GRADIENTS.values(),
        lambda x: torch.stack([x.mT, x.mT], -1)[..., 0].mT,
    ],
    ids=[*GRADIENTS, "transposed and strided"],
)
@pytest.mark.parametrize("grad_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norms_have_the_bits_of_the_cpus(
    arrange: Callable[[Tensor], Tensor], grad_dtype: torch.dtype, device: str
) -> None:
    """Added up in the order in which the gradient lies, and before it is rounded."""

    def found(engine: Any, at: str) -> tuple[Tensor, float]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_engine, "engine", engine)
            p = Parameter(values((130, 70), 0, torch.float64).to(at))
            _set_gradient_of_any_dtype(p, arrange(values((130, 70), 1, grad_dtype).to(at)))
            optimizer = fusedopt.SGD([p], lr=0.1, max_grad_norm=0.1)
            optimizer.step()
            assert p.grad is not None
            on_cpu, sums, others = _engine.engine.norm([p.grad], 2.0, 1)
            assert not others
            return p.detach().cpu(), sums[0].item() if sums else on_cpu

    where = "cuda" if device == "cuda" else "cpu"
    actual = found(_engine.engine, where)
    expected = found(_core.Engine(device="none"), "cpu")
    assert_same_bits(actual[0], expected[0])
    assert actual[1] == expected[1]


def test_gradients_of_another_precision() -> None:
    """Float64 gradients of float32 parameters, and the other way round: rounded once."""
    for dtype, other in [(torch.float32, torch.float64), (torch.float64, torch.bfloat16)]:
        p, q = (Parameter(values((33,), 0, dtype)) for _ in range(2))
        actual, expected = fusedopt.Adam([p], lr=0.1), fusedopt.Adam([q], lr=0.1)
        gradient = values((33,), 1, other)
        _set_gradient_of_any_dtype(p, gradient)
        q.grad = gradient.to(dtype)
        actual.step()
        expected.step()
        assert_same_state(actual, expected, assert_same_bits)


def _set_gradient_of_any_dtype(p: Parameter, gradient: Tensor) -> None:
    data, p.data = p.data, p.data.to(gradient.dtype)
    p.grad = gradient
    p.data = data


def test_a_loss_goes_down() -> None:
    params = parameters([(5,), (3, 4)], torch.float32)
    optimizer = fusedopt.AdamW(params, lr=0.1, max_grad_norm=1.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = squares(params, 1.0)
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
