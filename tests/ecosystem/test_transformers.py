"""transformers: the Trainer with every optimizer, and with its clipping inside the step."""

from __future__ import annotations

import argparse
import gc
import inspect
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fusedopt
from fusedopt.integrations.transformers import FusedClipping
from tests.ecosystem.common import CONFIGS, OPTIMIZERS, each_name, torchs
from tests.ecosystem.digits import EXACT, watch
from tests.helpers import PlainLion, assert_same_bits, assert_same_state, assert_within

STEPS, ACCUMULATE, BATCH, CONTEXT = 4, 2, 4, 32
MAX_NORM = 0.25  # each step is clipped


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Keep what is imported out of the garbage collections that accelerate makes in each run."""
    gc.freeze()
    yield
    gc.unfreeze()


def make_texts() -> list[dict[str, torch.Tensor]]:
    """Return stretches of the source of argparse, a byte a token."""
    text = torch.frombuffer(bytearray(inspect.getsource(argparse).encode()), dtype=torch.uint8)
    rows = text[: STEPS * ACCUMULATE * BATCH * CONTEXT].long().view(-1, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in rows]


def make_model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=CONTEXT,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config).to(dtype)
    # The bias of the keys has a gradient of 0 but for rounding, which Adam would make large.
    model.transformer.h[0].attn.c_attn.bias.requires_grad_(False)
    return model


def fused(name: str) -> dict[str, Any]:
    """Return the Trainer's arguments for an optimizer."""
    if name == "Lookahead":
        return {"optimizers": lambda model: OPTIMIZERS[name](model.parameters())}
    return {"optimizer_cls_and_kwargs": (CONFIGS[name].cls, CONFIGS[name].kwargs)}


def torch_has(name: str) -> dict[str, Any]:
    if name == "Lookahead":
        return {"optimizers": lambda model: torchs(name, model.parameters())}
    cls, kwargs = CONFIGS[name].torch_cls, CONFIGS[name].kwargs
    return {
        "optimizer_cls_and_kwargs": (cls, {**kwargs, "foreach": False})
        if cls
        else (PlainLion, kwargs)
    }


def sgd(module: Any, **kwargs: Any) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (module.SGD, kwargs)}


def make_trainer(
    folder: Path,
    optimizer: dict[str, Any],
    *,
    cls: Any = Trainer,
    dtype: torch.dtype = torch.float64,
    **args: Any,
) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    model = make_model(dtype)
    if "optimizers" in optimizer:
        optimizer = {"optimizers": (optimizer["optimizers"](model), None)}
    arguments = {
        "max_steps": STEPS,
        "gradient_accumulation_steps": ACCUMULATE,
        "per_device_train_batch_size": BATCH,
        "max_grad_norm": MAX_NORM,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **args,
    }
    return cls(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=make_texts(),
        **optimizer,
    )


def inside(trainer: Any) -> Any:
    return trainer.optimizer.optimizer


def logged(trainer: Any, name: str) -> torch.Tensor:
    values = [row[name] for row in trainer.state.log_history if name in row]
    assert len(values) == trainer.state.max_steps
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("cls", [Trainer, FusedClipping])
@each_name
def test_losses_are_those_of_torchs(name: str, cls: Any, tmp_path: Path) -> None:
    actual = make_trainer(tmp_path, fused(name), cls=cls)
    actual.train()
    expected = make_trainer(tmp_path, torch_has(name))
    expected.train()
    for what in ("loss", "grad_norm", "learning_rate"):
        assert_within(logged(actual, what), logged(expected, what))
    assert logged(expected, "grad_norm").min() > MAX_NORM
    assert_same_state(inside(actual), inside(expected), assert_within)


# ---- clipping inside the step --------------------------------------------------------------------


@pytest.fixture
def torch_clips_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch's own pass")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", refuse)


@pytest.mark.usefixtures("torch_clips_nothing")
@pytest.mark.parametrize("max_norm", [MAX_NORM, 0.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_clips_once_for_all_that_was_accumulated(
    precision: str, max_norm: float, tmp_path: Path
) -> None:
    trainer = make_trainer(
        tmp_path,
        sgd(fusedopt, lr=2.0**-4),
        cls=FusedClipping,
        dtype=torch.float32,
        max_grad_norm=max_norm,
        bf16=precision == "bf16",
    )
    norms = watch(trainer.create_optimizer(), max_norm or math.inf)
    trainer.train()
    assert len(norms) == STEPS
    assert min(norms) > MAX_NORM
    assert_within(logged(trainer, "grad_norm"), torch.tensor(norms, dtype=torch.float64))


@pytest.mark.parametrize("kind", DistributedType)
def test_where_gradients_are_not_whole_the_trainer_clips(
    kind: DistributedType, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, fused("AdamW"), cls=FusedClipping)
    trainer.create_optimizer()
    assert trainer._clips_in_step(trainer.model)
    trainer.accelerator.state.distributed_type = kind
    whole = kind == DistributedType.NO or kind.name.startswith("MULTI")
    assert trainer._clips_in_step(trainer.model) == whole


@pytest.mark.parametrize("max_norm", [MAX_NORM, 0.0])
def test_other_optimizers_are_left_to_the_trainer(max_norm: float, tmp_path: Path) -> None:
    def trained(cls: Any) -> Any:
        trainer = make_trainer(tmp_path, torch_has("AdamW"), cls=cls, max_grad_norm=max_norm)
        trainer.train()
        return trainer

    actual, expected = trained(FusedClipping), trained(Trainer)
    assert_same_bits(logged(actual, "grad_norm"), logged(expected, "grad_norm"))
    assert_same_state(inside(actual), inside(expected), assert_same_bits)


# ---- mixed precision -----------------------------------------------------------------------------


def test_in_bfloat16_it_has_torchs_bits(tmp_path: Path) -> None:
    def trained(module: Any, cls: Any) -> Any:
        trainer = make_trainer(
            tmp_path,
            sgd(module, **EXACT),
            cls=cls,
            dtype=torch.float32,
            bf16=True,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
        )
        trainer.train()
        return trainer

    actual, expected = trained(fusedopt, FusedClipping), trained(torch.optim, Trainer)
    assert_same_bits(logged(actual, "loss"), logged(expected, "loss"))
    assert_same_state(inside(actual), inside(expected), assert_same_bits)


class Scales(Trainer):  # type: ignore[misc]  # mypy does not see transformers
    """Scales the loss for float16, which accelerate does on a GPU alone; torch can on a CPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=2.0**19, growth_interval=100
        )


class FusedScales(FusedClipping, Scales):
    pass


@pytest.mark.parametrize("amp_scaling", [False, True])
def test_in_float16_it_clips_what_is_unscaled_and_tells_of_skips(
    amp_scaling: bool, tmp_path: Path
) -> None:
    def made(cls: Any, optimizer: dict[str, Any]) -> Any:
        return make_trainer(tmp_path, optimizer, cls=cls, dtype=torch.float32, fp16=True)

    trainer = made(FusedScales, sgd(fusedopt, lr=2.0**-4, amp_scaling=amp_scaling))
    norms = watch(trainer.create_optimizer(), MAX_NORM)
    trainer.train()
    expected = made(Scales, sgd(torch.optim, lr=2.0**-4))
    expected.train()
    assert trainer.accelerator.scaler.get_scale() == expected.accelerator.scaler.get_scale() < 2**19
    finite = [norm for norm in norms if math.isfinite(norm)]
    assert 0 < len(finite) < STEPS
    assert min(finite) > MAX_NORM
    if not amp_scaling:  # inside the step, accelerate does not see a skip, and schedules it
        assert_same_bits(logged(trainer, "learning_rate"), logged(expected, "learning_rate"))


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in OPTIMIZERS), ("AdamW", "bf16")]
)
def test_a_resumed_run_has_the_bits_of_the_whole(name: str, precision: str, tmp_path: Path) -> None:
    def made() -> Any:
        return make_trainer(
            tmp_path,
            fused(name),
            cls=FusedClipping,
            dtype=torch.float32,
            bf16=precision == "bf16",
            save_strategy="steps",
            save_steps=STEPS // 2,
        )

    whole, resumed = made(), made()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    for what in ("loss", "grad_norm", "learning_rate"):
        assert_same_bits(logged(resumed, what), logged(whole, what))
    assert_same_state(inside(resumed), inside(whole), assert_same_bits)
