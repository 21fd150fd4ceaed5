"""Distributed checkpoints: any number of ranks reads what any other wrote, torch.optim included."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.ecosystem.common import OPTIMIZERS, make_model
from tests.ecosystem.ranks import run_ranks
from tests.helpers import assert_same_bits, oracle, values
from tests.registry import PLAIN_CONFIGS

# Numbers of processes, one after the other: each goes on where the one before it was.
CHAIN = [4, 2, 1, 2, 4]
STEPS = 2  # of each

TORCHS = {config.name: config for config in PLAIN_CONFIGS if config.torch_cls}


class Case(NamedTuple):
    """An optimizer, and the form of its checkpoints."""

    name: str
    form: str
    alternates: bool
    """Whether every second link of the chain is torch's own optimizer."""

    def make(self, model: nn.Module, link: int) -> Any:
        if self.alternates and link % 2 == 1:
            config = TORCHS[self.name]
            return oracle(config)(model.parameters(), **config.kwargs)
        return OPTIMIZERS[self.name](model.parameters())

    @property
    def options(self) -> StateDictOptions:
        return StateDictOptions(
            full_state_dict=self.form == "full",
            flatten_optimizer_state_dict=self.form == "flattened",
        )

    def __str__(self) -> str:
        return f"{self.name} {self.form}{' alternating' if self.alternates else ''}"


CASES = [
    Case(name, form, alternates)
    for form in ("sharded", "full", "flattened")
    for alternates in (False, True)
    for name in (TORCHS if alternates else OPTIMIZERS)
]


def set_gradients(model: nn.Module, step: int) -> None:
    for i, p in enumerate(model.parameters()):
        gradient = values(tuple(p.shape), 1000 * (step + 1) + i)
        if isinstance(p, DTensor):
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements)
        else:
            p.grad = gradient


def train(model: nn.Module, optimizer: Any, link: int) -> None:
    for step in range(link * STEPS, (link + 1) * STEPS):
        set_gradients(model, step)
        optimizer.step()


def numbers(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """Return parameters and state, whole."""
    found = []
    for p in model.parameters():
        state = optimizer.state[p]
        for x in (p, *(state[key] for key in sorted(state))):
            found.append((x.full_tensor() if isinstance(x, DTensor) else x).detach().clone())
    return found


# ---- what the ranks do ---------------------------------------------------------------------------


def one_link() -> dict[str, list[Tensor]]:
    """Read the checkpoint of all cases, if this is not the first link, train on, and write one."""
    folder, link, size = Path(os.environ["FOLDER"]), int(os.environ["LINK"]), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    runs: dict[Case, tuple[nn.Module, Any]] = {}
    for case in CASES:
        model = make_model()
        if size > 1:  # a single process has plain tensors
            fully_shard(model, mesh=mesh)
        runs[case] = (model, case.make(model, link))

    def state() -> dict[str, Any]:
        return {
            str(case): dict(
                zip(("model", "optimizer"), get_state_dict(*run, options=case.options), strict=True)
            )
            for case, run in runs.items()
        }

    if link > 0:
        read = state()
        load(read, checkpoint_id=folder / str(link - 1))
        for case, run in runs.items():
            of_case = read[str(case)]
            set_state_dict(
                *run,
                model_state_dict=of_case["model"],
                optim_state_dict=of_case["optimizer"],
                options=case.options,
            )
    for run in runs.values():
        train(*run, link)
    save(state(), checkpoint_id=folder / str(link))
    return {str(case): numbers(*run) for case, run in runs.items()}


# ---- what has to hold ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What each rank of each link of the chain had in the end."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return [
        run_ranks(one_link, size, tmp_path_factory.mktemp("link"), FOLDER=folder, LINK=str(link))
        for link, size in enumerate(CHAIN)
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_link_goes_on_as_one_process_would(case: Case, links: list[list[Any]]) -> None:
    model = make_model()
    optimizer: Any = None
    for link, ranks in enumerate(links):
        following = case.make(model, link)
        if optimizer:
            following.load_state_dict(optimizer.state_dict())
        optimizer = following
        train(model, optimizer, link)
        for rank in ranks:
            expected = numbers(model, optimizer)
            for x, y in zip(rank[str(case)], expected, strict=True):
                assert_same_bits(x, y)
