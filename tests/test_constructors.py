"""Constructors, as editors, type checkers and libraries that build optimizers by name read them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from tests.helpers import each_optimizer, each_torch_optimizer, parameters
from tests.registry import Config

OPTIONS = {
    "max_grad_norm": 0.25,
    "skip_nonfinite": True,
    "skip_spikes": fusedopt.Spikes(sigmas=5.0),
    "amp_scaling": True,
    "state_dtype": torch.bfloat16,
    "master_weights": True,
    "stochastic_rounding": True,
    "seed": 7,
}

# A valid value of each argument that is no class's default.
OTHERS: dict[str, Any] = {
    "lr": 0.37,
    "betas": (0.7, 0.8),
    "eps": 1e-3,
    "weight_decay": 0.3,
    "momentum": 0.6,
    "dampening": 0.2,
    "alpha": 0.77,
    "lr_decay": 0.4,
    "initial_accumulator_value": 0.5,
    **dict.fromkeys(("amsgrad", "nesterov", "centered", "decoupled_weight_decay"), True),
    **dict.fromkeys(("maximize", "foreach", "fused", "capturable", "differentiable"), True),
}


def arguments(cls: Any) -> list[inspect.Parameter]:
    """Return what the constructor takes, as both ways of asking for it say."""
    _, *of_init = inspect.signature(cls.__init__).parameters.values()
    assert of_init == list(inspect.signature(cls).parameters.values())
    return of_init


@each_torch_optimizer
def test_arguments_are_torchs_and_the_options(config: Config) -> None:
    """Where another torch has other arguments, this is the test to show it: annotations, too."""
    actual = arguments(config.cls)
    assert actual[: -len(OPTIONS)] == arguments(config.torch_cls)
    assert [p.name for p in actual if p.name in OPTIONS] == list(OPTIONS)
    assert all(p.kind is p.KEYWORD_ONLY for p in actual if p.name in OPTIONS)


@each_torch_optimizer
def test_every_argument_arrives(config: Config) -> None:
    names = [p.name for p in arguments(config.torch_cls)]
    assert names[0] == "params"
    for name in names[1:]:
        needed = {"momentum": 0.6} if name == "nesterov" else {}
        made = [
            cls(parameters(), **needed, **{name: OTHERS[name]})
            for cls in (config.cls, config.torch_cls)
        ]
        assert made[0].defaults == made[1].defaults
        assert made[0].defaults[name] == OTHERS[name]


@each_torch_optimizer
def test_arguments_arrive_by_position(config: Config) -> None:
    positional = [p.name for p in arguments(config.torch_cls) if p.kind is p.POSITIONAL_OR_KEYWORD]
    given = [False if name == "nesterov" else OTHERS[name] for name in positional[1:]]
    made = [cls(parameters(), *given) for cls in (config.cls, config.torch_cls)]
    assert made[0].defaults == made[1].defaults


@each_optimizer
def test_options_arrive(config: Config) -> None:
    optimizer = config.cls(parameters(), **OPTIONS)
    assert {name: getattr(optimizer, name) for name in OPTIONS} == OPTIONS


# ---- annotations, subclasses ---------------------------------------------------------------------

PUBLIC = {name: value for name, value in vars(fusedopt).items() if not name.startswith("_")}
CLASSES = {name: cls for name, cls in PUBLIC.items() if isinstance(cls, type)}


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if callable(value)])
def test_every_annotation_can_be_evaluated(name: str) -> None:
    """LightningCLI, jsonargparse, beartype and others do that."""
    typing.get_type_hints(PUBLIC[name])
    for base in PUBLIC[name].__mro__ if name in CLASSES else ():
        if base.__module__.startswith("fusedopt."):
            for member in vars(base).values():
                function = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if inspect.isfunction(function):
                    typing.get_type_hints(function)


@each_optimizer
def test_subclasses_show_their_own_arguments(config: Config) -> None:
    class Inherits(config.cls):  # type: ignore[name-defined, misc]  # a base by name
        pass

    class NamesAnOption(config.cls):  # type: ignore[name-defined, misc]  # a base by name
        def __init__(self, params: Any, *, max_grad_norm: float = 1.0) -> None:
            super().__init__(params, max_grad_norm=max_grad_norm)

    class PassesOn(config.cls):  # type: ignore[name-defined, misc]  # a base by name
        def __init__(self, params: Any, max_grad_norm: float = 1.0, **others: Any) -> None:
            super().__init__(params, max_grad_norm=max_grad_norm, **others)

    assert arguments(Inherits) == arguments(config.cls)
    assert [p.name for p in arguments(NamesAnOption)] == ["params", "max_grad_norm"]
    assert str(arguments(PassesOn)[-1]) == "**others: 'Any'"
    assert len(arguments(PassesOn)) == 3
    assert PassesOn(parameters(), skip_nonfinite=True).skip_nonfinite
    assert NamesAnOption(parameters()).max_grad_norm == 1.0


# ---- documentation, types ------------------------------------------------------------------------


def documented(cls: type) -> dict[str, str]:
    """Return what the docstring says of each argument."""
    _, _, text = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")
    text = re.split(r"\n\n", text)[0]
    return {
        name: " ".join(words.split())
        for name, words in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    }


# (A GradScaler's arguments are torch's, and a GradientRelease is made by a function.)
@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"GradScaler", "GradientRelease"}))
def test_every_argument_is_documented(name: str) -> None:
    said = documented(CLASSES[name])
    assert list(said) == [p.name for p in arguments(CLASSES[name])]


@each_optimizer
def test_the_options_are_documented_in_one_text(config: Config) -> None:
    said = documented(config.cls)
    for name in OPTIONS:
        assert said[name] == documented(fusedopt.SGD)[name]
        assert len(said[name]) > 50


def test_type_checkers_see_a_misspelled_argument(tmp_path: Path) -> None:
    right = "fusedopt.AdamW([torch.ones(3)], lr=1, betas=(0.9, 0.99), max_grad_norm=1.0)"
    wrong = [
        "fusedopt.AdamW([torch.ones(3)], lerning_rate=1)",
        "fusedopt.SGD([torch.ones(3)], max_grad_norm='1')",
        "fusedopt.Lion([torch.ones(3)], 1e-4, (0.9, 0.99), 0.0, True)",
        "fusedopt.AdamW([torch.ones(3)]).skip_nonfinite = 'no'",
    ]
    snippet = tmp_path / "snippet.py"
    snippet.write_text("\n".join(["import fusedopt, torch", right, *wrong]))
    config = tmp_path / "mypy.ini"  # which spares it torch
    config.write_text("[mypy]\nfollow_imports=skip\n[mypy-fusedopt.*]\nfollow_imports=silent")
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), str(snippet)]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    lines = re.findall(r"snippet.py:(\d+): error: (.*)", out.stdout)
    assert [int(line) for line, _ in lines] == [3, 4, 5, 6], out
    assert 'Unexpected keyword argument "lerning_rate" for "AdamW"' in lines[0][1]
