"""What tests of devices share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor


@contextmanager
def never_waiting() -> Iterator[None]:
    """Fail where the CPU asks for a number of the device."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            if torch.get_default_device().type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            else:
                for name in ("item", "__float__", "__bool__", "__int__", "tolist", "cpu"):
                    patch.setattr(Tensor, name, lambda *_: pytest.fail("waited"))
            yield
        finally:
            if torch.get_default_device().type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
