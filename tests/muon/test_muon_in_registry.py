"""What tests of all optimizers leave out, by tests/registry.py, for those that step matrices."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import parameters, train
from tests.muon.oracle import MuonWithAuxAdam, TorchMuonWithAuxAdam
from tests.registry import NOT_FOR, PLAIN_CONFIGS

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize("name", sorted({test for some in NOT_FOR.values() for test in some}))
def test_each_of_them_is_there(name: str) -> None:
    assert any(f"def {name}(" in path.read_text() for path in TESTS.rglob("test_*.py"))


def test_each_has_a_reason_and_an_optimizer() -> None:
    assert NOT_FOR.keys() <= {config.name for config in PLAIN_CONFIGS}
    assert all(len(reason) > 20 for some in NOT_FOR.values() for reason in some.values())


@pytest.mark.parametrize("cls", [MuonWithAuxAdam, TorchMuonWithAuxAdam])
def test_all_others_have_both_kinds_of_groups(cls: type) -> None:
    params = parameters()
    optimizer = cls(params)
    assert {group["use_muon"] for group in optimizer.param_groups} == {True, False}
    assert [p for group in optimizer.param_groups for p in group["params"]] == params
    train(optimizer, params, 2)
    keys = [set(optimizer.state[p]) for p in params if p.numel()]
    assert {"momentum_buffer"} in keys
    assert {"step", "exp_avg", "exp_avg_sq"} in keys
