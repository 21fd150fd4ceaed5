"""Streams of one parameter that share memory: copied, or refused, never read half written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import _core, _engine
from tests.helpers import assert_same_bits, values

KEYS = {
    "SGD": ["momentum_buffer"],
    "Adam": ["exp_avg", "exp_avg_sq"],
    "AdamW": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "RMSprop": ["square_avg", "grad_avg", "momentum_buffer"],
    "Adagrad": ["sum"],
    "RAdam": ["exp_avg", "exp_avg_sq"],
    "Lion": ["exp_avg"],
}
KWARGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"amsgrad": True},
    "RMSprop": {"centered": True, "momentum": 0.9},
}
EACH_STATE = [(name, key) for name, keys in KEYS.items() for key in keys]
each_state = pytest.mark.parametrize(("name", "key"), EACH_STATE)
N = 101


def stepped_once(name: str) -> tuple[Any, Parameter]:
    p = Parameter(values((N,), 0, torch.float32))
    optimizer = getattr(fusedopt, name)([p], **KWARGS.get(name, {}))
    p.grad = values((N,), 1, torch.float32)
    optimizer.step()
    return optimizer, p


@each_state
@pytest.mark.parametrize("offset", [1, 3, 8, -2])
def test_a_gradient_in_the_memory_of_a_state_is_read_whole(
    name: str, key: str, offset: int, gather: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every instruction set the bits are those of a gradient with memory of its own."""
    results = []
    engines = [_engine.engine]
    if not _engine.engine.emulated:
        engines = [_core.Engine(isa=isa) for isa in fusedopt.isas()]
    for engine, shares in [(engines[0], False), *((engine, True) for engine in engines)]:
        monkeypatch.setattr(_engine, "engine", engine)
        optimizer, p = stepped_once(name)
        memory = values((N + 20,), 7, torch.float32).abs()
        state = memory[10 : 10 + N]
        gradient = memory[10 + offset : 10 + offset + N]
        optimizer.state[p][key] = state if shares else state.clone()
        p.grad = gradient if shares else gradient.clone()
        optimizer.step()
        results.append([p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())])
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert_same_bits(found, expected)


def refusal(optimizer: Any, p: Parameter) -> str:
    """Return what the step says, which has changed nothing."""
    before = [p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())]
    with pytest.raises(ValueError, match="shares memory") as error:
        optimizer.step()
    after = [p.detach(), *optimizer.state[p].values()]
    for found, expected in zip(after, before, strict=True):
        assert_same_bits(found, expected)
    return str(error.value)


@each_state
@pytest.mark.parametrize("offset", [0, 5])
def test_a_state_in_the_memory_of_the_parameter_is_refused(
    name: str, key: str, offset: int, gather: str
) -> None:
    optimizer, p = stepped_once(name)
    memory = values((N + 20,), 7, torch.float32).abs()
    p.data = memory[10 : 10 + N]
    optimizer.state[p][key] = memory[10 + offset : 10 + offset + N]
    assert refusal(optimizer, p) == (
        f"{key} of params[0] shares memory with the parameter; expected memory of its own; store a "
        "clone() of it"
    )


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("name", [name for name, keys in KEYS.items() if len(keys) > 1])
def test_states_in_the_memory_of_each_other_are_refused(
    name: str, offset: int, gather: str
) -> None:
    optimizer, p = stepped_once(name)
    first, second = KEYS[name][-2:]
    memory = values((N + 20,), 7, torch.float32).abs()
    optimizer.state[p][first] = memory[:N]
    optimizer.state[p][second] = memory[offset : offset + N]
    keys = [key for key in optimizer.state[p] if key in (first, second)]
    assert refusal(optimizer, p).startswith(f"{keys[1]} of params[0] shares memory with {keys[0]};")


@pytest.mark.cpu_only("views with gaps have no kernel there")
def test_slow_weights_in_the_memory_of_the_parameter_are_refused() -> None:
    p = Parameter(values((N,), 0, torch.float32))
    optimizer = fusedopt.Lookahead(fusedopt.SGD([p], lr=0.1), k=1)
    p.grad = values((N,), 1, torch.float32)
    optimizer.step()
    optimizer.state[p]["slow"] = p.data
    assert refusal(optimizer, p).startswith("slow of params[0] shares memory with the parameter;")


@pytest.mark.cpu_only("views with gaps have no kernel there")
def test_columns_of_one_matrix_share_nothing(gather: str) -> None:
    results = []
    for shares in (False, True):
        matrix = values((N, 4), 3, torch.float32).abs()
        columns: list[Tensor] = [matrix[:, i] if shares else matrix[:, i].clone() for i in range(4)]
        p = Parameter(columns[0])
        optimizer = fusedopt.Adam([p])
        optimizer.state[p] = {
            "step": torch.tensor(1.0),
            "exp_avg": columns[1],
            "exp_avg_sq": columns[2],
        }
        p.grad = columns[3]
        for _ in range(3):
            optimizer.step()
        results.append([p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())])
    for found, expected in zip(*results, strict=True):
        assert_same_bits(found, expected)
