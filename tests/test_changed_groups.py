"""What changes in a param group between two steps, the next step sees."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from tests.helpers import assert_same_bits, each_config, parameters, set_gradients, train
from tests.registry import Config

SHAPES: list[tuple[int, ...]] = [(5,), (3, 4), (7,), (2,)]


def make(cls: type[Any] = fusedopt.Adam, **kwargs: Any) -> tuple[Any, list[Parameter]]:
    """Return an optimizer of three groups, the first two of them equal, and its parameters."""
    params = parameters(SHAPES, torch.float32)
    groups: list[dict[str, Any]] = [
        {"params": [params[0]]},
        {"params": [params[1]]},
        {"params": params[2:], "lr": 0.02},
    ]
    return cls(groups, **{"lr": 0.1, **kwargs}), params


def groups_of(optimizer: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    first, second, third = optimizer.param_groups
    return first, second, third


def setting(key: str, value: Any, group: int = 1) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        optimizer.param_groups[group][key] = value

    return change


def option(name: str, value: Any) -> Callable[[Any], None]:
    return lambda optimizer: setattr(optimizer, name, value)


def all_params(optimizer: Any) -> list[Parameter]:
    return list({p: None for group in optimizer.param_groups for p in group["params"]})


# ---- changes -------------------------------------------------------------------------------------


def append_param(optimizer: Any) -> None:
    groups_of(optimizer)[0]["params"].append(Parameter(torch.ones(4)))


def exchange_params(optimizer: Any) -> None:
    first, second, _ = groups_of(optimizer)
    first["params"][0], second["params"][0] = second["params"][0], first["params"][0]


def drop_param(optimizer: Any) -> None:
    groups_of(optimizer)[2]["params"].pop(0)


def replace_list(optimizer: Any) -> None:
    third = groups_of(optimizer)[2]
    third["params"] = tuple(third["params"][1:])


def replace_group(optimizer: Any) -> None:
    optimizer.param_groups[0] = {**groups_of(optimizer)[0], "eps": 0.1}


def reverse_groups(optimizer: Any) -> None:
    optimizer.param_groups.reverse()


def drop_group(optimizer: Any) -> None:
    del optimizer.param_groups[0]


def add_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "eps": 0.1})


def drop_state(optimizer: Any) -> None:
    del optimizer.state[groups_of(optimizer)[1]["params"][0]]


def replace_state(optimizer: Any) -> None:
    p = groups_of(optimizer)[1]["params"][0]
    optimizer.state[p]["exp_avg"] = torch.ones_like(p)


def set_count(optimizer: Any) -> None:
    optimizer.state[groups_of(optimizer)[1]["params"][0]]["step"].fill_(100)


def replace_data(optimizer: Any) -> None:
    p = groups_of(optimizer)[1]["params"][0]
    p.data = torch.ones(p.shape, dtype=torch.float64)


def load(optimizer: Any) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["eps"] = 0.1
    optimizer.load_state_dict(state)


def rename_key(optimizer: Any) -> None:
    group = groups_of(optimizer)[0]
    group["unknown"] = group.pop("initial")
    group["amsgrad"] = True


def change_all(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["eps"] = 0.1


CHANGES: dict[str, Callable[[Any], None]] = {
    "lr": setting("lr", 0.5),
    "lr, integer": setting("lr", 1),
    "lr, tensor": setting("lr", torch.tensor(0.5)),
    "lr in place": lambda optimizer: groups_of(optimizer)[2]["lr"].fill_(0.5),
    "lr of numpy": setting("lr", pytest.importorskip("numpy").float64(0.5)),
    "betas": setting("betas", (0.5, 0.9)),
    "betas, list": setting("betas", [0.5, 0.9]),
    "betas in place": lambda optimizer: groups_of(optimizer)[2]["betas"].__setitem__(0, 0.5),
    "eps": setting("eps", 0.1),
    "weight_decay": setting("weight_decay", 0.5),
    "no weight_decay": setting("weight_decay", 0),
    "weight_decay, tensor": setting("weight_decay", torch.tensor(0.5)),
    "weight_decay in place": lambda optimizer: groups_of(optimizer)[0]["weight_decay"].fill_(0.9),
    "coupled": setting("decoupled_weight_decay", False),
    "maximize": setting("maximize", True),
    "amsgrad": setting("amsgrad", True),
    "foreach": setting("foreach", True),
    "differentiable": setting("differentiable", True),
    "capturable": setting("capturable", True),
    "unknown key": setting("unknown", object()),
    "keys": rename_key,
    "eps of all": change_all,
    "params, one more": append_param,
    "params exchanged": exchange_params,
    "params, one less": drop_param,
    "params, another list": replace_list,
    "group": replace_group,
    "groups, other order": reverse_groups,
    "groups, one less": drop_group,
    "groups, one more": add_group,
    "state gone": drop_state,
    "state": replace_state,
    "count": set_count,
    "data": replace_data,
    "checkpoint": load,
    "max_grad_norm": option("max_grad_norm", 0.1),
    "state_dtype": option("state_dtype", torch.bfloat16),
    "state_dtype, function": option("state_dtype", lambda p: torch.float16),
    "master_weights": option("master_weights", True),
    "defaults": lambda optimizer: optimizer.defaults.update(stochastic_rounding=True),
}
OURS_ALONE = {"amsgrad", "keys", "capturable", "state_dtype", "state_dtype, function", "data"}
OURS_ALONE |= {"master_weights", "defaults", "max_grad_norm", "differentiable"}

WRONG: dict[str, tuple[Callable[[Any], None], type[Exception], str]] = {
    "no lr": (lambda optimizer: groups_of(optimizer)[1].pop("lr"), KeyError, "lr"),
    "text as lr": (setting("lr", "much"), ValueError, "convert string to float: 'much'"),
    "no eps": (lambda optimizer: groups_of(optimizer)[1].pop("eps"), KeyError, "eps"),
    "eps is None": (setting("eps", None), TypeError, "a real number, not 'NoneType'"),
    "beta1 of 1": (setting("betas", (1.0, 0.9)), ZeroDivisionError, "division by zero"),
    "beta2 above 1": (setting("betas", (0.9, 1.5)), ValueError, "math domain|nonnegative"),
    "beta1 far above 1": (setting("betas", (1e200, 0.9)), OverflowError, "out of range"),
    "one beta": (setting("betas", (0.9,)), ValueError, "not enough values to unpack"),
    "an option": (setting("max_grad_norm", 1.0), ValueError, "expected that on the optimizer"),
    "params are no sequence": (setting("params", 3), TypeError, "not iterable"),
}


def prepared(cls: type[Any] = fusedopt.Adam, **kwargs: Any) -> tuple[Any, list[Parameter]]:
    """Return what has taken some steps, with values that change in place among its own."""
    optimizer, params = make(cls, decoupled_weight_decay=True, **kwargs)
    first, _, third = groups_of(optimizer)
    first["weight_decay"] = torch.tensor(0.1)
    first["initial"] = 1
    third["betas"] = [0.8, 0.9]
    train(optimizer, params, 2)
    third["lr"] = torch.tensor(0.02)
    train(optimizer, params, range(2, 4))
    return optimizer, params


@pytest.mark.filterwarnings("ignore:.*has no kernel for differentiable")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen_in_the_next_step(change: Callable[[Any], None]) -> None:
    """As by a copy of the optimizer, which knows nothing of the steps before."""
    optimizer, _ = prepared()
    for step in range(4, 7):
        if step == 4:
            change(optimizer)
        expected = copy.deepcopy(optimizer)
        assert expected._known is None
        for each in (optimizer, expected):
            set_gradients(all_params(each), step)
            each.step()
        for p, q in zip(all_params(optimizer), all_params(expected), strict=True):
            assert_same_bits(p.detach(), q.detach())


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in OURS_ALONE])
def test_a_change_is_seen_as_torch_sees_it(name: str) -> None:
    optimizer, _ = prepared()
    expected, _ = prepared(torch.optim.Adam, foreach=False)
    for each in (optimizer, expected):
        torch.manual_seed(0)
        CHANGES[name](each)
        if name == "foreach":
            groups_of(each)[1]["foreach"] = each is optimizer
        train(each, all_params(each), range(4, 7))
    for p, q in zip(all_params(optimizer), all_params(expected), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(("change", "error", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_refused_in_the_next_step(
    change: Callable[[Any], None], error: type[Exception], said: str
) -> None:
    errors = []
    for knows in (True, False):
        optimizer, params = prepared()
        before = [p.detach().clone() for p in params]
        change(optimizer)
        if not knows:
            optimizer._known = None
        set_gradients(params, 4)
        with pytest.raises(error, match=said) as raised:
            optimizer.step()
        errors.append(repr(raised.value))
        for p, q in zip(params, before, strict=True):
            assert_same_bits(p.detach(), q)
            assert optimizer.state[p]["step"].item() == 4
    assert errors[0] == errors[1]


def test_a_power_that_overflows_after_some_steps() -> None:
    optimizer, params = make(betas=(0.9, 0.9))
    for group in optimizer.param_groups:
        group["betas"] = (1e100, 0.9)
    train(optimizer, params, 3)
    set_gradients(params, 3)
    with pytest.raises(OverflowError):
        optimizer.step()


def test_an_option_in_a_group_that_is_no_longer_the_optimizers() -> None:
    optimizer, params = make(max_grad_norm=1.0)
    groups_of(optimizer)[1]["max_grad_norm"] = 1.0
    train(optimizer, params, 3)
    optimizer.max_grad_norm = 2.0
    with pytest.raises(ValueError, match=r"a param group has max_grad_norm=1\.0"):
        optimizer.step()


# ---- scalars -------------------------------------------------------------------------------------


@each_config
def test_rules_fold_what_python_folds(config: Config) -> None:
    """A schedule of learning rates, and counts that jump: with the bits of asking each time."""
    optimizer, params = make(config.cls, **config.kwargs)
    asked, others = make(config.cls, **config.kwargs)
    for step in range(12):
        asked._known = None
        for each, some in ((optimizer, params), (asked, others)):
            for group in each.param_groups:
                group["lr"] *= 0.9
            for state in each.state.values():
                if step == 8 and "step" in state:
                    state["step"].fill_(100_000)
            set_gradients(some, step)
            each.step()
        for p, q in zip(params, others, strict=True):
            assert_same_bits(p.detach(), q.detach())


class Twice(fusedopt.Adam):
    """Makes other steps than its rule says."""

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        return super()._scalars({**group, "lr": 2 * group["lr"]}, t)


def test_a_class_that_folds_otherwise_than_its_rule() -> None:
    optimizer, params = make(Twice)
    expected, others = make(lr=0.2)
    groups_of(expected)[2]["lr"] = 0.04
    train(optimizer, params, 4)
    train(expected, others, 4)
    for p, q in zip(params, others, strict=True):
        assert_same_bits(p.detach(), q.detach())


# ---- what it costs -------------------------------------------------------------------------------


class Counting(fusedopt.Adam):
    """Counts what it is asked."""

    asked = 0

    def _engine_group(self, group: dict[str, Any]) -> Any:
        self.asked += 1
        return super()._engine_group(group)

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        self.asked += 1
        return super()._scalars(group, t)


def test_python_is_asked_of_no_group_that_has_not_changed() -> None:
    params = parameters([(3,)] * 20, torch.float32)
    optimizer = Counting([{"params": [p], "weight_decay": i % 3} for i, p in enumerate(params)])
    train(optimizer, params, 2)
    optimizer.asked = 0
    for step in range(2, 6):
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-3 / (i + step)  # as by a scheduler
        train(optimizer, params, range(step, step + 1))
    assert optimizer.asked == 0


def test_python_is_asked_once_of_equal_groups() -> None:
    params = parameters([(3,)] * 20, torch.float32)
    optimizer = Counting([{"params": [p]} for p in params])
    train(optimizer, params, 2)
    assert optimizer.asked <= 3  # of one group, and of its scalars in the first step and later
    optimizer.asked = 0
    for i, group in enumerate(optimizer.param_groups):
        group["betas"] = (0.8 + (i + 1 - i) / 100, 0.9)  # equal, and not the same
    train(optimizer, params, range(2, 4))
    assert optimizer.asked == 2


# ---- what is kept --------------------------------------------------------------------------------


def test_an_optimizer_that_has_stepped_is_pickled_copied_and_freed() -> None:
    optimizer, params = make()
    train(optimizer, params, 2)
    pickle.loads(pickle.dumps(optimizer)).step()
    copy.copy(optimizer).step()
    first: weakref.ref[Any] = weakref.ref(optimizer)
    kept: weakref.ref[Tensor] = weakref.ref(params[1])
    optimizer.state.pop(params[1])
    del optimizer.param_groups[1], params[1]
    gc.collect()
    assert kept() is None
    gc.disable()
    try:
        del optimizer
        assert first() is None  # nothing of it is in a circle
    finally:
        gc.enable()


# ---- values that are looked at with care ---------------------------------------------------------


def adam() -> tuple[fusedopt.Adam, torch.nn.Parameter]:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return fusedopt.Adam([p], lr=0.1), p


def test_a_list_that_contains_itself_is_never_known() -> None:
    optimizer, p = adam()
    tags: list[object] = []
    tags.append(tags)
    optimizer.param_groups[0]["tags"] = tags
    optimizer.step()
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


class NeverEqual(str):
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        raise KeyError("compared")


def test_keys_are_not_asked_whether_they_are_equal() -> None:
    optimizer, p = adam()
    optimizer.param_groups[0][NeverEqual("mine")] = 1
    optimizer.step()
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


def test_a_learning_rate_that_cannot_be_divided_by_zero_raises_as_before() -> None:
    optimizer, p = adam()
    optimizer.param_groups[0]["betas"] = (-1.0, 0.9)  # 1 - (-1)^2 = 0
    optimizer.step()
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("cls", [fusedopt.Adam, fusedopt.RAdam])
def test_no_decay_has_the_sign_of_the_learning_rate_for_all(cls: type[Any]) -> None:
    """A negative one, and a parameter of -0.0, show it."""
    p = Parameter(torch.zeros(1))
    optimizer = cls([p], lr=1e-3)
    p.grad = torch.zeros(1)
    optimizer.step()
    with torch.no_grad():
        p.fill_(-0.0)
    optimizer.param_groups[0]["lr"] = -1e-19
    expected = copy.deepcopy(optimizer)
    for each in (optimizer, expected):
        all_params(each)[0].grad = torch.zeros(1)
        each.step()
    assert_same_bits(p.detach(), all_params(expected)[0].detach())
