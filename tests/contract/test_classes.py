"""What torch and the libraries on it expect of the classes."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from torch.optim import Optimizer

import fusedopt
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    each_config,
    each_torch_optimizer,
    parameters,
    train,
)
from tests.registry import BAD_ARGUMENTS, Config

# Keyword-only arguments that every class may add to torch's.
ADDITIONS = {
    "max_grad_norm",
    "skip_nonfinite",
    "skip_spikes",
    "amp_scaling",
    "state_dtype",
    "master_weights",
    "stochastic_rounding",
    "seed",
}


@each_torch_optimizer
def test_subclasses_the_torch_class_of_the_same_name(config: Config) -> None:
    assert issubclass(config.cls, config.torch_cls)
    assert isinstance(config.cls(parameters()), config.torch_cls)


def test_lion_subclasses_optimizer() -> None:
    assert isinstance(fusedopt.Lion(parameters()), Optimizer)


@each_torch_optimizer
def test_signature_is_torchs(config: Config) -> None:
    signature = inspect.signature(config.cls)
    torchs = [p for p in signature.parameters.values() if p.name not in ADDITIONS]
    assert torchs == list(inspect.signature(config.torch_cls).parameters.values())
    added = [p for p in signature.parameters.values() if p.name in ADDITIONS]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in added)


@pytest.mark.parametrize(("config", "message"), BAD_ARGUMENTS, ids=str)
def test_validation_messages_are_torchs(config: Config, message: str) -> None:
    for cls in filter(None, (config.cls, config.torch_cls)):
        with pytest.raises(ValueError) as raised:  # noqa: PT011  (compared as a whole below)
            cls(parameters(), **config.kwargs)
        assert str(raised.value) == message


@each_torch_optimizer
def test_group_keys_are_torchs(config: Config) -> None:
    """Libraries that flatten checkpoints fail on keys they do not know."""
    actual = config.cls(parameters(), **config.kwargs).param_groups[0]
    expected = config.torch_cls(parameters(), **config.kwargs).param_groups[0]
    assert {**actual, "params": None} == {**expected, "params": None}


@each_config
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_copies_go_on_like_the_original(config: Config, copied: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = config.cls(params, **config.kwargs)
    train(optimizer, params, 2)
    other_params, other = copied((params, optimizer))
    train(optimizer, params, range(2, 4))
    train(other, other_params, range(2, 4))
    assert other is not optimizer
    assert_same_state(other, optimizer, assert_same_bits)


@pytest.mark.parametrize("option", ["foreach", "fused"])
@pytest.mark.parametrize("value", [True, False, None])
@each_torch_optimizer
def test_foreach_and_fused_change_nothing(config: Config, option: str, value: bool | None) -> None:
    if option not in inspect.signature(config.torch_cls).parameters:
        with pytest.raises(TypeError, match=option):  # as torch
            config.cls(parameters(), **{option: value})
        return
    params, plain_params = parameters(), parameters()
    optimizer = config.cls(params, **config.kwargs, **{option: value})
    plain = config.cls(plain_params, **config.kwargs)
    train(optimizer, params, 3)
    train(plain, plain_params, 3)
    assert_same_state(optimizer, plain, assert_same_bits)
