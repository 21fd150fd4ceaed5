"""Lightning: automatic and manual optimization, precisions, and clipping inside the step."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ExponentialLR

import fusedopt
from fusedopt.integrations.lightning import FusedClipping
from tests.ecosystem.common import OPTIMIZERS, each_name, torchs
from tests.ecosystem.digits import EXACT, loss_of, make_loader, make_model, watch
from tests.helpers import assert_same_bits, assert_same_state, assert_within

BATCHES, ACCUMULATE = 12, 2
MAX_NORM = 0.1  # each step is clipped

Make = Callable[[Any], Any]

pytestmark = [
    # Lightning's own use of torch; and it finds the data of these tests slow to load.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class Training:
    """What all the modules here do; Lightning's class comes behind."""

    def __init__(self, make: Make, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = make_model(dtype, dropout=0.0)
        self.optimizer = make(self.model.parameters())
        self.losses: list[float] = []

    def configure_optimizers(self) -> Any:
        scheduler = ExponentialLR(self.optimizer, 0.5)
        return {
            "optimizer": self.optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def training_step(self, batch: Any) -> Any:
        loss = loss_of(self.model, batch)
        self.losses.append(loss.item())
        return loss

    @property
    def found(self) -> torch.Tensor:
        return torch.tensor(self.losses, dtype=torch.float64)


class Plain(Training, LightningModule):  # type: ignore[misc]  # mypy does not see lightning
    pass


class Fused(FusedClipping, Training, LightningModule):  # type: ignore[misc]  # mypy does not see lightning
    pass


def fit(
    module: Any, *, dtype: torch.dtype = torch.float64, trainer: Any = Trainer, **args: Any
) -> Any:
    """Train a module for one epoch, and return it."""
    how = {key: args.pop(key) for key in ("ckpt_path", "weights_only") if key in args}
    arguments = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "accumulate_grad_batches": ACCUMULATE,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **args,
    }
    trainer(**arguments).fit(module, make_loader(BATCHES, dtype), **how)
    return module


# ---- torch's numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Plain, Fused])
@each_name
def test_losses_are_those_of_torchs(name: str, cls: Any) -> None:
    """In float64, where the two texts of a rule differ by roundings of 2^-53 alone."""

    def trained(cls: Any, make: Make) -> Any:
        module = cls(make, torch.float64)
        return fit(module, precision="64-true", gradient_clip_val=MAX_NORM)

    actual = trained(cls, OPTIMIZERS[name])
    expected = trained(Plain, lambda params: torchs(name, params))
    assert_within(actual.found, expected.found)
    assert_same_state(actual.optimizer, expected.optimizer, assert_within)


CLIPS: dict[str, Callable[[Any, Any], object]] = {
    "of the module": lambda module, optimizer: module.clip_gradients(
        optimizer, gradient_clip_val=MAX_NORM, gradient_clip_algorithm="norm"
    ),
    "of the mixin": lambda module, optimizer: module.configure_gradient_clipping(
        optimizer, gradient_clip_val=MAX_NORM
    ),
    "of the optimizer": lambda module, optimizer: optimizer.clip_grad_norm_(MAX_NORM),
    "of the step": lambda module, optimizer: None,
}


class Manual(Fused):
    """Optimizes by hand, and notes what can be read through Lightning's wrapper."""

    def __init__(self, make: Make, dtype: torch.dtype, clip: Any) -> None:
        super().__init__(make, dtype)
        self.automatic_optimization = False
        self.clip = clip
        self.norms: list[Any] = []

    def training_step(self, batch: Any) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        self.clip(self, optimizer)
        optimizer.step()
        self.norms.append(getattr(optimizer, "grad_norm", None))
        self.lr_schedulers().step()


@pytest.mark.parametrize("wrapped", [True, False], ids=["its wrapper", "the optimizer"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", ["AdamW", "Lookahead"])
def test_optimizing_by_hand(name: str, clip: str, wrapped: bool) -> None:
    def trained(make: Make, clip: str) -> Any:
        def clips(module: Any, optimizer: Any) -> None:
            chosen = optimizer if wrapped else module.optimizers(use_pl_optimizer=False)
            CLIPS[clip](module, chosen)

        module = Manual(make, torch.float64, clips)
        return fit(module, precision="64-true", accumulate_grad_batches=1)

    options = {"max_grad_norm": MAX_NORM} if clip == "of the step" else {}
    actual = trained(lambda params: OPTIMIZERS[name](params, **options), clip)
    expected = trained(lambda params: torchs(name, params), "of the module")
    assert_within(actual.found, expected.found)
    for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
        assert_within(p.detach(), q.detach())
    if clip != "of the module":  # else by torch
        assert min(actual.norms) > MAX_NORM


# ---- clipping inside the step --------------------------------------------------------------------


def watched(cls: Any, norms: list[list[float]], **options: Any) -> Any:
    def make(params: Any) -> Any:
        optimizer = fusedopt.SGD(params, lr=2.0**-4, **options)
        norms.append(watch(optimizer, MAX_NORM))
        return optimizer

    return cls(make, torch.float32)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_step_clips_once_for_all_that_was_accumulated(package: str, precision: str) -> None:
    lightning = importlib.import_module(package)

    # mypy does not see this one either
    class Module(FusedClipping, Training, lightning.LightningModule):  # type: ignore[misc, name-defined]
        pass

    norms: list[list[float]] = []
    fit(
        watched(Module, norms),
        dtype=torch.float32,
        trainer=lightning.Trainer,
        precision=precision,
        gradient_clip_val=MAX_NORM,
    )
    assert len(norms[0]) == BATCHES // ACCUMULATE
    assert min(norms[0]) > MAX_NORM


def test_what_is_not_clipping_by_norm_is_left_to_lightning() -> None:
    def trained(cls: Any, module: Any, **args: Any) -> Any:
        trained = cls(lambda params: module.SGD(params, **EXACT), torch.float32)
        return fit(trained, dtype=torch.float32, **args)

    for args in (
        {"gradient_clip_val": 2.0**-6, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": None},
        {"gradient_clip_val": 0.0},
        {"gradient_clip_val": -1.0},
    ):
        actual, expected = trained(Fused, fusedopt, **args), trained(Plain, torch.optim, **args)
        assert_same_bits(actual.found, expected.found)
    # Other optimizers.
    actual, expected = (
        trained(cls, torch.optim, gradient_clip_val=MAX_NORM) for cls in (Fused, Plain)
    )
    assert_same_bits(actual.found, expected.found)


def test_where_gradients_are_not_whole_lightning_clips() -> None:
    class Sharded(Fused):
        def on_train_start(self) -> None:
            self.trainer.strategy._precision_plugin = FSDPPrecision("32-true")

    module = Sharded(OPTIMIZERS["AdamW"], torch.float32)
    with pytest.raises(MisconfigurationException, match="not supported for `FSDPPrecision`"):
        fit(module, dtype=torch.float32, gradient_clip_val=MAX_NORM)


# ---- mixed precision -----------------------------------------------------------------------------


def in_float16(scaler: Any = torch.amp.GradScaler) -> Any:
    """Return the plugin that Lightning makes on a GPU, with a scale that soon is too large."""
    return MixedPrecision(
        "16-mixed", "cpu", scaler=scaler("cpu", init_scale=2.0**20, growth_interval=1)
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_in_mixed_precision_it_has_torchs_bits(precision: str) -> None:
    def trained(module: Any) -> Any:
        plugin = in_float16() if precision == "16-mixed" else MixedPrecision(precision, "cpu")
        trained = Plain(lambda params: module.SGD(params, **EXACT), torch.float32)
        fit(trained, dtype=torch.float32, plugins=[plugin])
        return trained, plugin.state_dict()

    (actual, scale), (expected, torch_scale) = trained(fusedopt), trained(torch.optim)
    assert_same_bits(actual.found, expected.found)
    assert_same_state(actual.optimizer, expected.optimizer, assert_same_bits)
    assert scale == torch_scale
    if precision == "16-mixed":
        assert scale["scale"] < 2.0 ** (20 + BATCHES // ACCUMULATE)  # some were skipped


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, fusedopt.GradScaler])
@pytest.mark.parametrize(
    ("cls", "args", "options"),
    [
        (Fused, {"gradient_clip_val": MAX_NORM}, {}),
        (Plain, {}, {"max_grad_norm": MAX_NORM}),
        (Plain, {}, {"max_grad_norm": MAX_NORM, "amp_scaling": True}),
    ],
    ids=["mixin", "max_grad_norm", "amp_scaling"],
)
def test_in_float16_it_clips_what_is_unscaled(
    cls: Any, args: Any, options: Any, scaler: Any
) -> None:
    norms: list[list[float]] = []
    module = watched(cls, norms, **options)
    fit(module, dtype=torch.float32, plugins=[in_float16(scaler)], **args)
    finite = [norm for norm in norms[0] if math.isfinite(norm)]
    assert 2 < len(finite) < BATCHES // ACCUMULATE
    assert min(finite) > MAX_NORM


@pytest.mark.parametrize("cls", [Plain, Fused])
def test_lightning_refuses_to_clip_what_the_step_unscales(cls: Any) -> None:
    module = cls(lambda params: fusedopt.SGD(params, lr=0.1, amp_scaling=True), torch.float32)
    with pytest.raises(RuntimeError, match="SGD, does not allow for gradient clipping"):
        fit(module, dtype=torch.float32, plugins=[in_float16()], gradient_clip_val=MAX_NORM)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@each_name
def test_a_resumed_run_has_the_bits_of_the_whole(name: str, precision: str, tmp_path: Path) -> None:
    def trained(epochs: int, **args: Any) -> Any:
        module = Fused(OPTIMIZERS[name], torch.float32)
        how = {"plugins": [in_float16()]} if precision == "16-mixed" else {"precision": precision}
        args = {"max_epochs": epochs, "gradient_clip_val": MAX_NORM, **how, **args}
        return fit(module, dtype=torch.float32, **args)

    path = tmp_path / "middle.ckpt"
    trained(1).trainer.save_checkpoint(path)
    whole, resumed = trained(2), trained(2, ckpt_path=path)
    assert_same_bits(resumed.found, whole.found[BATCHES:])
    assert_same_state(resumed.optimizer, whole.optimizer, assert_same_bits)
