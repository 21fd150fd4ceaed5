"""Ranks that have other gradients each: none clips, skips or unscales by its own alone."""

from __future__ import annotations

import pathlib

import pytest
import torch

from tests.helpers import run_two_ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without torch.distributed"
)

FSDP1 = """
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

def message(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"

def trained(use_orig_params, clip, bad=False, scaler=None, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    model = FullyShardedDataParallel(
        model, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    optimizer = fusedopt.SGD(model.parameters(), lr=0.1, **options)
    loss = (model(torch.full((2, 5), 1.0 + rank)) * 100).square().sum()
    (scaler.scale(loss) if scaler else loss).backward()
    if bad and rank == 1:
        next(p for p in model.parameters() if p.numel()).grad.fill_(float("inf"))
    if clip == "method":
        optimizer.clip_grad_norm_(1.0)
    if clip == "model":
        model.clip_grad_norm_(1.0)
    if clip == "given":
        squares = sum(p.grad.double().square().sum() for p in model.parameters()
                      if p.grad is not None and p.numel())
        dist.all_reduce(squares)
        optimizer.clip_grads_with_norm_(1.0, squares.sqrt())
    if clip == "unscale_":
        scaler.unscale_(optimizer)
    scaler.step(optimizer) if scaler else optimizer.step()
    with FullyShardedDataParallel.summon_full_params(model):
        return [p.detach().double().sum().item() for p in model.parameters()]

make_scaler = lambda: ShardedGradScaler("cpu", init_scale=4.0)
results = {}
for orig in (False, True):
    results[str(orig)] = {
        "max_grad_norm": message(lambda: trained(orig, "", max_grad_norm=1.0)),
        "method": message(lambda: trained(orig, "method")),
        "skip_nonfinite": message(lambda: trained(orig, "", True, skip_nonfinite=True)),
        "scaler": message(lambda: trained(orig, "", True, make_scaler(), amp_scaling=True)),
        "fused scaler": message(
            lambda: trained(orig, "", True, fusedopt.GradScaler("cpu", init_scale=4.0))
        ),
        "clipped": [trained(orig, "model"), trained(orig, "given")],
        "skipped": [
            trained(orig, "given", True, skip_nonfinite=True),
            trained(orig, "unscale_", True, make_scaler(), amp_scaling=True),
        ],
    }
"""


def test_fsdp1_is_refused_what_each_rank_would_decide_alone(tmp_path: pathlib.Path) -> None:
    ranks = run_two_ranks(FSDP1, tmp_path)
    for found in (found for rank in ranks for found in rank.values()):
        for refused in ("max_grad_norm", "method", "skip_nonfinite", "scaler", "fused scaler"):
            assert "FullyShardedDataParallel leaves each rank others" in found[refused]
            assert "model.clip_grad_norm_(max_norm)" in found[refused]
        by_model, by_given_norm = found["clipped"]
        assert by_given_norm == pytest.approx(by_model, rel=1e-5)
    for split in ("False", "True"):
        skipped = [rank[split]["skipped"] for rank in ranks]
        assert skipped[0] == skipped[1]
        assert skipped[0][0] == skipped[0][1]  # nothing has moved


ZERO = """
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

def message(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"

def make(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    model = DistributedDataParallel(model)
    return model, ZeroRedundancyOptimizer(model.parameters(), fusedopt.SGD, lr=0.1, **options)

def gradients(model):
    (model(torch.full((2, 5), 1.0 + rank)) * 100).square().sum().backward()
    return [p.grad for p in model.parameters()]

def later(**options):
    model, zero = make()
    gradients(model)
    for name, value in options.items():
        setattr(zero.optim, name, value)
    zero.optim.clip_grad_norm_(1.0) if not options else zero.step()

def clipped(given):
    model, zero = make()
    norm = fusedopt.get_total_norm(gradients(model))
    if given:
        zero.optim.clip_grads_with_norm_(1.0, norm)
    else:
        fusedopt.clip_grad_norm_(model.parameters(), 1.0)
    zero.step()
    return [p.detach().double().sum().item() for p in model.parameters()]

results = {
    "refused": [
        message(lambda: make(max_grad_norm=1.0)),
        message(lambda: make(skip_nonfinite=True)),
        message(lambda: later(max_grad_norm=1.0)),
        message(lambda: later(skip_nonfinite=True)),
        message(later),
    ],
    "clipped": [clipped(False), clipped(True)],
}
"""


def test_zero_is_refused_what_each_rank_would_decide_alone(tmp_path: pathlib.Path) -> None:
    ranks = run_two_ranks(ZERO, tmp_path)
    for found in ranks:
        for message in found["refused"]:
            assert "ZeroRedundancyOptimizer leaves each rank others" in message
            assert "fusedopt.clip_grad_norm_(model.parameters(), max_norm)" in message
        assert found["clipped"][1] == pytest.approx(found["clipped"][0], rel=1e-6)
    assert ranks[0]["clipped"] == ranks[1]["clipped"]
