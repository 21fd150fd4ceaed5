"""Where the options of an optimizer are, what takes them along, and where they are refused."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

import fusedopt
from fusedopt._base import Fused
from fusedopt._engine import Rule
from tests.helpers import (
    all_params,
    assert_same_bits,
    assert_same_state,
    each_optimizer,
    each_torch_optimizer,
    parameters,
    set_gradients,
    train,
)
from tests.registry import Config

DEFAULTS = {
    "max_grad_norm": None,
    "skip_nonfinite": False,
    "skip_spikes": False,
    "amp_scaling": False,
    "state_dtype": None,
    "master_weights": False,
    "stochastic_rounding": False,
    "seed": 0,
    "track_statistics": False,
}
OTHERS = {
    "max_grad_norm": 0.25,
    "skip_nonfinite": True,
    "skip_spikes": True,
    "amp_scaling": True,
    "state_dtype": torch.bfloat16,
    "master_weights": True,
    "stochastic_rounding": True,
    "seed": 7,
    "track_statistics": 4,
}
each_option = pytest.mark.parametrize("name", OTHERS)


def options_of(optimizer: Any) -> dict[str, Any]:
    return {name: getattr(optimizer, name) for name in DEFAULTS}


# ---- classes and wrappers ------------------------------------------------------------------------


class Descent(Fused, Optimizer):
    """A subclass that has never heard of `Fused.__init__`."""

    def __init__(self, params: Any) -> None:
        Optimizer.__init__(self, params, {"lr": 0.1, "maximize": False})

    def _rule(self, group: dict[str, Any]) -> Rule:
        return Rule("sgd", (False,), (), counts_steps=False)

    def _scalars(self, group: dict[str, Any], t: float) -> dict[str, float]:
        return {"weight_decay": 0.0, "lr": group["lr"]}


def test_a_subclass_may_call_the_constructor_of_optimizer() -> None:
    params, expected_params = parameters(), parameters()
    optimizer, expected = Descent(params), fusedopt.SGD(expected_params, lr=0.1, max_grad_norm=0.25)
    assert options_of(optimizer) == DEFAULTS
    assert optimizer.skipped_steps == 0
    train(optimizer, params, 1)
    optimizer = copy.deepcopy(optimizer)
    optimizer.load_state_dict(fusedopt.SGD(parameters(), lr=0.1).state_dict())
    assert options_of(optimizer) == DEFAULTS
    optimizer = Descent(params := parameters())
    optimizer.max_grad_norm = 0.25
    train(optimizer, params, 2)
    train(expected, expected_params, 2)
    assert_same_state(optimizer, expected, assert_same_bits)


@each_torch_optimizer
def test_an_optimizer_of_torch_may_be_given_the_class(config: Config) -> None:
    params, expected_params = parameters(), parameters()
    optimizer: Any = config.torch_cls(params, **config.kwargs)
    optimizer.__class__ = config.cls
    expected = config.cls(expected_params, **config.kwargs)
    assert options_of(optimizer) == DEFAULTS
    for skipped in range(2):
        optimizer.skip_nonfinite = expected.skip_nonfinite = bool(skipped)
        train(optimizer, params, 1)
        train(expected, expected_params, 1)
        assert optimizer.skipped_steps == 0
    assert_same_state(optimizer, expected, assert_same_bits)


def test_a_subclass_may_have_an_attribute_named_optimizer() -> None:
    """That is how Lightning's wrapper names what it wraps; it has no param groups of its own."""

    class WithInner(fusedopt.SGD):
        def __init__(self, params: Any, inner: Optimizer) -> None:
            super().__init__(params, lr=0.1)
            self._optimizer = inner

    params, other_params, expected_params = (parameters() for _ in range(3))
    inner = fusedopt.SGD(other_params, lr=0.1)
    optimizer, expected = WithInner(params, inner), fusedopt.SGD(expected_params, lr=0.1)
    for some in (params, other_params, expected_params):
        set_gradients(some, 0)
    norm = expected.clip_grad_norm_(0.1)
    assert_same_bits(optimizer.clip_grad_norm_(0.1), norm)
    assert inner.grad_norm is None
    optimizer.skipped_steps = 7
    assert (optimizer.skipped_steps, inner.skipped_steps) == (7, 0)
    optimizer.step()
    expected.step()
    assert_same_state(optimizer, expected, assert_same_bits)


class Wrapper:
    """One that takes on the class of what it wraps, and passes on attributes that it lacks."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        self._optimizer.step()


@each_option
def test_options_may_be_set_through_a_wrapper_of_the_same_class(name: str) -> None:
    optimizer = fusedopt.AdamW(parameters())
    wrapper: Any = Wrapper(optimizer)
    assert getattr(wrapper, name) == DEFAULTS[name]
    setattr(wrapper, name, OTHERS[name])
    assert getattr(optimizer, name) == getattr(wrapper, name) == OTHERS[name]
    set_gradients(all_params(optimizer), 0)
    wrapper.step()
    asks_for_norm = name in ("max_grad_norm", "skip_nonfinite", "skip_spikes")
    assert (wrapper.grad_norm is not None) == asks_for_norm


WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("max_grad_norm", -1.0, ValueError, "-1.0, expected 0 or more"),
    ("max_grad_norm", "much", TypeError, "'much', expected a number, 0 or more"),
    ("max_grad_norm", [1.0], TypeError, "[1.0], expected a number, 0 or more"),
    ("skip_spikes", 6, ValueError, "6, expected False, True, or a fusedopt.Spikes"),
    ("state_dtype", "fp8", ValueError, "'fp8', expected None, torch.float32"),
    ("seed", -1, ValueError, "-1, expected an integer from 0 to"),
    ("track_statistics", "nonsense", ValueError, "'nonsense', expected a bool, or an integer n"),
    ("track_statistics", -1, ValueError, "-1, expected a bool, or an integer n"),
    ("ns_dtype", torch.int8, ValueError, "torch.int8, expected None, torch.float32"),
]


@pytest.mark.parametrize(("name", "value", "error", "expected"), WRONG)
def test_a_wrong_option_is_refused_by_the_constructor_and_as_an_attribute(
    name: str, value: Any, error: type[Exception], expected: str
) -> None:
    params = parameters([(3, 4)], torch.float32)
    message = rf"^Invalid {name}(?: value)?: {re.escape(expected)}"
    with pytest.raises(error, match=message):
        fusedopt.Muon(params, **{name: value})
    optimizer = fusedopt.Muon(params, max_grad_norm=0.5, track_statistics=2, seed=3)
    for each in (optimizer, fusedopt.EMA(optimizer)):
        with pytest.raises(error, match=message):
            setattr(each, name, value)
    assert options_of(optimizer) == {
        **DEFAULTS,
        "max_grad_norm": 0.5,
        "track_statistics": 2,
        "seed": 3,
    }
    assert optimizer.ns_dtype is None


# ---- copies and pickles --------------------------------------------------------------------------


@each_option
def test_a_pickle_may_have_options_beside_the_defaults(name: str) -> None:
    state = fusedopt.AdamW(parameters()).__getstate__()
    optimizer = fusedopt.AdamW.__new__(fusedopt.AdamW)
    optimizer.__setstate__({**state, name: OTHERS[name]})
    assert options_of(optimizer) == {**DEFAULTS, name: OTHERS[name]}
    again = pickle.loads(pickle.dumps(optimizer))
    assert options_of(again) == options_of(optimizer)
    setattr(optimizer, name, DEFAULTS[name])
    assert options_of(optimizer) == DEFAULTS
    assert options_of(again) == {**DEFAULTS, name: OTHERS[name]}


# ---- param groups --------------------------------------------------------------------------------


def refusal(name: str) -> str:
    text = f"a param group has {name}={OTHERS[name]!r}, expected that on the optimizer"
    return re.escape(text)


@each_option
@each_optimizer
def test_an_option_in_a_param_group_is_refused(config: Config, name: str) -> None:
    """Skorch writes there what it was asked to set on the optimizer."""
    first, second = parameters([(3,), (4,)])
    with pytest.raises(ValueError, match=refusal(name)):
        config.cls([{"params": [first], name: OTHERS[name]}], **config.kwargs)
    optimizer = config.cls([first], **config.kwargs)
    with pytest.raises(ValueError, match=refusal(name)):
        optimizer.add_param_group({"params": [second], name: OTHERS[name]})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0][name] = OTHERS[name]
    set_gradients([first], 0)
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=refusal(name)):
        optimizer.step()
    assert_same_state(optimizer, before, assert_same_bits)
    setattr(optimizer, name, OTHERS[name])  # one remedy: now it is heeded
    optimizer.step()
    del optimizer.param_groups[0][name]  # the other one
    optimizer.step()


@each_optimizer
def test_no_group_has_the_options(config: Config) -> None:
    """Libraries that flatten checkpoints fail on keys they do not know."""
    first, second, third = parameters([(3,), (4,), (5,)])
    optimizer = config.cls([first], **OTHERS)
    optimizer.add_param_group({"params": [second]})
    optimizer.add_param_group({"params": [third], **OTHERS})  # what is in force anyway
    plain = config.cls([first])
    for group in optimizer.param_groups:
        assert group.keys() == plain.param_groups[0].keys()
    assert options_of(optimizer) == OTHERS


# ---- made anew from another ----------------------------------------------------------------------


@each_option
@each_optimizer
def test_groups_of_an_optimizer_do_not_lose_its_options_in_silence(
    config: Config, name: str
) -> None:
    """torchrl's group_optimizers makes an optimizer of the groups of others."""
    optimizer = config.cls(parameters(), **config.kwargs, **{name: OTHERS[name]})
    message = re.escape(f"of a {config.name} with {name}={OTHERS[name]!r}, which groups do not")
    others = config.cls(parameters(), **config.kwargs).param_groups
    for groups_of in (
        lambda optimizer: optimizer.param_groups,
        lambda optimizer: [*others, *optimizer.param_groups],
        lambda optimizer: tuple({**group} for group in optimizer.param_groups),
    ):
        with pytest.raises(ValueError, match=message):
            config.cls(groups_of(optimizer))
        again = config.cls(groups_of(optimizer), **{name: OTHERS[name]})
        assert getattr(again, name) == OTHERS[name]
        setattr(again, name, DEFAULTS[name])
    setattr(optimizer, name, DEFAULTS[name])
    assert options_of(config.cls(optimizer.param_groups)) == DEFAULTS


def test_groups_of_a_copy_do_not_lose_its_options_in_silence() -> None:
    optimizer = fusedopt.SGD(parameters(), lr=0.1, max_grad_norm=0.25)
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        again.load_state_dict(optimizer.state_dict())
        with pytest.raises(ValueError, match=r"max_grad_norm=0\.25"):
            fusedopt.SGD(again.param_groups)


@each_optimizer
def test_defaults_take_the_options_along(config: Config) -> None:
    optimizer = config.cls(parameters(), **config.kwargs, **OTHERS)
    defaults = optimizer.defaults.copy()
    if config.name == "AdamW":
        defaults.pop("decoupled_weight_decay")  # which torch's constructor does not take, either
    assert options_of(config.cls(parameters(), **defaults)) == OTHERS
    optimizer.skip_nonfinite = False
    assert "skip_nonfinite" not in optimizer.defaults


@each_torch_optimizer
def test_torchs_class_does_not_drop_the_options_of_defaults(config: Config) -> None:
    """DeepSpeed's ZeRO makes a torch.optim.Adagrad from the defaults of any Adagrad."""
    defaults = {"lr": 0.1, "max_grad_norm": 0.25}
    optimizer = config.cls(parameters(), **defaults)
    assert optimizer.defaults.items() >= defaults.items()
    with pytest.raises(TypeError, match="max_grad_norm"):
        config.torch_cls(parameters(), **{name: optimizer.defaults[name] for name in defaults})
    optimizer.max_grad_norm = None
    plain = config.torch_cls(parameters(), lr=0.1)
    assert optimizer.defaults == plain.defaults


# ---- repr ----------------------------------------------------------------------------------------


@each_torch_optimizer
def test_repr_shows_the_options_that_are_set(config: Config) -> None:
    plain = repr(config.torch_cls(parameters(), **config.kwargs))
    optimizer = config.cls(parameters(), **config.kwargs)
    assert repr(optimizer) == plain
    optimizer.max_grad_norm = 0.25
    optimizer.skip_nonfinite = True
    added = "All groups\n    max_grad_norm: 0.25\n    skip_nonfinite: True\n)"
    assert repr(optimizer) == plain.removesuffix(")") + added


def test_repr_of_a_lookahead_shows_what_it_wraps() -> None:
    inner = fusedopt.AdamW(parameters(), max_grad_norm=0.25)
    assert repr(fusedopt.Lookahead(inner, k=3, alpha=0.75)) == (
        f"Lookahead (\nk: 3\nalpha: 0.75\noptimizer: {inner!r}\n)"
    )


# ---- without a kernel ----------------------------------------------------------------------------


def test_the_warning_says_who_makes_the_step() -> None:
    def step(cls: Any) -> None:
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
        p.grad = torch.ones_like(p)
        cls([p]).step()

    with pytest.warns(UserWarning, match="fusedopt.AdamW has .*: torch's own implementation steps"):
        step(fusedopt.AdamW)
    with pytest.warns(UserWarning, match="fusedopt.Lion has .*: its rule in torch's operators"):
        step(fusedopt.Lion)
