"""Spikes on several ranks, and their window in distributed checkpoints."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedopt
from fusedopt import Spikes
from tests.ecosystem.common import make_model
from tests.ecosystem.ranks import run_ranks
from tests.ecosystem.test_checkpoints import numbers, set_gradients
from tests.helpers import assert_same_bits

SPIKY = (5, 9, 10)
STEPS = 14
SPIKES = {
    "skip": Spikes(window=6, warmup=4, patience=3),
    "clip": Spikes(window=6, warmup=4, action="clip"),
}
FORMS = {
    "sharded": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
}


def make(action: str, *, shard: bool) -> tuple[nn.Module, Any]:
    model = make_model()
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, fusedopt.AdamW(model.parameters(), lr=0.01, skip_spikes=SPIKES[action])


def train(model: nn.Module, optimizer: Any, steps: range) -> list[bool]:
    skipped = []
    for step in steps:
        before = optimizer.skipped_steps
        set_gradients(model, step)
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= 100 if step in SPIKY else 1
        optimizer.step()
        skipped.append(optimizer.skipped_steps != before)
    return skipped


# ---- ranks decide alike --------------------------------------------------------------------------


def decide() -> dict[str, tuple[list[bool], list[Tensor]]]:
    found = {}
    for action in SPIKES:
        run = make(action, shard=True)
        found[action] = (train(*run, range(STEPS)), numbers(*run))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_decide_alike(ranks: int, tmp_path: Path) -> None:
    everyone = run_ranks(decide, ranks, tmp_path)
    for action in SPIKES:
        run = make(action, shard=False)
        skipped = train(*run, range(STEPS))
        assert sum(skipped) == (len(SPIKY) if action == "skip" else 0)
        for found_skipped, found in (each[action] for each in everyone):
            assert found_skipped == skipped
            for x, y in zip(found, everyone[0][action][1], strict=True):
                assert_same_bits(x, y)
            for x, y in zip(found, numbers(*run), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


# ---- checkpoints ---------------------------------------------------------------------------------

CHAIN = [(2, 7), (1, 8), (4, 10), (2, STEPS)]  # ranks, and the step that they come to


def one_link() -> dict[str, list[Tensor]]:
    """Read the checkpoints of the link before, train on, and write one."""
    folder, link = Path(os.environ["FOLDER"]), int(os.environ["LINK"])
    cases = [(action, form) for action in SPIKES for form in FORMS]
    runs = {case: make(case[0], shard=True) for case in cases}

    def state() -> dict[str, Any]:
        return {
            " ".join(case): dict(
                zip(
                    ("model", "optimizer"),
                    get_state_dict(*run, options=FORMS[case[1]]),
                    strict=True,
                )
            )
            for case, run in runs.items()
        }

    begin = 0
    if link > 0:
        begin = CHAIN[link - 1][1]
        read = state()
        load(read, checkpoint_id=folder / str(link - 1))
        for case, run in runs.items():
            of_case = read[" ".join(case)]
            set_state_dict(
                *run,
                model_state_dict=of_case["model"],
                optim_state_dict=of_case["optimizer"],
                options=FORMS[case[1]],
            )
    for run in runs.values():
        train(*run, range(begin, CHAIN[link][1]))
    save(state(), checkpoint_id=folder / str(link))
    return {" ".join(case): numbers(*run) for case, run in runs.items()}


def test_distributed_checkpoints_take_the_window_along(tmp_path: Path) -> None:
    links = []
    for link, (ranks, _) in enumerate(CHAIN):
        directory = tmp_path / f"link {link}"
        directory.mkdir()
        links.append(run_ranks(one_link, ranks, directory, FOLDER=str(tmp_path), LINK=str(link)))
    for action in SPIKES:
        model, optimizer = make(action, shard=False)
        begin = 0
        for (_, end), everyone in zip(CHAIN, links, strict=True):
            train(model, optimizer, range(begin, end))
            begin = end
            for form in FORMS:
                for rank in everyone:
                    found = rank[f"{action} {form}"]
                    for x, y in zip(found, numbers(model, optimizer), strict=True):
                        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def resume_on_each_rank() -> dict[str, list[Tensor]]:
    """The same number of ranks goes on with the same bits."""
    found = {}
    for action in SPIKES:
        for form, options in FORMS.items():
            model, optimizer = make(action, shard=True)
            train(model, optimizer, range(8))
            other_model, other = make(action, shard=True)
            other_model.load_state_dict(model.state_dict())
            # (Its tensors are those of the optimizer.)
            saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            set_optimizer_state_dict(other_model, other, saved, options=options)
            train(model, optimizer, range(8, STEPS))
            train(other_model, other, range(8, STEPS))
            found[f"{action} {form}"] = [*numbers(model, optimizer), *numbers(other_model, other)]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_has_the_bits_of_the_other(ranks: int, tmp_path: Path) -> None:
    for found in run_ranks(resume_on_each_rank, ranks, tmp_path):
        for numbers_of_both in found.values():
            half = len(numbers_of_both) // 2
            for x, y in zip(numbers_of_both[:half], numbers_of_both[half:], strict=True):
                assert_same_bits(x, y)


# ---- ranks with gradients of their own -----------------------------------------------------------


def refuse() -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    p = nn.Parameter(torch.ones(3))
    try:
        ZeroRedundancyOptimizer([p], fusedopt.SGD, lr=0.1, skip_spikes=True)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_zero_is_refused(tmp_path: Path) -> None:
    for message in run_ranks(refuse, 2, tmp_path):
        assert "skip_spikes" in message
        assert "ZeroRedundancyOptimizer leaves each rank others" in message
