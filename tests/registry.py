"""The cases that tests share: data only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import fusedopt
from tests.muon import oracle


class Config(NamedTuple):
    """An optimizer with arguments that reach one variant of its rule."""

    name: str
    kwargs: dict[str, Any]

    @property
    def cls(self) -> type[Any]:
        """The class; of one that steps matrices and others apart, one that takes any parameters."""
        if self.name == "MuonWithAuxAdam":
            return oracle.MuonWithAuxAdam
        return getattr(fusedopt, self.name)

    @property
    def torch_cls(self) -> Any:
        """The torch class of this name, or None."""
        return getattr(torch.optim, self.name, None)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.kwargs.items())])


def _configs(name: str, *variants: dict[str, Any]) -> list[Config]:
    return [Config(name, kwargs) for kwargs in variants]


# Every rule of elements with every combination of its flags, and every option that changes its
# scalars. (Those of Muon are in tests/muon.)
CONFIGS = [
    *_configs(
        "SGD",
        {"lr": 0.1},
        {"lr": 0.1, "weight_decay": 0.1},
        {"lr": 0.1, "maximize": True},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ),
    *_configs(
        "Adam",
        {},
        {"amsgrad": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "amsgrad": True, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    *_configs(
        "AdamW",
        {},
        {"amsgrad": True},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3, "maximize": True},
    ),
    *_configs(
        "RMSprop",
        *(
            {"weight_decay": decay, "centered": centered, "momentum": momentum}
            for decay in (0, 0.1)
            for centered in (False, True)
            for momentum in (0, 0.9)
        ),
        {"lr": 0.003, "alpha": 0.9, "eps": 1e-6, "maximize": True},
    ),
    *_configs(
        "Adagrad",
        {},
        {"lr_decay": 0.5, "eps": 1e-6},
        {"weight_decay": 0.1, "initial_accumulator_value": 0.1},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    ),
    *_configs(
        "RAdam",
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3, "maximize": True},
    ),
    *_configs(
        "Lion",
        {},
        {"lr": 1e-3, "betas": (0.95, 0.98), "weight_decay": 0.3, "maximize": True},
    ),
]

# One configuration for each optimizer, where the variant does not matter.
PLAIN_CONFIGS = [
    Config("SGD", {"lr": 0.1, "momentum": 0.9}),
    Config("Adam", {}),
    Config("AdamW", {}),
    Config("RMSprop", {}),
    Config("Adagrad", {}),
    Config("RAdam", {}),
    Config("Lion", {}),
    Config("MuonWithAuxAdam", {}),
]

# Tests of all optimizers that are none of one, and why.
_ONE_RULE = "its groups have a rule each, and the test knows one"
_FIRST_GROUP = "the test changes its first group alone, or names it"
_OWN_PRECISION = "each kind of device makes matrices orthogonal in its own precision"
_OF_ELEMENTS = "the oracle is a rule of elements; see tests/muon"
_COMPLEX = "Muon has no complex matrices"
NOT_FOR: dict[str, dict[str, str]] = {
    "MuonWithAuxAdam": {
        "test_the_norm_covers_complex_gradients": _COMPLEX,
        "test_complex_parameters_fall_back": _COMPLEX,
        "test_older_checkpoints_load": "what does not say use_muon is refused",
        "test_a_tensor_lr_is_read_when_it_has_changed_in_place": _FIRST_GROUP,
        "test_a_first_step_is_not_captured": _FIRST_GROUP,
        "test_any_mode_loads_a_checkpoint_of_any_other": _ONE_RULE,
        "test_usual_parameters_are_read_without_python": "it reads the gradients of matrices so",
        "test_so_it_is_with_parameters_of_other_dtypes": _OF_ELEMENTS,
        "test_every_mix_of_dtypes": _OF_ELEMENTS,
        "test_same_bits_with_gradients_of_another_dtype": _OWN_PRECISION,
        "test_same_bits_clipped": _OWN_PRECISION,
        "test_checkpoints_go_between_devices": _OWN_PRECISION,
        "test_losses_are_those_of_torchs": _OWN_PRECISION,
        "test_it_drives_it_as_it_drives_torchs": "groups of torch's two have other keys",
    },
}

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Clipping.
NORM_TYPES = [1.0, 2.0, float("inf"), 3.0]
MAX_NORMS = [0.0, 1e-12, 0.5, 1e6, float("inf")]
FILLED_SHAPES = [(5,), (3, 4), (), (2, 3, 4)]  # torch has no infinity norm of an empty tensor


# ---- layouts, of a tensor of four dimensions ---------------------------------------------------

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

# ---- bad input -----------------------------------------------------------------------------------

# Arguments that a constructor refuses, and all that it says.
BAD_ARGUMENTS = [
    (Config("SGD", {"lr": -1.0}), "Invalid learning rate: -1.0"),
    (Config("SGD", {"lr": torch.tensor([0.1, 0.1])}), "Tensor lr must be 1-element"),
    (Config("SGD", {"momentum": -0.5}), "Invalid momentum value: -0.5"),
    (Config("SGD", {"weight_decay": -0.5}), "Invalid weight_decay value: -0.5"),
    *(
        (Config("SGD", kwargs), "Nesterov momentum requires a momentum and zero dampening")
        for kwargs in ({"nesterov": True}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1})
    ),
    *(
        (Config(name, kwargs), message)
        for name in ("Adam", "AdamW", "RAdam")
        for kwargs, message in (
            ({"lr": -1.0}, "Invalid learning rate: -1.0"),
            ({"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element"),
            ({"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
            ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
            ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
            ({"weight_decay": -0.5}, "Invalid weight_decay value: -0.5"),
        )
    ),
    *(
        (
            Config(name, {"betas": (0.9, torch.tensor(0.9))}),
            "betas must be either both floats or both Tensors",
        )
        for name in ("Adam", "AdamW")
    ),
    (Config("RMSprop", {"lr": -1.0}), "Invalid learning rate: -1.0"),
    (Config("RMSprop", {"lr": torch.tensor([0.1, 0.1])}), "Tensor lr must be 1-element"),
    (Config("RMSprop", {"alpha": -0.5}), "Invalid alpha value: -0.5"),
    (Config("RMSprop", {"eps": -1.0}), "Invalid epsilon value: -1.0"),
    (Config("RMSprop", {"momentum": -0.5}), "Invalid momentum value: -0.5"),
    (Config("RMSprop", {"weight_decay": -0.5}), "Invalid weight_decay value: -0.5"),
    (Config("Adagrad", {"lr": -1.0}), "Invalid learning rate: -1.0"),
    (Config("Adagrad", {"lr": torch.tensor([0.1, 0.1])}), "Tensor lr must be 1-element"),
    (Config("Adagrad", {"lr_decay": -0.5}), "Invalid lr_decay value: -0.5"),
    (Config("Adagrad", {"weight_decay": -0.5}), "Invalid weight_decay value: -0.5"),
    (
        Config("Adagrad", {"initial_accumulator_value": -0.5}),
        "Invalid initial_accumulator_value value: -0.5",
    ),
    (Config("Adagrad", {"eps": -1.0}), "Invalid epsilon value: -1.0"),
    (Config("Lion", {"lr": -1.0}), "Invalid learning rate: -1.0"),
    (Config("Lion", {"lr": torch.tensor([0.1, 0.1])}), "Tensor lr must be 1-element"),
    (Config("Lion", {"betas": (1.0, 0.9)}), "Invalid beta parameter at index 0: 1.0"),
    (Config("Lion", {"betas": (0.9, -0.1)}), "Invalid beta parameter at index 1: -0.1"),
    (Config("Lion", {"weight_decay": -0.5}), "Invalid weight_decay value: -0.5"),
]


class BadInput(NamedTuple):
    """What step() refuses: how to get there from a working optimizer, and all that it says."""

    id: str
    config: Config
    damage: Callable[[Optimizer, Parameter], object]
    """Done to params[1] of group 1, 'layer.weight', of shape (8, 4) and float32."""
    error: type[Exception]
    message: str


_SGD, _ADAM = Config("SGD", {"lr": 0.1, "momentum": 0.9}), Config("Adam", {})
_WEIGHT = "params[1] ('layer.weight') of group 1"
_NEW_GRADIENT = "call zero_grad() and compute it again"
_SHARED = "is a view in which elements share memory; expected every element in a place of its own;"
_CHECKPOINT = "load a checkpoint of this model, or delete opt.state[p] to start anew"
_TENSOR = (
    "expected a strided float32, float64, bfloat16 or float16 tensor on cpu; move it there, or "
    "delete opt.state[p] to start anew"
)
_NO_SPARSE = "does not support sparse gradients"
_COUNT = (
    "expected a number, or a float32, float64 or int64 tensor on cpu with one element; store the "
    "number of steps taken so far"
)


def _store(key: str, value: Any) -> Callable[[Optimizer, Parameter], object]:
    return lambda optimizer, p: optimizer.state[p].update({key: value})


def _data(value: Tensor) -> Callable[[Optimizer, Parameter], object]:
    return lambda optimizer, p: setattr(p, "data", value)


BAD_INPUTS = [
    BadInput(
        "gradient-shape",
        _ADAM,
        _data(torch.ones(4, 4)),
        ValueError,
        f"grad of {_WEIGHT} has shape (8, 4), expected (4, 4); {_NEW_GRADIENT}",
    ),
    BadInput(
        "gradient-dimensions",
        Config("SGD", {"lr": 0.1}),
        _data(torch.ones(32)),
        ValueError,
        f"grad of {_WEIGHT} has shape (8, 4), expected (32,); {_NEW_GRADIENT}",
    ),
    BadInput(
        "parameter-expanded",
        Config("Lion", {}),
        _data(torch.ones(4).expand(8, 4)),
        ValueError,
        f"{_WEIGHT} {_SHARED} pass a clone() of it",
    ),
    BadInput(
        "parameter-overlapping",
        _ADAM,
        _data(torch.ones(40).as_strided((8, 4), (3, 1))),
        ValueError,
        f"{_WEIGHT} {_SHARED} pass a clone() of it",
    ),
    BadInput(
        "state-shape",
        _ADAM,
        _store("exp_avg_sq", torch.ones(4, 8)),
        ValueError,
        f"exp_avg_sq of {_WEIGHT} has shape (4, 8), expected (8, 4); {_CHECKPOINT}",
    ),
    BadInput(
        "state-expanded",
        _SGD,
        _store("momentum_buffer", torch.ones(8, 1).expand(8, 4)),
        ValueError,
        f"momentum_buffer of {_WEIGHT} {_SHARED} store a clone() of it",
    ),
    BadInput(
        "state-negated",
        Config("Lion", {}),
        _store("exp_avg", torch.ones(8, 4, dtype=torch.complex64).conj().imag),
        ValueError,
        f"exp_avg of {_WEIGHT} is a view that torch has yet to negate; expected memory with the "
        "values themselves; store resolve_neg() of it",
    ),
    BadInput(
        "state-dtype",
        Config("RMSprop", {}),
        _store("square_avg", torch.ones(8, 4, dtype=torch.int32)),
        TypeError,
        f"square_avg of {_WEIGHT} is a torch.strided tensor of torch.int32 and torch.Size([8, 4]) "
        f"on cpu, {_TENSOR}",
    ),
    BadInput(
        "state-layout",
        Config("Lion", {}),
        _store("exp_avg", torch.ones(8, 4).to_sparse()),
        TypeError,
        f"exp_avg of {_WEIGHT} is a torch.sparse_coo tensor of torch.float32 and "
        f"torch.Size([8, 4]) on cpu, {_TENSOR}",
    ),
    BadInput(
        "state-device",
        Config("AdamW", {"amsgrad": True}),
        _store("max_exp_avg_sq", torch.ones(8, 4, device="meta")),
        TypeError,
        f"max_exp_avg_sq of {_WEIGHT} is a torch.strided tensor of torch.float32 and "
        f"torch.Size([8, 4]) on meta, {_TENSOR}",
    ),
    BadInput(
        "state-no-tensor",
        _ADAM,
        _store("exp_avg", [0.0]),
        TypeError,
        f"exp_avg of {_WEIGHT} is [0.0], {_TENSOR}",
    ),
    BadInput(
        "state-no-dict",
        _SGD,
        lambda optimizer, p: optimizer.state.update({p: [1.0]}),
        TypeError,
        f"state of {_WEIGHT} is [1.0], expected a dict; delete opt.state[p] to start anew",
    ),
    *(
        BadInput(f"step-{id}", _ADAM, _store("step", value), error, f"step of {_WEIGHT} is {text}")
        for id, value, error, text in [
            ("text", "3", TypeError, f"'3', {_COUNT}"),
            ("none", None, TypeError, f"None, {_COUNT}"),
            (
                "two-elements",
                torch.ones(2),
                TypeError,
                f"a torch.strided tensor of torch.float32 and torch.Size([2]) on cpu, {_COUNT}",
            ),
            (
                "dtype",
                torch.tensor(3, dtype=torch.int32),
                TypeError,
                f"a torch.strided tensor of torch.int32 and torch.Size([]) on cpu, {_COUNT}",
            ),
            *(
                (
                    f"{type(value).__name__}-{number}",
                    value,
                    ValueError,
                    f"{number:f}, expected a finite number, 0 or more; store the number of steps "
                    "taken so far",
                )
                for value, number in [
                    (-1, -1.0),
                    (-1.0, -1.0),
                    (float("nan"), float("nan")),
                    (torch.tensor(-1.0), -1.0),
                    (torch.tensor(-1), -1.0),
                    (10**400, float("inf")),
                    (torch.tensor(float("inf")), float("inf")),
                ]
            ),
        ]
    ),
    *(
        BadInput(
            f"sparse-gradient-{config.name}",
            config,
            lambda optimizer, p: setattr(p, "grad", torch.ones(8, 4).to_sparse()),
            RuntimeError,
            message,
        )
        for config, message in [
            (_ADAM, f"Adam {_NO_SPARSE}, please consider SparseAdam instead"),
            (Config("AdamW", {}), f"Adam {_NO_SPARSE}, please consider SparseAdam instead"),
            (Config("RMSprop", {}), f"RMSprop {_NO_SPARSE}"),
            (Config("RAdam", {}), f"RAdam {_NO_SPARSE}"),
            (Config("Lion", {}), f"Lion {_NO_SPARSE}"),
            (
                Config("Adagrad", {"weight_decay": 0.1}),
                "weight_decay option is not compatible with sparse gradients",
            ),
        ]
    ),
]
