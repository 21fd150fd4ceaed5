"""Measuring leaves no traces in other tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    """Measuring sets torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
