"""Tables of tensors, and the walk over their elements."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from fusedopt import _core, _engine
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    train,
    values,
)
from tests.registry import PLAIN_CONFIGS, Config


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make and step parameters with the kernels of the CPU meanwhile."""
    with pytest.MonkeyPatch.context() as patch, torch.device("cpu"):
        patch.setattr(_engine, "engine", _core.Engine(device="none"))
        yield


def assert_same_everywhere(actual: Optimizer, expected: Optimizer) -> None:
    """Compare the bits of one optimizer on the device with those of one on the CPU."""
    assert_same_state(actual, expected, lambda a, b: assert_same_bits(a.cpu(), b.cpu()))


DTYPES_OF_STREAMS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize(("dtype", "other"), DTYPES_OF_STREAMS, ids=str)
def test_every_element_is_visited_once(dtype: torch.dtype, other: torch.dtype) -> None:
    """Whatever the alignment of each stream; and nothing before and after them is."""
    tile = _core.tile
    for numel in (0, 1, 2, 7, 8, 9, 255, tile - 1, tile, tile + 1, 3 * tile + 9):
        for before in itertools.product((0, 1, 4, 8), repeat=2):
            whole = [torch.arange(numel + 20).remainder(50).to(t) for t in (dtype, other)]
            p, g = (x[start : start + numel] for x, start in zip(whole, before, strict=True))
            expected = [x.clone() for x in whole]
            expected[0][before[0] : before[0] + numel] += g.to(dtype)
            _engine.engine.update("sgd", 0, [0.0, -1.0], 1.0, [p, g], 1)
            assert all(map(torch.equal, whole, expected)), (numel, before)


def test_more_elements_than_32_bits_count() -> None:
    numel = 3 * 2**32 + 5
    last = (numel - 1) // _core.tile
    assert _core.elements_of_tile(numel, last - 1) == (numel - 5 - _core.tile, numel - 5)
    assert _core.elements_of_tile(numel, last) == (numel - 5, numel)
    begins = [0, last + 1, 2 * (last + 1), 2**40]
    units = [0, last, last + 1, 2 * last + 2, 2**40 - 1, 2**40]
    assert [_core.item_of_unit(begins, unit) for unit in units] == [0, 0, 1, 2, 2, 3]


def test_items_without_elements_are_never_found() -> None:
    """Empty tensors first, twice in the middle, and last: they begin where the next one does."""
    begins = [0, 0, 3, 3, 3, 7]  # the items of 0, 3, 0, 0, 4 and 0 tiles
    assert [_core.item_of_unit(begins, unit) for unit in range(7)] == [1, 1, 1, 4, 4, 4, 4]


SIZES: dict[str, list[int]] = {
    "none": [],
    "one": [7],
    "empty alone": [0],
    "empty first and last": [0, 5, 0, 0, 4097, 3, 0],
    "a page of arguments": [3] * 50,
    "all arguments": [3] * 400,
    "pages": [n % 9 for n in range(2000)],
    "ten thousand": [1] * 10_000,
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_any_number_of_tensors(sizes: list[int]) -> None:
    """With a norm and an update of each, against the same step on the CPU."""

    def trained() -> Any:
        params = [Parameter(values((n,), i, torch.float32)) for i, n in enumerate(sizes)]
        spare = Parameter(torch.ones(3))  # an optimizer needs one; it has no gradient
        optimizer = fusedopt.SGD([*params, spare], lr=0.1, momentum=0.9, max_grad_norm=0.1)
        train(optimizer, params, 2)
        return optimizer

    with on_cpu():
        expected = trained()
    actual = trained()
    assert_same_everywhere(actual, expected)
    if sizes:
        assert_same_bits(actual.grad_norm.cpu(), expected.grad_norm)


def test_a_table_of_many_learning_rates() -> None:
    """Scalars lie in the table too, of each group."""

    def trained() -> Optimizer:
        params = [Parameter(values((3,), i, torch.float32)) for i in range(700)]
        groups = [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(params)]
        optimizer = fusedopt.SGD(groups, momentum=0.9)
        train(optimizer, params, 2)
        return optimizer

    with on_cpu():
        expected = trained()
    assert_same_everywhere(trained(), expected)


@pytest.mark.parametrize("config", PLAIN_CONFIGS, ids=str)
def test_parameters_that_share_memory_are_updated_in_their_order(config: Config) -> None:
    def trained() -> Optimizer:
        x = values((20_000,), 0, torch.float32)
        views = [x[:12_000], x[8_000:], x.view(-1, 4), x[5:9_000]]
        params = [Parameter(view) for view in views]
        optimizer = config.cls(params, **config.kwargs)
        train(optimizer, params, 2)
        return optimizer

    with on_cpu():
        expected = trained()
    assert_same_everywhere(trained(), expected)
