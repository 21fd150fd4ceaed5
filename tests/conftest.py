"""Fixtures that several test files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import slow_gather

torch.set_warn_always(True)  # or a test would pass because an earlier one has used up a warning


@pytest.fixture(params=["fast", "slow"])
def gather(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with both ways in which the engine reads tensors."""
    if request.param == "fast":
        yield request.param
        return
    with slow_gather():
        yield request.param


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Step on two threads, as far as the work is enough for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
