"""Moving averages and a Lookahead around one optimizer, and what a wrapper is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from tests.helpers import assert_same_bits, parameters, set_gradients, train
from tests.test_ema import DECAY, ema


@pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["fusedopt", "torch"])
@pytest.mark.parametrize("outside", ["EMA", "Lookahead"])
def test_with_a_lookahead(module: Any, outside: str) -> None:
    """Around it, the average is of the slow weights too; in it, of the fast ones."""
    params, plain_params = parameters(), parameters()
    if outside == "EMA":
        optimizer: Any = fusedopt.EMA(fusedopt.Lookahead(module.SGD(params, lr=0.1), k=2), DECAY)
    else:
        optimizer = fusedopt.Lookahead(fusedopt.EMA(module.SGD(params, lr=0.1), DECAY), k=2)
    plain = module.SGD(plain_params, lr=0.1)
    slow = [p.detach().clone() for p in plain_params]
    averages = [p.detach().clone() for p in plain_params]
    with torch.no_grad():
        for step in range(5):
            train(optimizer, params, range(step, step + 1))
            train(plain, plain_params, range(step, step + 1))
            weight = 1 - DECAY if step else 1.0

            def average(weight: float = weight) -> None:
                for p, x in zip(plain_params, averages, strict=True):
                    x.lerp_(p, weight)

            if outside == "Lookahead":
                average()
            if step % 2 == 1:
                for p, x in zip(plain_params, slow, strict=True):
                    x.lerp_(p, 0.5)
                    p.copy_(x)
            if outside == "EMA":
                average()
            for p, q, x, y in zip(params, plain_params, slow, averages, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(optimizer.state[p]["slow"], x, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(optimizer.state[p]["ema"], y, rtol=1e-12, atol=1e-12)


def test_one_of_each_is_enough() -> None:
    inner = fusedopt.SGD(parameters(), lr=0.1)
    for wrapped in (fusedopt.EMA(inner), fusedopt.Lookahead(fusedopt.EMA(inner))):
        with pytest.raises(TypeError, match=r"EMA wraps another optimizer, got .*, which has"):
            fusedopt.EMA(wrapped)

    class Other(fusedopt.EMA):
        """Whose averages would be under the same key."""

    with pytest.raises(TypeError, match=r"Other wraps another optimizer, got EMA, which has"):
        Other(fusedopt.EMA(inner))
    with pytest.raises(TypeError, match="EMA wraps another optimizer, got list"):
        fusedopt.EMA(parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": -0.1}, "Invalid decay value: -0.1, expected one in [0, 1]"),
        ({"decay": 1.1}, "Invalid decay value: 1.1, expected one in [0, 1]"),
        ({"decay": float("nan")}, "Invalid decay value: nan, expected one in [0, 1]"),
        ({"every": 0}, "Invalid every value: 0, expected an integer, 1 or more"),
        ({"every": 1.5}, "Invalid every value: 1.5, expected an integer, 1 or more"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match="Invalid") as raised:
        fusedopt.EMA(fusedopt.SGD(parameters(), lr=0.1), **arguments)
    assert str(raised.value) == message
    optimizer = fusedopt.EMA(fusedopt.SGD(parameters(), lr=0.1), 0.5, every=3)
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match="Invalid") as raised:
        setattr(optimizer, name, value)
    assert str(raised.value) == message
    assert (optimizer.decay, optimizer.every) == (0.5, 3)


def test_an_average_that_does_not_fit_is_an_error_that_changes_nothing() -> None:
    params = parameters([(3,), (4,)])
    optimizer = ema(fusedopt.SGD, params, lr=0.1)
    train(optimizer, params, 2)
    before = [p.detach().clone() for p in params]
    optimizer.state[params[1]]["ema"] = torch.ones(5, dtype=torch.float64)
    set_gradients(params, 2)
    with pytest.raises(ValueError, match=r"ema of params\[1\] has shape \(5,\), expected \(4,\)"):
        optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q)
    assert optimizer.param_groups[0]["ema_step"] == 2


def test_settings_are_the_wrappers_and_all_else_is_the_optimizers() -> None:
    optimizer: Any = ema(fusedopt.AdamW, nn.Linear(2, 2).parameters(), lr=0.1)
    optimizer.max_grad_norm = 0.5
    optimizer.every = 3
    assert optimizer.optimizer.max_grad_norm == 0.5
    assert not hasattr(optimizer.optimizer, "every")
    assert repr(optimizer) == (
        f"EMA (\ndecay: {DECAY}\nwarmup: False\nevery: 3\noptimizer: {optimizer.optimizer!r}\n)"
    )


def test_settings_of_groups_stay_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python is asked what a group is once, and not anew for its count of steps."""
    asked = []
    plain = fusedopt.AdamW._engine_group

    def see(self: Any, group: dict[str, Any]) -> Any:
        asked.append(group)
        return plain(self, group)

    monkeypatch.setattr(fusedopt.AdamW, "_engine_group", see)
    params = parameters()
    optimizer = fusedopt.EMA(fusedopt.Lookahead(fusedopt.AdamW(params), k=2))
    train(optimizer, params, 5)
    assert len(asked) == 1


def test_the_step_without_the_wrapper_averages_nothing() -> None:
    params = parameters()
    optimizer = ema(fusedopt.AdamW, params)
    train(optimizer, params, 2)
    before: list[Tensor] = [optimizer.state[p]["ema"].clone() for p in params]
    train(optimizer.optimizer, params, range(2, 3))
    for p, q in zip(params, before, strict=True):
        assert_same_bits(optimizer.state[p]["ema"], q)
    train(optimizer, params, range(3, 4))
    assert optimizer.param_groups[0]["ema_step"] == 3
