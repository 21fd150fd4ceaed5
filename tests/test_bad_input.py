"""Bad input: a message that says what to do, and nothing has changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from tests.helpers import assert_same_bits, bits, each_optimizer, parameters, set_gradients, values
from tests.registry import BAD_INPUTS, BadInput, Config

each_bad_input = pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.id)


def prepared(config: Config) -> tuple[Any, dict[str, Parameter]]:
    """Return an optimizer two steps old. 'late' has its first gradient now, and no state."""
    tensors = {
        "complex": values((3, 2), 1, torch.float32),
        "first": values((5,), 2, torch.float32),
        "late": values((4,), 3, torch.float32),
        "layer.weight": values((8, 4), 4, torch.float32),
        "last": values((6,), 5, torch.float32),
    }
    tensors["complex"] = torch.view_as_complex(tensors["complex"])
    named = {name: Parameter(tensor) for name, tensor in tensors.items()}
    items = list(named.items())
    late = items.pop(2)
    groups = [{"params": items[:2]}, {"params": [late, *items[2:]], "lr": 0.05}]
    optimizer = config.cls(groups, **config.kwargs)
    for step in range(2):
        set_gradients([p for _, p in items], step)
        optimizer.step()
    set_gradients(list(named.values()), 2)
    return optimizer, named


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """Everything that an error must not change, by name."""
    seen: dict[str, Any] = {"parameters with state": [id(p) for p in optimizer.state]}

    def look(name: str, value: Any) -> None:
        if isinstance(value, dict):
            seen[f"keys of {name}"] = list(value)
            for key, item in value.items():
                look(f"{key} of {name}", item)
        elif isinstance(value, Tensor):
            seen[f"identity of {name}"] = id(value)
            seen[f"version of {name}"] = value._version
            if value.device.type != "meta":
                seen[f"bits of {name}"] = bits(value).flatten().tolist()
                seen[f"memory of {name}"] = None if value.is_sparse else value.data_ptr()
        else:
            seen[name] = repr(value)

    for g, group in enumerate(optimizer.param_groups):
        look(f"group {g}", {key: value for key, value in group.items() if key != "params"})
        for i, p in enumerate(group["params"]):
            look(f"params[{i}] of group {g}", p)
            look(f"grad of params[{i}] of group {g}", p.grad)
            look(f"state of params[{i}] of group {g}", optimizer.state.get(p))
    return seen


def changes(optimizer: Optimizer, before: dict[str, Any]) -> list[str]:
    after = snapshot(optimizer)
    return [name for name in before | after if before.get(name) != after.get(name)]


@pytest.mark.cpu_only("messages name the device")
@pytest.mark.filterwarnings("ignore:fusedopt")
@each_bad_input
def test_message_names_all_and_nothing_has_changed(bad: BadInput, gather: str) -> None:
    optimizer, named = prepared(bad.config)
    bad.damage(optimizer, named["layer.weight"])
    before = snapshot(optimizer)
    with pytest.raises(bad.error) as raised:
        optimizer.step()
    assert str(raised.value) == bad.message
    assert changes(optimizer, before) == []


@pytest.mark.filterwarnings("ignore:fusedopt")
@each_optimizer
def test_after_an_error_the_next_step_is_as_if_it_had_not_been(config: Config) -> None:
    optimizer, named = prepared(config)
    undisturbed, expected = prepared(config)
    p = named["layer.weight"]
    kept = p.data
    p.data = torch.ones(4, 4)
    with pytest.raises(ValueError, match="has shape"):
        optimizer.step()
    p.data = kept
    optimizer.step()
    undisturbed.step()
    for name, q in expected.items():
        assert_same_bits(named[name].detach(), q.detach())
        for key, value in undisturbed.state[q].items():
            assert_same_bits(optimizer.state[named[name]][key], value)


@pytest.mark.filterwarnings("ignore:fusedopt")
@pytest.mark.parametrize(
    "hyper_parameters",
    [{"lr": torch.tensor([0.1, 0.1])}, {"lr": None}, {"lr": "fast"}, {"weight_decay": "much"}],
    ids=str,
)
@each_optimizer
def test_hyper_parameters_that_cannot_be_read_change_nothing(
    config: Config, hyper_parameters: dict[str, Any]
) -> None:
    optimizer, _ = prepared(config)
    optimizer.param_groups[1].update(hyper_parameters)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        optimizer.step()
    assert changes(optimizer, before) == []


@pytest.mark.cpu_only("the warning is ignored with --device")
def test_a_warning_that_is_made_an_error_changes_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer, named = prepared(Config("SGD", {"lr": 0.1, "momentum": 0.9}))
    named["layer.weight"].grad = torch.ones(8, 4).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(UserWarning, match="sparse gradients"):
        optimizer.step()
    assert changes(optimizer, before) == []


@pytest.mark.parametrize(
    ("named", "groups", "name"),
    [
        (False, 1, "params[1]"),
        (False, 2, "params[1] of group 1"),
        (True, 1, "params[1] ('weight.1')"),
        (True, 2, "params[1] ('weight.1') of group 1"),
    ],
)
def test_how_messages_name_a_parameter(named: bool, groups: int, name: str) -> None:
    params = parameters([(3,)] * 2 * groups)
    set_gradients(params, 0)
    params[-1].data = torch.ones(2, dtype=torch.float64)
    pairs = [(f"weight.{i % 2}", p) if named else p for i, p in enumerate(params)]
    optimizer = fusedopt.SGD([{"params": pairs[2 * g : 2 * g + 2]} for g in range(groups)], lr=0.1)
    with pytest.raises(ValueError, match="has shape") as raised:
        optimizer.step()
    assert str(raised.value).startswith(f"grad of {name} has shape (3,), expected (2,)")


def test_parameters_that_came_after_the_names_are_named_by_their_index() -> None:
    """The list of parameters may be replaced, and then the names are too few."""
    first, second = parameters([(3,), (3,)])
    optimizer = fusedopt.SGD([("first", first)], lr=0.1)
    optimizer.param_groups[0]["params"] = [first, second]
    set_gradients([first, second], 0)
    second.data = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"grad of params\[1\] has shape"):
        optimizer.step()


@each_optimizer
def test_a_closure_that_raises_changes_nothing(config: Config) -> None:
    params = parameters()
    set_gradients(params, 0)
    optimizer = config.cls(params, **config.kwargs)
    before = snapshot(optimizer)

    def closure() -> float:
        raise KeyError("closure")

    with pytest.raises(KeyError, match="closure"):
        optimizer.step(closure)
    assert changes(optimizer, before) == []
