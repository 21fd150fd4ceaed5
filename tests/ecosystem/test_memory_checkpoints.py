"""Memory modes in distributed checkpoints: saved by some ranks, read by others, the same bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.ecosystem.memory import MODES, UNEVEN, Model, assert_same, joined, make_optimizer, train
from tests.ecosystem.memory import numbers as numbers_of
from tests.ecosystem.ranks import run_ranks

# Numbers of processes, one after the other: each goes on where the one before it was.
CHAIN = [4, 2, 1, 4]
STEPS = 2  # of each

OPTIONS = {
    "sharded": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "full, from one rank": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
}
CASES = [
    *(("AdamW", mode, "sharded") for mode in MODES),
    ("Lookahead", "random, 8 bits", "sharded"),
    ("AdamW", "masters, 8 bits", "flattened"),
    ("AdamW", "masters, 8 bits", "full"),
    ("AdamW", "random, 8 bits", "full, from one rank"),
    ("AdamW", "masters, 8 bits", "full, from one rank"),
]


def start(name: str, mode: str) -> tuple[nn.Module, Any]:
    model = Model(UNEVEN)
    if dist.is_initialized() and dist.get_world_size() > 1:  # one process has plain tensors
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, make_optimizer(name, model, mode)


def one_link() -> dict[str, Any]:
    """Read the checkpoint of all cases, if this is not the first link, train on, and write one."""
    folder, link = Path(os.environ["FOLDER"]), int(os.environ["LINK"])
    runs = {case: start(*case[:2]) for case in CASES}

    def state() -> dict[str, Any]:
        return {
            " ".join(case): dict(
                zip(
                    ("model", "optimizer"),
                    get_state_dict(*run, options=OPTIONS[case[2]]),
                    strict=True,
                )
            )
            for case, run in runs.items()
        }

    if link > 0:
        read = state()
        load(read, checkpoint_id=folder / str(link - 1))
        for case, run in runs.items():
            of_case = read[" ".join(case)]
            set_state_dict(
                *run,
                model_state_dict=of_case["model"],
                optim_state_dict=of_case["optimizer"],
                options=OPTIONS[case[2]],
            )
    for run in runs.values():
        train(*run, range(link * STEPS, (link + 1) * STEPS))
    save(state(), checkpoint_id=folder / str(link))
    return {" ".join(case): numbers_of(*run) for case, run in runs.items()}


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """What each rank of each link of the chain had in the end."""
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    return [
        run_ranks(one_link, size, tmp_path_factory.mktemp("link"), FOLDER=folder, LINK=str(link))
        for link, size in enumerate(CHAIN)
    ]


@pytest.mark.parametrize(("name", "mode", "form"), CASES)
def test_every_link_goes_on_as_one_process_would(
    name: str, mode: str, form: str, links: list[list[Any]]
) -> None:
    run = start(name, mode)
    for link, ranks in enumerate(links):
        train(*run, range(link * STEPS, (link + 1) * STEPS))
        assert_same(joined([rank[f"{name} {mode} {form}"] for rank in ranks]), numbers_of(*run))
