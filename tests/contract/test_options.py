"""The options that every class adds to torch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

import fusedopt
from tests.helpers import (
    all_params,
    assert_same_bits,
    each_optimizer,
    parameters,
    set_gradients,
)
from tests.registry import Config


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@each_optimizer
def test_options_live_on_the_optimizer_and_survive_copies(
    config: Config, copied: Callable[[Any], Any]
) -> None:
    options = {"max_grad_norm": 0.25, "skip_nonfinite": True, "amp_scaling": True}
    optimizer = config.cls(parameters(), **config.kwargs, **options)
    plain = config.cls(parameters(), **config.kwargs)
    optimizer.skipped_steps = 3
    assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()
    assert optimizer.state_dict()["param_groups"] == plain.state_dict()["param_groups"]
    again = copied(optimizer)
    again.load_state_dict(plain.state_dict())  # which has none of them
    for name, value in {**options, "skipped_steps": 3}.items():
        assert getattr(optimizer, name) == value
        assert getattr(again, name) == value


def test_a_pickle_without_the_options_has_their_defaults() -> None:
    state = fusedopt.SGD(parameters([(3,)]), lr=0.1).__getstate__()
    old = {name: state[name] for name in ("defaults", "state", "param_groups")}
    optimizer = fusedopt.SGD.__new__(fusedopt.SGD)
    optimizer.__setstate__(old)
    set_gradients(all_params(optimizer), 0)
    optimizer.step()
    assert (optimizer.max_grad_norm, optimizer.grad_norm, optimizer.skipped_steps) == (
        None,
        None,
        0,
    )


def test_max_grad_norm_may_change() -> None:
    (p,) = parameters([(5,)])
    optimizer = fusedopt.SGD([p], lr=0.1)
    set_gradients([p], 0)
    before = p.detach().clone()
    optimizer.max_grad_norm = 0.0
    optimizer.step()
    assert_same_bits(p.detach(), before)
