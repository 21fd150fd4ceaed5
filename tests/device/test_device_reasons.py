"""Why a device has no kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt import _core, _engine


@pytest.fixture
def outdated(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_engine, "engine", _core.Engine(device="outdated"))


@pytest.mark.parametrize("cls", [fusedopt.AdamW, fusedopt.SGD, fusedopt.Lion])
def test_the_warning_says_why(cls: Any, outdated: None) -> None:
    p = Parameter(torch.ones(3, device="cpu"))
    p.grad = torch.ones(3, device="cpu")
    optimizer = cls([p], lr=0.1)
    with pytest.warns(UserWarning, match=r"on cpu \(the driver is from another age\): "):
        optimizer.step()
    assert (p < 1).all()


def test_a_build_without_kernels_says_so() -> None:
    assert _core.Engine(device="none").why_not(0) == "this build has no CUDA kernels"
    assert _core.Engine(device="emulated").why_not(0) == ""
    assert _core.Engine(device="outdated").why_not(0) == "the driver is from another age"
