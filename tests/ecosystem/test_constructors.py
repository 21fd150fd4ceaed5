"""Libraries that make optimizers from configuration files, by the arguments of a constructor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation
from hydra.utils import instantiate
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from omegaconf import OmegaConf
from torch.optim import Optimizer

import fusedopt
from tests.ecosystem.common import CONFIGS
from tests.helpers import parameters

# What Lightning uses of jsonargparse.
pytestmark = pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)

OPTIONS: dict[str, Any] = {"max_grad_norm": 0.25, "skip_nonfinite": True, "amp_scaling": True}
# Groups of MuonWithAuxAdam have to say use_muon; what is handed over here are parameters.
each_class = pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name != "MuonWithAuxAdam"]
)


def assert_made(optimizer: Any, name: str) -> None:
    assert type(optimizer) is getattr(fusedopt, name)
    assert optimizer.param_groups[0]["lr"] == 0.37
    assert {option: getattr(optimizer, option) for option in OPTIONS} == OPTIONS


# ---- jsonargparse, and Lightning's command line, which is made of it -----------------------------


@each_class
def test_jsonargparse_makes_them_from_a_file(name: str, tmp_path: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--make", type=Callable[[Iterable[Any]], Optimizer])
    file = tmp_path / "optimizer.yaml"
    arguments = {"lr": 0.37, **OPTIONS}
    file.write_text(f"make: {{class_path: fusedopt.{name}, init_args: {arguments}}}")
    parser.add_argument("--config", action="config")
    made = parser.instantiate(parser.parse_args([f"--config={file}"]))
    assert_made(made.make(parameters()), name)
    with pytest.raises(Exception, match="lerning_rate"):
        parser.parse_args([f"--make=fusedopt.{name}", "--make.lerning_rate=1"])


def test_jsonargparse_has_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(fusedopt.AdamW, "optimizer", skip={"params"})
    said = " ".join(parser.format_help().split())
    assert "--optimizer.max_grad_norm MAX_GRAD_NORM clip the gradients of each step" in said


class Plain(LightningModule):  # type: ignore[misc]  # mypy does not see lightning
    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(2, 1)


class Module(Plain):
    def __init__(self, optimizer: OptimizerCallable = torch.optim.SGD) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def of_command_line(
    monkeypatch: pytest.MonkeyPatch, module: type[Plain], arguments: list[str]
) -> Any:
    """Return the optimizer of a module that Lightning's command line has made."""
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    cli = LightningCLI(
        module,
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults={"accelerator": "cpu", "logger": False},
        auto_configure_optimizers=module is Plain,
    )
    return cli.model.configure_optimizers()


@each_class
def test_lightnings_command_line_makes_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [f"--model.optimizer=fusedopt.{name}", "--model.optimizer.lr=0.37"]
    arguments += [f"--model.optimizer.{option}={value}" for option, value in OPTIONS.items()]
    optimizer = of_command_line(monkeypatch, Module, arguments)
    assert_made(optimizer, name)


def test_lightnings_command_line_gives_one_to_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--optimizer=fusedopt.RAdam", "--optimizer.lr=0.37"]
    arguments += [f"--optimizer.{option}={value}" for option, value in OPTIONS.items()]
    assert_made(of_command_line(monkeypatch, Plain, arguments), "RAdam")


# ---- hydra ---------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("partial", [False, True])
def test_hydra_makes_them(name: str, partial: bool) -> None:
    arguments = {"_target_": f"fusedopt.{name}", "_partial_": partial, "lr": 0.37, **OPTIONS}
    config = OmegaConf.create(arguments)
    made = instantiate(config)(parameters()) if partial else instantiate(config, parameters())
    assert_made(made, name)


def test_hydra_makes_a_lookahead() -> None:
    config = OmegaConf.create({"_target_": "fusedopt.Lookahead", "k": 3, "alpha": 0.75})
    made = instantiate(config, fusedopt.AdamW(parameters(), lr=0.37, **OPTIONS))
    assert (made.k, made.alpha) == (3, 0.75)
    assert_made(made.optimizer, "AdamW")


# ---- beartype ------------------------------------------------------------------------------------


@each_class
def test_beartype_checks_the_arguments(name: str) -> None:
    cls = beartype(type(name, (getattr(fusedopt, name),), {}))
    init = beartype(getattr(fusedopt, name).__init__)
    optimizer = cls.__new__(cls)
    init(optimizer, parameters(), lr=0.37, **OPTIONS)
    assert optimizer.max_grad_norm == 0.25
    for wrong in ({"lr": "0.37"}, {"max_grad_norm": "1"}, {"skip_nonfinite": 1.5}):
        with pytest.raises(BeartypeCallHintParamViolation):
            init(optimizer, parameters(), **wrong)


def test_beartype_checks_those_of_a_lookahead() -> None:
    init = beartype(fusedopt.Lookahead.__init__)
    made = fusedopt.Lookahead.__new__(fusedopt.Lookahead)
    init(made, fusedopt.AdamW(parameters()), k=3)
    assert made.k == 3
    with pytest.raises(BeartypeCallHintParamViolation):
        init(made, fusedopt.AdamW(parameters()), k="3")
