"""Hooks around a step fire once, and when they are there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

import fusedopt
from tests.helpers import (
    each_optimizer,
    parameters,
    train,
)
from tests.registry import Config


@pytest.mark.filterwarnings("ignore:fusedopt")
@pytest.mark.parametrize("falls_back", [False, True])
@each_optimizer
def test_hooks_fire_once(config: Config, falls_back: bool) -> None:
    if config.torch_cls:
        config.torch_cls(parameters())  # torch wraps the step of a class when it is first made
    p = Parameter(torch.ones(3, dtype=torch.complex64 if falls_back else torch.float32))
    p.grad = torch.ones_like(p)
    optimizer = config.cls([p], **config.kwargs)
    fired: list[str] = []
    everywhere = [
        register_optimizer_step_pre_hook(lambda *_: fired.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: fired.append("global post")),
    ]
    optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    optimizer.step()
    for hook in everywhere:
        hook.remove()
    assert fired == ["global pre", "pre", "post", "global post"]


HOOKS: dict[str, Callable[[Optimizer], Callable[..., RemovableHandle]]] = {
    "global pre": lambda _: register_optimizer_step_pre_hook,
    "pre": lambda optimizer: optimizer.register_step_pre_hook,
    "post": lambda optimizer: optimizer.register_step_post_hook,
    "global post": lambda _: register_optimizer_step_post_hook,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_alone_fires_from_when_it_is_there(kind: str) -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(params)
    train(optimizer, params, 1)
    fired: list[Optimizer] = []
    handle = HOOKS[kind](optimizer)(lambda *args: fired.append(args[0]))
    train(optimizer, params, 1)
    handle.remove()
    train(optimizer, params, 1)
    assert fired == [optimizer]


@pytest.mark.parametrize("kind", ["post", "global post"])
def test_a_hook_that_a_closure_adds_fires_after_it(kind: str) -> None:
    optimizer = fusedopt.SGD(parameters(), lr=0.1)
    fired: list[Optimizer] = []
    handles: list[RemovableHandle] = []

    def closure() -> float:
        handles.append(HOOKS[kind](optimizer)(lambda *args: fired.append(args[0])))
        return 0.0

    optimizer.step(closure)
    handles[0].remove()
    assert fired == [optimizer]
