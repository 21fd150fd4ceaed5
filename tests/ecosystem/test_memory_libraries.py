"""Memory modes within other libraries: real trainings, resumed from their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedopt
from fusedopt.integrations.transformers import FusedClipping
from tests.ecosystem import test_accelerate as accelerates
from tests.ecosystem import test_lightning as lightnings
from tests.ecosystem import test_transformers as trainers
from tests.ecosystem.digits import make_loader, make_model
from tests.ecosystem.memory import MODES, UNEVEN, Model, assert_same, each_mode, numbers
from tests.ecosystem.memory import train as train_on_numbers
from tests.ecosystem.test_accelerate import fresh_accelerate  # noqa: F401  (a fixture)
from tests.ecosystem.test_compile import fresh_cache, silence  # noqa: F401  (a fixture)

MAX_NORM = 0.5
LR = 1e-2


def matrices(p: Tensor) -> Any:
    return "mxfp8" if p.ndim > 1 else torch.float32


# The models of these tests are so small that "mxfp8" would leave all their states in float32.
SMALL: dict[str, dict[str, Any]] = {
    name: {**mode, "state_dtype": matrices if "8 bits" in name else mode["state_dtype"]}
    for name, mode in MODES.items()
}


def assert_in_mode(mode: str, optimizer: Any) -> None:
    """Fail unless 8-bit states and what belongs to a mode are there, and not all the same."""
    states = list(optimizer.state.values())
    assert any(state["exp_avg"].dtype == torch.uint8 for state in states) == ("8 bits" in mode)
    keys = {key for state in states for key in state}
    assert ("remainder" in keys) == mode.startswith("masters")
    assert ("rounding" in keys) == (mode != "masters, float32 states")
    for state in states:
        for key in {"remainder", "exp_avg_scale"} & state.keys():
            assert state[key].numel() == 1 or state[key].unique().numel() > 1


def losses_fall(losses: list[float]) -> bool:
    return losses[-1] < 0.95 * losses[0]


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["model", "step"])
@each_mode
def test_compiling_changes_nothing(mode: str, what: str) -> None:
    def trained(compiled: bool) -> tuple[list[float], dict[str, Tensor]]:
        model = make_model(torch.bfloat16, dropout=0.0)
        optimizer = fusedopt.AdamW(model.parameters(), lr=LR, max_grad_norm=MAX_NORM, **SMALL[mode])
        forward: Any = model
        if compiled and what == "model":
            forward = torch.compile(model, backend="aot_eager")

        def train_step(images: Tensor, labels: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(images), labels)
            value = loss.detach()  # dynamo warns of a loss that is passed on after a break
            torch.autograd.backward(loss)
            optimizer.step()
            return value

        step: Any = train_step
        if compiled and what == "step":
            step = torch.compile(train_step, backend="eager")
        losses = [step(*batch).item() for batch in make_loader(12, torch.bfloat16)]
        assert_in_mode(mode, optimizer)
        return losses, numbers(model, optimizer)

    expected, states = trained(compiled=False)
    with silence():
        actual, compiled_states = trained(compiled=True)
    assert losses_fall(expected)
    assert actual == expected
    assert_same(compiled_states, states)


# ---- accelerate ----------------------------------------------------------------------------------


@each_mode
def test_accelerate_resumes_with_the_same_bits(mode: str, tmp_path: Path) -> None:
    def begin() -> Any:
        return accelerates.start(
            lambda params: fusedopt.AdamW(params, lr=LR, max_grad_norm=MAX_NORM, **SMALL[mode]),
            dtype=torch.bfloat16,
            precision="bf16",
            gamma=0.99,
        )

    middle = accelerates.BATCHES // 2
    whole = begin()
    first = accelerates.train(whole, range(middle))
    whole.accelerator.save_state(tmp_path)
    expected = accelerates.train(whole, range(middle, accelerates.BATCHES))
    assert_in_mode(mode, whole.inside)
    resumed = begin()
    resumed.accelerator.load_state(tmp_path)
    assert accelerates.train(resumed, range(middle, accelerates.BATCHES)) == expected
    assert_same(numbers(resumed.model, resumed.inside), numbers(whole.model, whole.inside))
    assert losses_fall([loss for loss, *_ in first + expected])


# ---- transformers --------------------------------------------------------------------------------


@each_mode
def test_the_trainer_resumes_with_the_same_bits(mode: str, tmp_path: Path) -> None:
    def made() -> Any:
        options = {"lr": LR, **SMALL[mode]}
        return trainers.make_trainer(
            tmp_path,
            {"optimizer_cls_and_kwargs": (fusedopt.AdamW, options)},
            cls=FusedClipping,
            dtype=torch.bfloat16,
            bf16=True,
            save_strategy="steps",
            save_steps=trainers.STEPS // 2,
        )

    whole, resumed = made(), made()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{trainers.STEPS // 2}"))
    assert_in_mode(mode, trainers.inside(whole))
    for run in (whole, resumed):
        assert losses_fall(trainers.logged(run, "loss").tolist())
    expected = numbers(whole.model, trainers.inside(whole))
    assert_same(numbers(resumed.model, trainers.inside(resumed)), expected)


# ---- Lightning -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@each_mode
def test_lightning_resumes_with_the_same_bits(mode: str, tmp_path: Path) -> None:
    def trained(epochs: int, **args: Any) -> Any:
        module = lightnings.Fused(
            lambda params: fusedopt.AdamW(params, lr=4 * LR, **SMALL[mode]), torch.bfloat16
        )
        return lightnings.fit(
            module,
            dtype=torch.bfloat16,
            precision="bf16-true",
            max_epochs=epochs,
            gradient_clip_val=MAX_NORM,
            **args,
        )

    path = tmp_path / "middle.ckpt"
    trained(1).trainer.save_checkpoint(path)
    whole, resumed = trained(2), trained(2, ckpt_path=path, weights_only=True)
    assert_in_mode(mode, whole.optimizer)
    assert losses_fall(whole.losses)
    assert resumed.losses == whole.losses[lightnings.BATCHES :]
    expected = numbers(whole.model, whole.optimizer)
    assert_same(numbers(resumed.model, resumed.optimizer), expected)


# ---- from torch's --------------------------------------------------------------------------------


@each_mode
def test_a_run_of_torchs_goes_on_in_a_mode(mode: str) -> None:
    def arrived() -> tuple[nn.Module, Any]:
        model = Model(UNEVEN)
        optimizer = torch.optim.AdamW(model.parameters())
        train_on_numbers(model, optimizer, range(2))
        return model, optimizer

    model, torchs = arrived()
    optimizer = fusedopt.AdamW.from_torch(torchs, **MODES[mode])
    other, other_torchs = arrived()
    expected = fusedopt.AdamW(other.parameters(), **MODES[mode])
    expected.load_state_dict(other_torchs.state_dict())
    for each, its in ((model, optimizer), (other, expected)):
        train_on_numbers(each, its, range(2, 5))
    assert_in_mode(mode, optimizer)
    assert_same(numbers(model, optimizer), numbers(other, expected))


@each_mode
def test_a_name_of_torch_takes_a_mode(mode: str) -> None:
    model, other = Model(UNEVEN), Model(UNEVEN)
    with fusedopt.as_torch_optim():
        named: Any = torch.optim.AdamW
        optimizer = named(model.parameters(), **MODES[mode])
    expected = fusedopt.AdamW(other.parameters(), **MODES[mode])
    for each, its in ((model, optimizer), (other, expected)):
        train_on_numbers(each, its, range(3))
    assert_same(numbers(model, optimizer), numbers(other, expected))


def test_a_wrong_answer_for_a_state_changes_none() -> None:
    model = Model(UNEVEN)
    torchs = torch.optim.AdamW(model.parameters())
    train_on_numbers(model, torchs, range(1))
    with pytest.raises(ValueError, match="answer of state_dtype"):
        fusedopt.AdamW.from_torch(
            torchs, state_dtype=lambda p: "mxfp8" if p.ndim > 1 else torch.int8
        )
    assert {state["exp_avg"].dtype for state in torchs.state.values()} == {torch.bfloat16}
