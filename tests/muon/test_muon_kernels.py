"""The rules around the orthogonal matrices, bit for bit on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from fusedopt._numeric import accumulate
from tests.helpers import ENGINES, each_dtype, each_isa, values
from tests.reference import same_bits

FORGET, FACTOR, SCALE = 0.05, 0.37, 0.7
DECAY, STEP_SIZE = 1e-3, 0.02


class Rule(NamedTuple):
    """A rule of csrc/rules/muon.h, with scalars, and the same in numpy."""

    name: str
    scalars: list[float]
    states: int
    of: Callable[..., tuple[Any, ...]]
    """From parameter, gradient and states to the new parameter and states."""


RULES = [
    Rule("muon_momentum", [FORGET], 1, lambda p, g, buf: (p, accumulate(buf, g * FORGET, FORGET))),
    Rule(
        "muon_nesterov",
        [FACTOR, FORGET],
        1,
        lambda p, g, buf: (accumulate(buf, g * FACTOR * FORGET, FORGET), buf),
    ),
    Rule(
        "muon_step",
        [0.1, 1.0, DECAY, STEP_SIZE],
        0,
        lambda p, g: (p - (g * STEP_SIZE + p * DECAY),),
    ),
]


def expected(rule: Rule, streams: list[Tensor]) -> list[Tensor]:
    compute = torch.float64 if streams[0].dtype == torch.float64 else torch.float32
    p, g, *states = (x.to(compute).numpy() for x in streams)
    scale = np.asarray(SCALE, p.dtype)
    stored = [streams[0], *streams[2:]]
    return [
        torch.from_numpy(x).to(old.dtype)
        for x, old in zip(rule.of(p, g * scale, *states), stored, strict=True)
    ]


@pytest.mark.parametrize("n", [0, 1, 3, 16, 37, 5000])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@each_dtype
@each_isa
def test_rules(isa: str, dtype: torch.dtype, rule: Rule, n: int) -> None:
    streams = [values((n,), seed, dtype) for seed in range(2 + rule.states)]
    correct = expected(rule, streams)
    gradient = streams[1].clone()
    ENGINES[isa].update(rule.name, 0, rule.scalars, SCALE, streams, 2)
    for stream, right in zip([streams[0], *streams[2:]], correct, strict=True):
        assert same_bits(stream, right)
    assert same_bits(streams[1], gradient)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_a_rule_only_reads_stays_whatever_it_is(rule: Rule) -> None:
    """Infinities, NaN, subnormals and zeros of either sign."""
    special = torch.tensor([0.0, -0.0, 1e-40, torch.inf, -torch.inf, torch.nan, 1e30])
    streams = [special.clone() for _ in range(2 + rule.states)]
    ENGINES["generic"].update(rule.name, 0, rule.scalars, SCALE, streams, 1)
    if rule.name == "muon_momentum":
        assert same_bits(streams[0], special)
    if rule.name == "muon_nesterov":
        assert same_bits(streams[2], special)
