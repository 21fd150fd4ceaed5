"""Statistics of DTensors, which are those of the whole tensor, and in libraries that log them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fusedopt
from tests.ecosystem.common import OPTIMIZERS, loss_of, make_model
from tests.ecosystem.ranks import run_ranks

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported


STEPS = 3


# ---- ranks ---------------------------------------------------------------------------------------


def whole_numbers(model: nn.Module) -> list[Tensor]:
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in model.parameters()
    ]


def watched_shards() -> dict[str, Any]:
    """Train with every optimizer on shards; whole numbers say what the statistics are to be."""
    results: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, make in OPTIMIZERS.items():
        for dtype in (torch.float64, torch.bfloat16):
            model = make_model().to(dtype)
            for layer in (model[0], model[2]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            optimizer = make(list(model.named_parameters()), track_statistics=True)
            found = []
            for step in range(STEPS):
                generator = torch.Generator().manual_seed(step)
                x = torch.randn(8, 7, generator=generator, dtype=torch.float64).to(dtype)
                optimizer.zero_grad()
                loss_of(model, x).backward()  # type: ignore[no-untyped-call]  # of torch
                gradients = [p.grad.full_tensor().double() for p in model.parameters()]  # type: ignore[union-attr]  # all have one
                before = whole_numbers(model)
                optimizer.step()
                after = whole_numbers(model)
                moved = [b.double() - a.double() for a, b in zip(before, after, strict=True)]
                statistics = optimizer.statistics
                found.append(
                    {
                        "names": statistics.names,
                        "numel": (statistics.numel, [x.numel() for x in after]),
                        "grad_norm": (statistics.grad_norm, [float(g.norm()) for g in gradients]),
                        "param_norm": (
                            statistics.param_norm,
                            [float(x.double().norm()) for x in after],
                        ),
                        "update_norm": (statistics.update_norm, [float(x.norm()) for x in moved]),
                        "unmoved": (
                            statistics.unmoved,
                            [
                                float((x == 0).sum()) if dtype == torch.bfloat16 else float("nan")
                                for x in moved
                            ],
                        ),
                    }
                )
            results[f"{name} {dtype}"] = found
    return results


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_of_dtensors_they_are_those_of_the_whole(ranks: int, tmp_path: Path) -> None:
    names = [name for name, _ in make_model().named_parameters()]
    for result in run_ranks(watched_shards, ranks, tmp_path):
        for config, steps in result.items():
            for step in steps:
                assert step.pop("names") == names
                for vector, (actual, expected) in step.items():
                    torch.testing.assert_close(
                        actual,
                        torch.tensor(expected, dtype=actual.dtype),
                        rtol=1e-6,
                        atol=0,
                        equal_nan=True,
                        msg=f"{vector} of {config}: {actual}, expected {expected}",
                    )


# ---- libraries -----------------------------------------------------------------------------------


def test_the_trainer_hands_them_on(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from fusedopt.integrations.transformers import StatisticsCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.layer(x).square().mean()}

    model = Model()
    optimizer = fusedopt.AdamW(model.named_parameters(), track_statistics=2)
    logged: list[tuple[int, dict[str, float]]] = []
    args = TrainingArguments(str(tmp_path), max_steps=5, report_to=[], use_cpu=True)
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"x": torch.ones(3)}] * 40,
        optimizers=(optimizer, None),
        callbacks=[StatisticsCallback(lambda numbers, step: logged.append((step, numbers)))],
    )
    trainer.train()
    assert [step for step, _ in logged] == [2, 4]
    assert optimizer.statistics is not None
    assert logged[-1][1] == optimizer.statistics.to_dict("statistics/")
    assert "statistics/update_ratio/layer.weight" in logged[0][1]


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_a_lightning_module_logs_them(tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule
    from lightning.pytorch import Trainer as LightningTrainer
    from lightning.pytorch.loggers.logger import DummyLogger

    from fusedopt.integrations.lightning import LogsStatistics

    logged: list[tuple[int, dict[str, float]]] = []

    class Logger(DummyLogger):  # type: ignore[misc]  # mypy does not see lightning
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if any(name.startswith("statistics/") for name in metrics):
                logged.append((step or 0, metrics))

    class Model(LogsStatistics, LightningModule):  # type: ignore[misc]  # lightning is untyped where mypy runs
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def configure_optimizers(self) -> Any:
            return fusedopt.AdamW(self.named_parameters(), track_statistics=2)

        def training_step(self, batch: Tensor) -> Tensor:
            loss: Tensor = self.layer(batch).square().mean()
            return loss

    trainer = LightningTrainer(
        max_steps=5,
        logger=Logger(),
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    rows: Any = torch.ones(20, 3)
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    trainer.fit(Model(), loader)
    assert [step for step, _ in logged] == [2, 4]
    assert "statistics/grad_norm/layer.bias" in logged[0][1]
