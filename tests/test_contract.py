"""The drop-in contract, line by line: what torch and the libraries on it expect."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import inspect
import io
import logging
import os
import pickle
import signal
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

import fusedopt
from fusedopt import _engine
from tests.helpers import (
    assert_same_bits,
    assert_same_state,
    assert_within,
    each_config,
    each_optimizer,
    each_torch_optimizer,
    oracle,
    parameters,
    run_script,
    run_two_ranks,
    set_gradients,
    squares,
    threads_of_a_step,
    train,
    values,
)
from tests.registry import BAD_ARGUMENTS, DTYPES, Config

# Keyword-only arguments that every class may add to torch's.
ADDITIONS = {"max_grad_norm", "skip_nonfinite", "amp_scaling"}

# ---- Classes -------------------------------------------------------------------------------------


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


FALLS_BACK = "fusedopt.{} has no kernel for {}: torch's own implementation steps them"


@each_torch_optimizer
def test_differentiable_falls_back(config: Config) -> None:
    def gradients_through_a_step(cls: Callable[..., Optimizer]) -> list[Tensor]:
        leaf, gradient = Parameter(values((5,), 1)), Parameter(values((5,), 2))
        p = leaf.clone()
        p.grad = gradient.clone()
        cls([p], differentiable=True, **config.kwargs).step()
        # SGD's first momentum is a copy of the gradient without its history.
        through = torch.autograd.grad(
            p.square().sum(), [leaf, gradient], allow_unused=True, materialize_grads=True
        )
        return [p.detach(), *through]

    with pytest.warns(UserWarning, match=FALLS_BACK.format(config.name, "differentiable=True")):
        actual = gradients_through_a_step(config.cls)
    assert actual[1].any()
    for a, b in zip(actual, gradients_through_a_step(config.torch_cls), strict=True):
        assert_same_bits(a, b)


def sparse(rows: list[int], seed: int) -> Tensor:
    """The gradient of an embedding of shape (6, 3), of which these rows were used."""
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), values((len(rows), 3), seed), (6, 3), check_invariants=True
    )


@pytest.mark.parametrize(
    "config",
    [Config("SGD", {}), Config("SGD", {"momentum": 0.9}), Config("Adagrad", {"lr_decay": 0.1})],
    ids=str,
)
def test_sparse_gradients_fall_back(config: Config) -> None:
    def trained(cls: Callable[..., Optimizer]) -> Optimizer:
        table, dense = parameters([(6, 3), (4,)])
        optimizer = cls([table, dense], lr=0.1, **config.kwargs)
        # Torch's Adagrad warns where nobody has chosen whether to check.
        with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
            for step in range(3):
                table.grad = sparse([step, 4], step)
                dense.grad = values((4,), 10 + step)
                optimizer.step()
        return optimizer

    message = FALLS_BACK.format(config.name, "sparse gradients")
    with pytest.warns(UserWarning, match=message) as warned:
        actual = trained(config.cls)
    assert len(warned) == 1  # for three steps
    assert_same_state(actual, trained(config.torch_cls), assert_within)


@each_optimizer
def test_complex_parameters_fall_back(config: Config) -> None:
    def parts(real: bool) -> list[Parameter]:
        z = values((5, 2), 1)
        return [Parameter(z if real else torch.view_as_complex(z)), *parameters([(4,)])]

    def trained(make: Callable[..., Optimizer], params: list[Parameter]) -> Optimizer:
        optimizer = make(params, **config.kwargs)
        for step in range(3):
            gradient = values((5, 2), 10 + step)
            complex_gradient = torch.view_as_complex(gradient)
            params[0].grad = complex_gradient if params[0].is_complex() else gradient
            params[1].grad = values((4,), 20 + step)
            optimizer.step()
        return optimizer

    message = FALLS_BACK.format(config.name, "complex parameters")
    with pytest.warns(UserWarning, match=message) as warned:
        actual = trained(config.cls, parts(real=False))
    assert len(warned) == 1
    # Every rule here takes a complex number as two real ones.
    expected = trained(oracle(config), parts(real=True))

    def check(a: Tensor, b: Tensor) -> None:
        assert_within(torch.view_as_real(a) if a.is_complex() else a, b)

    assert_same_state(actual, expected, check)


@each_optimizer
def test_devices_without_a_kernel_fall_back(config: Config) -> None:
    """The meta device, which every torch has, stands for all of them."""
    meta, p = Parameter(torch.ones(3, device="meta")), Parameter(torch.ones(3))
    optimizer = config.cls([meta, p], **config.kwargs)
    meta.grad, p.grad = torch.ones(3, device="meta"), torch.ones(3)
    with pytest.warns(UserWarning, match=FALLS_BACK.format(config.name, "parameters on meta")):
        optimizer.step()
    assert (p < 1).all()
    assert set(optimizer.state[meta]) == set(optimizer.state[p])


def test_each_cause_of_falling_back_warns_once() -> None:
    table, z = parameters([(6, 3), (4,)])
    z.data = z.detach().to(torch.complex128)
    optimizer = fusedopt.SGD([table, z], lr=0.1)
    table.grad = sparse([1], 1)
    z.grad = torch.ones_like(z)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step()
    causes = sorted(str(warning.message).split(" for ")[1].split(":")[0] for warning in warned)
    assert causes == ["complex parameters", "sparse gradients"]


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


# ---- State ---------------------------------------------------------------------------------------


@each_config
def test_state_is_torchs(config: Config) -> None:
    """The same keys in it, for the same parameters, of the same shapes, dtypes and strides."""
    params, torch_params = parameters(), parameters()
    optimizer = config.cls(params, **config.kwargs)
    expected = oracle(config)(torch_params, **config.kwargs)
    train(optimizer, params, 1)
    train(expected, torch_params, 1)

    def same_kind(a: Tensor, b: Tensor) -> None:
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert (a.device, a.requires_grad) == (b.device, b.requires_grad)

    assert_same_state(optimizer, expected, same_kind)


def test_first_momentum_is_the_gradient_without_dampening_for_each_parameter() -> None:
    early, late = parameters([(4,), (4,)])
    optimizer = fusedopt.SGD([early, late], lr=0.1, momentum=0.9, dampening=0.5)
    for first, step in ((early, 0), (late, 1)):
        set_gradients([early, late] if first is late else [early], step)
        optimizer.step()
        assert first.grad is not None
        assert_same_bits(optimizer.state[first]["momentum_buffer"], first.grad)
    assert early.grad is not None
    assert not torch.equal(optimizer.state[early]["momentum_buffer"], early.grad)


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(3, id="int"),
        pytest.param(3.0, id="float"),
        pytest.param(torch.tensor(3), id="int64"),
        pytest.param(torch.tensor(3.0, dtype=torch.float64), id="float64"),
        pytest.param(torch.tensor([3.0]), id="shape-1"),
    ],
)
def test_step_is_read_in_every_form(stored: Any) -> None:
    def continued(step: Any) -> tuple[Parameter, Any]:
        (p,) = parameters([(4,)])
        optimizer = fusedopt.Adam([p])
        train(optimizer, [p], 3)
        optimizer.state[p]["step"] = copy.deepcopy(step)
        train(optimizer, [p], range(3, 5))
        return p, optimizer.state[p]["step"]

    (p, step), (expected, _) = continued(stored), continued(torch.tensor(3.0))
    assert_same_bits(p.detach(), expected.detach())
    assert type(step) is type(stored)
    assert step == 5


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "strided": lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    "padded": lambda x: torch.cat([x, x + 1], dim=1)[:, : x.shape[1]],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
GRADIENT_LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    *LAYOUTS.values(),
    lambda x: x[:, :1, :, :1].expand_as(x),
    lambda x: x[0, 0, 0, 0].expand_as(x),
]
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def test_adagrad_accumulates_from_the_initial_value() -> None:
    """Also for a parameter that is added later, and where the state was deleted."""
    first, later = parameters([(4,), (4,)])
    optimizer = fusedopt.Adagrad([first], initial_accumulator_value=0.5, lr_decay=0.1)
    assert (optimizer.state[first]["sum"] == 0.5).all()
    optimizer.add_param_group({"params": [later]})
    del optimizer.state[first]
    train(optimizer, [first, later], 1)
    for p in (first, later):
        assert p.grad is not None
        assert_same_bits(optimizer.state[p]["sum"], 0.5 + p.grad * p.grad)
        assert optimizer.state[p]["step"] == 1


def test_adagrads_sums_can_be_shared_with_other_processes() -> None:
    params, alone = parameters(), parameters()
    optimizer, expected = fusedopt.Adagrad(params), fusedopt.Adagrad(alone)
    optimizer.share_memory()
    assert all(state["sum"].is_shared() for state in optimizer.state.values())
    train(optimizer, params, 2)
    train(expected, alone, 2)
    assert all(state["sum"].is_shared() for state in optimizer.state.values())
    assert_same_state(optimizer, expected, assert_same_bits)


@each_layout
@each_config
def test_buffers_have_the_strides_of_zeros_like(config: Config, layout: str) -> None:
    p = Parameter(LAYOUTS[layout](values((2, 3, 4, 5), 1)))
    optimizer = config.cls([p], **config.kwargs)
    train(optimizer, [p], 1)
    expected = torch.zeros_like(p, memory_format=torch.preserve_format).stride()
    buffers = {key: value for key, value in optimizer.state[p].items() if key != "step"}
    assert all(buffer.stride() == expected for buffer in buffers.values())


@pytest.mark.cpu_only("torch steps float64 states of others on devices")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@each_config
def test_states_of_another_dtype_are_used_as_they_are(config: Config, dtype: torch.dtype) -> None:
    """One step from moments of another dtype is one from float32 moments, and then rounded."""
    params, same_dtype = (parameters([(40,)], torch.float32) for _ in range(2))
    optimizer = config.cls(params, **config.kwargs)
    expected = config.cls(same_dtype, **config.kwargs)
    train(optimizer, params, 2)
    train(expected, same_dtype, 2)
    stored = {k: v.to(dtype) for k, v in optimizer.state[params[0]].items() if k != "step"}
    optimizer.state[params[0]].update(stored)
    expected.state[same_dtype[0]].update({k: v.float() for k, v in stored.items()})
    train(optimizer, params, range(2, 3))
    train(expected, same_dtype, range(2, 3))
    assert_same_bits(params[0].detach(), same_dtype[0].detach())
    for key, value in stored.items():
        assert optimizer.state[params[0]][key] is value
        assert_same_bits(value, expected.state[same_dtype[0]][key].to(dtype))


@each_config
def test_parameters_without_a_gradient_are_left_alone(config: Config) -> None:
    used, unused = parameters([(4,), (4,)])
    before = unused.detach().clone()
    optimizer = config.cls([used, unused], **config.kwargs)
    made = copy.deepcopy(optimizer.state.get(unused, {}))
    assert set(made) == ({"step", "sum"} if config.name == "Adagrad" else set())
    train(optimizer, [used], 3)
    assert set(optimizer.state.get(unused, {})) == set(made)
    for key, value in made.items():
        assert_same_bits(optimizer.state[unused][key], value)
    assert_same_bits(unused.detach(), before)
    train(optimizer, [used, unused], 1)
    state = copy.deepcopy(optimizer.state.get(unused, {}))
    moved = unused.detach().clone()
    unused.grad = None
    optimizer.step()
    assert_same_bits(unused.detach(), moved)
    for key, value in state.items():
        assert_same_bits(optimizer.state[unused][key], value)


@each_config
def test_a_late_gradient_starts_at_step_1(config: Config) -> None:
    late, alone, other = (Parameter(values((4,), 1)) for _ in range(3))
    optimizer = config.cls([other, late], **config.kwargs)
    train(optimizer, [other], 3)
    fresh = config.cls([alone], **config.kwargs)
    late.grad = alone.grad = values((4,), 7)
    optimizer.step()
    fresh.step()
    assert_same_bits(late.detach(), alone.detach())
    for key, value in fresh.state[alone].items():
        assert_same_bits(optimizer.state[late][key], value)


def _replace_state(optimizer: Optimizer, p: Parameter) -> Parameter:
    optimizer.state[p] = dict(optimizer.state[p])
    return p


def _replace_tensors(optimizer: Optimizer, p: Parameter) -> Parameter:
    for key, value in optimizer.state[p].items():
        optimizer.state[p][key] = value.clone()
        value.fill_(torch.nan)
    return p


def _replace_data(optimizer: Optimizer, p: Parameter) -> Parameter:
    old = p.data
    p.data = p.data.clone()
    old.fill_(torch.nan)
    return p


def _replace_parameter(optimizer: Optimizer, p: Parameter) -> Parameter:
    new = Parameter(p.detach().clone())
    optimizer.param_groups[0]["params"] = [new]
    optimizer.state[new] = optimizer.state.pop(p)
    return new


@pytest.mark.parametrize(
    "replace", [_replace_state, _replace_tensors, _replace_data, _replace_parameter]
)
@each_config
def test_everything_may_be_replaced_between_steps(
    config: Config, replace: Callable[[Optimizer, Parameter], Parameter]
) -> None:
    (p,), (undisturbed,) = parameters([(40,)]), parameters([(40,)])
    optimizer = config.cls([p], **config.kwargs)
    expected = config.cls([undisturbed], **config.kwargs)
    train(expected, [undisturbed], 4)
    train(optimizer, [p], 2)
    if not optimizer.state and replace is not _replace_data:
        optimizer.state[p] = {}
    p = replace(optimizer, p)
    train(optimizer, [p], range(2, 4))
    assert_same_bits(p.detach(), undisturbed.detach())
    for key, value in expected.state.get(undisturbed, {}).items():
        assert_same_bits(optimizer.state[p][key], value)


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@each_config
def test_checkpoints_go_both_ways_with_torch(config: Config) -> None:
    """Torch, fusedopt and torch again, two steps each, as if torch had made all six."""
    params, torch_params = parameters(), parameters()
    expected = oracle(config)(torch_params, **config.kwargs)
    train(expected, torch_params, 6)
    optimizer: Any = None
    makes: list[Callable[..., Any]] = [oracle(config), config.cls, oracle(config)]
    for leg, make in enumerate(makes):
        following = make(params, **config.kwargs)
        if optimizer:
            following.load_state_dict(through_a_file(optimizer.state_dict()))
        optimizer = following
        train(optimizer, params, range(2 * leg, 2 * leg + 2))
    assert_same_state(optimizer, expected, assert_within)


def _each_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def age(state_dict: dict[str, Any]) -> None:
        for state in state_dict["state"].values():
            change(state)

    return age


def _drop_newer_keys(state_dict: dict[str, Any]) -> None:
    oldest = {"params", "lr", "lr_decay", "betas", "eps", "alpha"}
    oldest |= {"weight_decay", "momentum", "dampening"}
    for group in state_dict["param_groups"]:
        for key in set(group) - oldest:
            del group[key]


OLDER: dict[str, Callable[[dict[str, Any]], None]] = {
    "step-int": _each_state(lambda s: "step" in s and s.update(step=int(s["step"]))),
    "step-float": _each_state(lambda s: "step" in s and s.update(step=float(s["step"]))),
    "step-shape-1": _each_state(lambda s: "step" in s and s.update(step=s["step"].reshape(1))),
    "no-momentum": _each_state(lambda s: "momentum_buffer" in s and s.update(momentum_buffer=None)),
    "no-newer-keys": _drop_newer_keys,
}


@pytest.mark.parametrize("age", OLDER)
@each_optimizer
def test_older_checkpoints_load(config: Config, age: str) -> None:
    first_params = parameters()
    first = oracle(config)(first_params, **config.kwargs)
    train(first, first_params, 2)
    state_dict = first.state_dict()
    OLDER[age](state_dict)

    def continued(make: Callable[..., Optimizer]) -> list[Parameter]:
        params = copy.deepcopy(first_params)
        optimizer = make(params, **config.kwargs)
        optimizer.load_state_dict(through_a_file(state_dict))
        train(optimizer, params, range(2, 4))
        return params

    continued_by_torch = config.torch_cls or config.cls  # Lion needs only to load it
    for p, q in zip(continued(config.cls), continued(continued_by_torch), strict=True):
        assert_within(p.detach(), q.detach())


@each_torch_optimizer
def test_states_of_a_dtype_of_their_own_fall_back_too(config: Config) -> None:
    """Torch has cast them to the parameter's when it loaded them."""
    (p,) = parameters([(4,)], torch.float32)
    optimizer = config.cls([p], **config.kwargs)
    train(optimizer, [p], 1)
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["differentiable"] = True
    for state in state_dict["state"].values():
        state.update({k: v.bfloat16() for k, v in state.items() if k != "step"})

    def continued(cls: Callable[..., Optimizer]) -> Optimizer:
        param = Parameter(p.detach().clone(), requires_grad=False)
        following = cls([param], differentiable=True, **config.kwargs)
        following.load_state_dict(copy.deepcopy(state_dict))
        train(following, [param], 1)
        return following

    with pytest.warns(UserWarning, match=FALLS_BACK.format(config.name, "differentiable=True")):
        actual = continued(config.cls)
    assert_same_state(actual, continued(config.torch_cls), assert_same_bits)


@each_optimizer
def test_hooks_of_loading_have_the_last_word(config: Config) -> None:
    params = parameters([(4,)], torch.float32)
    optimizer = config.cls(params, **config.kwargs)
    train(optimizer, params, 1)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state.update({k: v.bfloat16() for k, v in state.items() if k != "step"})

    def widen(opt: Optimizer) -> None:
        for state in opt.state.values():
            assert {v.dtype for k, v in state.items() if k != "step"} == {torch.bfloat16}
            state.update({k: v.float() for k, v in state.items()})

    handle = optimizer.register_load_state_dict_post_hook(widen)
    optimizer.load_state_dict(state_dict)
    assert {v.dtype for v in optimizer.state[params[0]].values()} == {torch.float32}
    handle.remove()
    optimizer.register_load_state_dict_post_hook(lambda opt: opt.state.clear())
    optimizer.load_state_dict(state_dict)
    assert not optimizer.state


# ---- step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", [False, True])
@each_optimizer
def test_closure(config: Config, keyword: bool) -> None:
    """Called with gradients enabled, before they are read; its value comes back unchanged."""
    (p,), (expected,) = parameters([(4,)]), parameters([(4,)])
    returned = object()

    def closure() -> Any:
        assert torch.is_grad_enabled()
        p.grad = expected.grad
        return returned

    expected.grad = values((4,), 1)
    config.cls([expected], **config.kwargs).step()
    optimizer = config.cls([p], **config.kwargs)
    with torch.no_grad():
        result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert result is returned
    assert_same_bits(p.detach(), expected.detach())


@each_optimizer
def test_step_takes_a_closure_and_no_grad_scaler(config: Config) -> None:
    optimizer = config.cls(parameters(), **config.kwargs)
    assert list(inspect.signature(optimizer.step).parameters) == ["closure"]


@each_optimizer
def test_step_is_a_method_that_may_be_patched(config: Config) -> None:
    params = parameters()
    optimizer = config.cls(params, **config.kwargs)
    assert isinstance(optimizer.step, types.MethodType)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)  # patches it too
    original, calls = optimizer.step, []

    @functools.wraps(original)
    def patched(*args: Any) -> Any:  # as accelerate does
        calls.append(args)
        return original(*args)

    optimizer.step = patched
    train(optimizer, params, 1)
    scheduler.step()  # warns if it has not seen the optimizer step
    assert calls == [()]
    assert all(p in optimizer.state for p in params)


@each_optimizer
def test_the_profiler_sees_the_step(config: Config) -> None:
    params = parameters()
    optimizer = config.cls(params, **config.kwargs)
    with torch.autograd.profiler.profile() as profile:
        train(optimizer, params, 1)
    assert f"Optimizer.step#{config.name}.step" in {event.name for event in profile.function_events}


def test_profilers_of_python_find_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a method that does nothing, called between the update and the hooks."""
    params = parameters()
    optimizer = fusedopt.AdamW(params)
    called: list[str] = []
    monkeypatch.setattr(Optimizer, "_optimizer_step_code", lambda _: called.append("code"))
    train(optimizer, params, 1)
    optimizer.register_step_post_hook(lambda *_: called.append("hook"))
    train(optimizer, params, 1)
    assert called == ["code", "code", "hook"]


def test_an_execution_trace_sees_the_step(tmp_path: Path) -> None:
    """Which is no profiler, and on all threads."""
    params = parameters()
    optimizer = fusedopt.AdamW(params)
    observer = torch.profiler.ExecutionTraceObserver()
    observer.register_callback(str(tmp_path / "trace.json"))
    observer.start()
    train(optimizer, params, 1)
    observer.stop()
    observer.unregister_callback()
    assert "Optimizer.step#AdamW.step" in (tmp_path / "trace.json").read_text()


@pytest.mark.cpu_only("with CUDA, all steps are recorded")
@pytest.mark.skipif(not _engine.engine.fast_gather, reason="nobody knows whether somebody watches")
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, fusedopt.Lookahead])
def test_a_step_that_nobody_watches_is_not_recorded(
    wrap: Callable[[Optimizer], Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes 50 us when what that needs is not in cache."""
    params = parameters()
    optimizer = wrap(fusedopt.AdamW(params))
    monkeypatch.delattr(torch.autograd.profiler, "record_function")
    train(optimizer, params, 1)
    with torch.autograd.profiler.profile(), pytest.raises(AttributeError, match="record_function"):
        train(optimizer, params, 1)


@pytest.mark.parametrize(
    "config",
    [
        Config("SGD", {"lr": 0.1, "momentum": 0.9}),
        Config("Adam", {}),
        Config("AdamW", {}),
        Config("RMSprop", {"momentum": 0.9}),
        Config("RAdam", {}),
        Config("Lion", {}),
    ],
    ids=str,
)
def test_hyper_parameters_are_read_every_step(config: Config) -> None:
    """OneCycleLR moves lr, and momentum or the first beta, at every step."""

    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        params = parameters()
        optimizer = make(params, **config.kwargs)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=8)
        for step in range(7):
            train(optimizer, params, range(step, step + 1))
            scheduler.step()
        return optimizer

    assert_same_state(trained(config.cls), trained(oracle(config)), assert_within)


@pytest.mark.parametrize(
    "lr", [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor(0.1, requires_grad=True)], ids=str
)
@each_optimizer
def test_a_tensor_lr_is_read_when_it_has_changed_in_place(config: Config, lr: Tensor) -> None:
    kwargs = {key: value for key, value in config.kwargs.items() if key != "lr"}
    lr = lr.detach().clone().requires_grad_(lr.requires_grad)
    params, plain_params = parameters(), parameters()
    optimizer = config.cls(params, lr=lr, **kwargs)
    expected = oracle(config)(plain_params, lr=0.1, **kwargs)
    for step, changed in enumerate((0.1, 0.5, 0.0, 0.25)):
        with torch.no_grad():
            lr.fill_(changed)
        expected.param_groups[0]["lr"] = lr.item()
        train(optimizer, params, range(step, step + 1))
        train(expected, plain_params, range(step, step + 1))
    assert optimizer.param_groups[0]["lr"] is lr
    assert_same_state(optimizer, expected, assert_within)


@each_config
def test_lr_0_creates_state_and_moves_nothing(config: Config) -> None:
    params, before, moving = parameters(), parameters(), parameters()
    optimizer = config.cls(params, **{**config.kwargs, "lr": 0})
    train(optimizer, params, 1)
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p.detach(), q.detach())
    other = config.cls(moving, **config.kwargs)
    train(other, moving, 1)
    for p, q in zip(params, moving, strict=True):
        assert set(optimizer.state.get(p, {})) == set(other.state.get(q, {}))
        for key, value in other.state.get(q, {}).items():
            assert_same_bits(optimizer.state[p][key], value)


def test_a_compiled_training_step_is_right_and_silent() -> None:
    class Log(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    messages: list[str] = []
    log = Log(logging.WARNING)
    x = values((5, 3), 1)

    def trained(compiled: bool) -> nn.Linear:
        model = nn.Linear(3, 2, dtype=torch.float64)
        nn.init.constant_(model.weight, 0.5)
        nn.init.constant_(model.bias, 0.5)
        optimizer = fusedopt.AdamW(model.parameters(), lr=0.1)

        def train_step(x: Tensor) -> None:
            optimizer.zero_grad()
            torch.autograd.backward(model(x).square().sum())
            optimizer.step()

        step = torch.compile(train_step, backend="eager") if compiled else train_step
        for _ in range(3):
            step(x)
        return model

    expected = trained(compiled=False)
    loggers = [logging.getLogger(name) for name in ("torch", "torch._dynamo")]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.addHandler(log)
        actual = trained(compiled=True)
        for logger in loggers:
            logger.removeHandler(log)
    for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
        assert_same_bits(p.detach(), q.detach())
    assert [str(warning.message) for warning in warned] == []
    assert messages == []


# ---- GradScaler ----------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_grad_scaler_behaves_as_with_torch(name: str, fused: bool | None, unscale: bool) -> None:
    """It unscales and skips by itself, whatever ``fused`` is."""

    def trained(cls: Callable[..., Optimizer], **kwargs: Any) -> tuple[Optimizer, float]:
        params = parameters([(5,), (3, 4)])
        optimizer = cls(params, lr=0.1, **kwargs)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for factor in (1.0, torch.inf, 2.0, torch.nan, 3.0, 1.0):
            optimizer.zero_grad()
            torch.autograd.backward(scaler.scale(squares(params, factor)))
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return optimizer, scaler.get_scale()

    actual, scale = trained(getattr(fusedopt, name), fused=fused)
    expected, expected_scale = trained(getattr(torch.optim, name), foreach=False)
    assert scale == expected_scale
    assert_same_state(actual, expected, assert_within)


# ---- Tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_optimizer
def test_every_dtype_is_computed_wide_and_rounded_once(
    config: Config, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    """Each step is one of float32 (float64 for float64), whose results are then stored."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    p = Parameter(values((40,), 0, dtype))
    optimizer = config.cls([p], **config.kwargs)
    for step in range(3):
        p.data = p.data.to(grad_dtype)
        p.grad = values((40,), 1 + step, grad_dtype)
        p.data = (values((40,), 0) if step == 0 else p.data).to(dtype)
        wide_p = Parameter(p.detach().to(wide))
        wide_p.grad = p.grad.to(wide)
        wide_optimizer = config.cls([wide_p], **config.kwargs)
        for key, value in optimizer.state.get(p, {}).items():
            wide_optimizer.state[wide_p][key] = value.clone() if key == "step" else value.to(wide)
        optimizer.step()
        wide_optimizer.step()
        assert_same_bits(p.detach(), wide_p.detach().to(dtype))
        for key, value in optimizer.state[p].items():
            assert value.dtype == (torch.float32 if key == "step" else dtype)
            assert_same_bits(value, wide_optimizer.state[wide_p][key].to(value.dtype))


@pytest.mark.cpu_only("torch steps strided parameters on devices")
@each_layout
@each_optimizer
def test_any_layout_gives_the_bits_of_the_contiguous_one(
    config: Config, layout: str, gather: str
) -> None:
    """One step with the gradient in every layout, each from the state that the last one left."""
    shape = (2, 3, 4, 5)
    p = Parameter(LAYOUTS[layout](values(shape, 0, torch.float32)))
    contiguous = Parameter(values(shape, 0, torch.float32))
    optimizer = config.cls([p], **config.kwargs)
    expected = config.cls([contiguous], **config.kwargs)
    for step, arrange in enumerate(GRADIENT_LAYOUTS):
        p.grad = arrange(values(shape, 1 + step, torch.float32))
        contiguous.grad = p.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        expected.step()
        assert_same_state(optimizer, expected, assert_same_bits)


@each_optimizer
def test_zero_size_and_0_dim_parameters(config: Config, gather: str) -> None:
    params = parameters([(0,), (), (3, 0, 2), (1, 1), (0,)])
    optimizer = config.cls(params, **config.kwargs)
    plain = parameters([(0,), (), (3, 0, 2), (1, 1), (0,)])
    expected = oracle(config)(plain, **config.kwargs)
    train(optimizer, params, 2)
    train(expected, plain, 2)
    assert all(p in optimizer.state for p in params)
    assert_same_state(optimizer, expected, assert_within)


OVERLAPS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "disjoint": lambda x: [x[: len(x) // 3], x[len(x) // 3 :]],
    "interleaved": lambda x: [x[::2], x[1::2]],
    "tied": lambda x: [x, x.view(-1, 4)],
    "overlapping": lambda x: [x[: len(x) // 2], x[len(x) // 3 :], x[::2]],
}


@pytest.mark.cpu_only("torch steps strided parameters on devices, first")
@pytest.mark.parametrize("overlap", OVERLAPS)
@each_optimizer
def test_one_storage_seen_through_several_parameters(
    config: Config, overlap: str, two_threads: None
) -> None:
    """Updated one after the other, as torch does; large enough for threads to meet in it."""

    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        params = [Parameter(view) for view in OVERLAPS[overlap](values((600_000,), 0))]
        optimizer = make(params, **config.kwargs)
        train(optimizer, params, 2)
        return optimizer

    assert_same_state(trained(config.cls), trained(oracle(config)), assert_within)


@pytest.mark.cpu_only("torch steps parameters on devices in any order")
@pytest.mark.parametrize("attribute", ["grad", "data"])
@each_optimizer
def test_memory_that_is_shared_for_some_steps(
    config: Config, attribute: str, two_threads: None
) -> None:
    """Nothing is in the steps before, nor in those after. One thread keeps the order anyway."""

    def trained(threads: int) -> Optimizer:
        torch.set_num_threads(threads)
        # Of two threads, the second would begin with the third parameter.
        params = parameters([(300_000,), (600_000,), (400_000,), (500_000,)])
        optimizer = config.cls(params, **config.kwargs)
        train(optimizer, params, 2)
        apart = params[2].data
        for _ in range(2):
            set_gradients(params, 3)
            setattr(params[2], attribute, params[1].detach()[:400_000])
            optimizer.step()
        params[2].data = apart
        train(optimizer, params, 2)
        return optimizer

    assert_same_state(trained(2), trained(1), assert_same_bits)


def drop_the_last(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["params"].pop()


def drop_all(optimizer: Optimizer) -> None:
    optimizer.param_groups[0]["params"].clear()


def shorten_the_second(optimizer: Optimizer) -> None:
    p = optimizer.param_groups[0]["params"][1]
    half = len(p) // 2
    gradient, p.grad = p.grad, None
    p.data = p.data[:half]
    p.grad = gradient[:half]
    state = optimizer.state.get(p, {})
    state.update({key: x[:half] for key, x in state.items() if torch.is_tensor(x) and x.dim()})


@pytest.mark.parametrize("change", [drop_the_last, drop_all, shorten_the_second])
@each_optimizer
def test_a_step_for_less_of_the_memory_of_the_last_one(
    config: Config, change: Callable[[Optimizer], None]
) -> None:
    """What is left lies where it lay before."""

    def trained(make: Callable[..., Optimizer]) -> tuple[Optimizer, list[Tensor]]:
        params = parameters([(90,), (60,), (80,)])
        whole = [p.data for p in params]
        optimizer = make(params, **config.kwargs)
        set_gradients(params, 0)
        for _ in range(3):
            optimizer.step()
        change(optimizer)
        for _ in range(2):
            optimizer.step()
        return optimizer, whole

    actual, actual_memory = trained(config.cls)
    expected, expected_memory = trained(oracle(config))
    assert_same_state(actual, expected, assert_within)
    for x, y in zip(actual_memory, expected_memory, strict=True):
        assert_within(x, y)


@each_optimizer
def test_what_a_step_does_may_change_while_nothing_moves(config: Config, two_threads: None) -> None:
    """The work is shared by threads as in the step before, unless that was other work."""

    def trained(threads: int) -> Optimizer:
        torch.set_num_threads(threads)
        params = parameters([(300_000,), (70,), (150_000,)])
        optimizer = config.cls(params, **config.kwargs)
        set_gradients(params, 0)
        for max_norm in (None, None, 1.0, 1.0, None, 0.1):
            optimizer.max_grad_norm = max_norm
            optimizer.step()
        return optimizer

    assert_same_state(trained(2), trained(1), assert_same_bits)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@each_optimizer
def test_a_parameter_listed_twice_is_stepped_twice(config: Config) -> None:
    """As tied weights are when the parameters of two modules are joined: torch only warns."""

    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        (p,) = parameters([(4,)])
        optimizer = make([p, p], **config.kwargs)
        train(optimizer, [p], 3)
        return optimizer

    assert_same_state(trained(config.cls), trained(oracle(config)), assert_within)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("count", [3, 3.0], ids=["int", "float"])
def test_a_parameter_listed_twice_counts_plain_steps_twice(count: float) -> None:
    (p,) = parameters([(4,)])
    optimizer = fusedopt.Adam([p, p])
    train(optimizer, [p], 1)
    optimizer.state[p]["step"] = count
    train(optimizer, [p], 1)
    assert optimizer.state[p]["step"] == 5


def test_a_list_of_parameters_that_changes_during_the_step() -> None:
    """Hyper-parameters are read in Python, which may do anything."""

    class Shrinking(float):
        def __float__(self) -> float:
            del optimizer.param_groups[0]["params"][1:]
            return 0.1

    params = parameters([(4,)] * 50)
    optimizer = fusedopt.SGD(params, lr=0.1)
    optimizer.param_groups[0]["lr"] = Shrinking(0.1)
    set_gradients(params, 0)
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 1


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,)])
def test_a_gradient_that_torch_negates_lazily(shape: tuple[int, ...], gather: str) -> None:
    """The imaginary part of a conjugate is a view with the negative bit, not negated memory."""
    a, b = Parameter(torch.full(shape, 1.0)), Parameter(torch.full(shape, 2.0))
    torch.autograd.backward((torch.complex(a, b).conj() * torch.tensor(3 + 4j)).real.sum())
    assert b.grad is not None
    assert b.grad.is_neg() == (shape != (3,))  # autograd has copied the last
    fusedopt.SGD([a, b], lr=1.0).step()
    assert (a == 1 - 3).all()
    assert (b == 2 - 4).all()


@each_optimizer
def test_a_parameter_that_torch_negates_lazily_falls_back(config: Config) -> None:
    def trained(make: Callable[..., Optimizer], p: Tensor) -> Optimizer:
        param = Parameter(p)
        optimizer = make([param], **config.kwargs)
        train(optimizer, [param], 2)
        return optimizer

    start = values((5,), 0)
    view = torch.complex(start, -start).conj().imag
    assert view.is_neg()
    cause = "parameters that torch has yet to negate"
    with pytest.warns(UserWarning, match=FALLS_BACK.format(config.name, cause)):
        actual = trained(config.cls, view)
    assert_same_state(actual, trained(oracle(config), start.clone()), assert_within)


@each_optimizer
def test_a_gradient_that_is_its_parameter_in_another_order(config: Config) -> None:
    """Read before any of it is written."""
    x = values((300, 300), 0)
    p, expected_p = Parameter(x.clone()), Parameter(x.clone())
    p.grad, expected_p.grad = p.data.t(), x.t().clone()
    optimizer, expected = (config.cls([q], **config.kwargs) for q in (p, expected_p))
    optimizer.step()
    expected.step()
    assert_same_state(optimizer, expected, assert_same_bits)


@each_optimizer
def test_a_gradient_that_is_another_parameter(config: Config, two_threads: None) -> None:
    """Updated one after the other, the second with what the first has become."""

    def trained(make: Callable[..., Optimizer]) -> Optimizer:
        a, b = parameters([(60_000,), (60_000,)])
        optimizer = make([a, b], **config.kwargs)
        for step in range(2):
            a.grad, b.grad = values((60_000,), 1000 + step), a.detach()
            optimizer.step()
        return optimizer

    assert_same_state(trained(config.cls), trained(oracle(config)), assert_within)


def test_inference_tensors_are_stepped_in_inference_mode() -> None:
    with torch.inference_mode():
        p = torch.ones(3)
        p.grad = torch.ones(3)
        fusedopt.SGD([p], lr=0.5).step()
        assert p.tolist() == [0.5] * 3


def test_inference_tensors_are_stepped_outside_of_it_too(gather: str) -> None:
    with torch.inference_mode():
        p = torch.ones(3)
        p.grad = torch.ones(3)
    fusedopt.SGD([p], lr=0.5).step()
    assert p.tolist() == [0.5] * 3


@each_optimizer
def test_version_counters_are_bumped(config: Config, gather: str) -> None:
    (p,) = parameters([(4,)])
    loss = (p * p).sum()  # saves p for its backward
    optimizer = config.cls([p], **config.kwargs)
    train(optimizer, [p], 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


# ---- DTensor -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mesh of one process that talks to nobody."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        store = tmp_path_factory.mktemp("store") / "file"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        yield init_device_mesh("cpu", (1,))
        dist.destroy_process_group()


@pytest.mark.parametrize("shard", [False, True])
@each_optimizer
def test_dtensors(config: Config, shard: bool, mesh: Any, gather: str) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    placements = [Shard(0) if shard else Replicate()]
    plain = parameters([(8, 4), (3,), (1,) if shard else ()])
    params = [Parameter(distribute_tensor(p.detach().clone(), mesh, placements)) for p in plain]
    optimizer = config.cls(params, **config.kwargs)
    expected = config.cls(plain, **config.kwargs)
    for step in range(2):
        set_gradients(plain, step)
        for p, q in zip(params, plain, strict=True):
            assert q.grad is not None
            p.grad = distribute_tensor(q.grad, mesh, placements)
            if step == 1 and q.dim() == 2:  # another layout of the local tensor
                transposed: Any = distribute_tensor(q.grad.t().contiguous(), mesh, [Replicate()])
                p.grad = transposed.t().redistribute(placements=placements)
        optimizer.step()
        expected.step()
    for state in optimizer.state.values():
        buffers = [value for key, value in state.items() if key != "step"]
        assert all(isinstance(buffer, DTensor) for buffer in buffers)
        assert all(list(buffer.placements) == placements for buffer in buffers)

    def check(a: Tensor, b: Tensor) -> None:
        assert_same_bits(a.to_local() if isinstance(a, DTensor) else a, b)

    assert_same_state(optimizer, expected, check)


TWO_RANKS = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

mesh = init_device_mesh("cpu", (2,))

def stepped(cls, **kwargs):
    # The gradient of a replicated parameter is a sum over ranks, as SequenceParallel leaves it.
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    parts = [[1.0, -2.0, 3.0, -4.0], [-3.0, 1.0, 1.0, 1.0]]
    p.grad = DTensor.from_local(torch.tensor(parts[rank]), mesh, [Partial()])
    cls([p], lr=0.1, **kwargs).step()
    return p.to_local().tolist()

def empty_shard():
    p = torch.nn.Parameter(distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(1, 4), mesh, [Shard(0)])
    optimizer = fusedopt.AdamW([p], lr=0.1, weight_decay=0)
    optimizer.step()
    exp_avg = optimizer.state[p]["exp_avg"]
    return [list(exp_avg.shape), list(exp_avg.to_local().shape), p.full_tensor().tolist()]

results = {
    "partial": [stepped(fusedopt.SGD), stepped(fusedopt.AdamW), stepped(fusedopt.Lion)],
    "empty": empty_shard(),
}
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each of two processes saw."""
    return run_two_ranks(TWO_RANKS, tmp_path_factory.mktemp("store"))


def test_dtensor_gradients_are_reduced_to_the_placement_of_the_parameter(two_ranks: Any) -> None:
    sgd = [1 + 0.1 * 2, 1 + 0.1 * 1, 1 - 0.1 * 4, 1 + 0.1 * 3]
    sign = [1.1, 1.1, 0.9, 1.1]
    for rank in two_ranks:
        assert rank["partial"][0] == pytest.approx(sgd, rel=1e-6)
        assert rank["partial"][1] == pytest.approx([x - 0.001 for x in sign], rel=1e-6)
        assert rank["partial"][2] == pytest.approx(sign, rel=1e-6)


def test_empty_local_shards_get_state(two_ranks: Any) -> None:
    for rank, local_rows in zip(two_ranks, (1, 0), strict=True):
        global_shape, local_shape, p = rank["empty"]
        assert (global_shape, local_shape) == ([1, 4], [local_rows, 4])
        assert p == [pytest.approx([0.9] * 4)]


# ---- Process -------------------------------------------------------------------------------------


@pytest.mark.cpu_only("devices have threads of their own")
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_set_num_threads_is_obeyed_from_any_thread(two_threads: None) -> None:
    used = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        used.append(threads_of_a_step(1_000_000))
    assert used == [1, 2, 1]


def test_two_python_threads_step_two_optimizers(two_threads: None) -> None:
    shapes = [(100_000,), (7,), (300, 200)]

    def trained(_: int) -> list[Parameter]:
        params = parameters(shapes, torch.float32)
        train(fusedopt.AdamW(params), params, 10)
        return params

    expected = trained(0)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for params in pool.map(trained, range(4)):
            for p, q in zip(params, expected, strict=True):
                assert_same_bits(p.detach(), q.detach())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("gradients", ["fresh", "kept"])
def test_a_forked_child_steps_on(gradients: str, two_threads: None) -> None:
    ahead, behind = parameters([(200_000,)]), parameters([(200_000,)])
    leader, follower = fusedopt.AdamW(ahead), fusedopt.AdamW(behind)
    for optimizer, params, steps in ((leader, ahead, 3), (follower, behind, 2)):
        set_gradients(params, 0)
        for _ in range(steps):
            optimizer.step()
    if gradients == "fresh":
        set_gradients(behind, 0)  # elsewhere
    expected = ahead[0].detach().numpy().tobytes()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(30)  # kills a child that waits for threads which it does not have
            follower.step()
            os._exit(0 if behind[0].detach().numpy().tobytes() == expected else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_import_and_step_leave_flush_to_zero_alone() -> None:
    run_script(
        """
import torch

def subnormals_survive():
    many = torch.full((100_000,), 1e-40)
    return 5e-324 * 1.0 > 0 and bool((many * 0.5 > 0).all())

torch.set_num_threads(2)
assert subnormals_survive()
import fusedopt
assert subnormals_survive()
p = torch.nn.Parameter(torch.full((100_000,), 1e-40))
p.grad = torch.full((100_000,), 1e-40)
fusedopt.SGD([p], lr=0.5).step()
assert (p > 0).all() and (p < 1e-40).all()
assert subnormals_survive()
"""
    )
