"""States in tensor classes of other libraries, which hold their elements in another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt

pytestmark = pytest.mark.cpu_only("not a test of what devices do")


class Halved(Tensor):
    """A wrapper without memory of its own, as 8-bit states are."""

    stored: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor) -> Halved:
        made = Tensor._make_wrapper_subclass(
            cls, stored.shape, dtype=torch.float32, device=stored.device
        )
        made.stored = stored.half()
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's has other types
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"Halved has no {func}")


def test_the_error_names_the_class_of_a_state_that_is_none_of_torch_s(gather: str) -> None:
    p = Parameter(torch.ones(3))
    optimizer = fusedopt.Adam([p])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = Halved(torch.ones(3))
    with pytest.raises(TypeError, match=r"exp_avg of params.0. is a torch.strided Halved of"):
        optimizer.step()
