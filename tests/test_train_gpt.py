"""The demo's memory modes: it trains in each, and says what is kept."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch

from examples import train_gpt
from examples.train_gpt import MEMORY

each_mode = pytest.mark.parametrize("mode", MEMORY)
BYTES = {  # of weight, gradient and states, where all is 8 bits that may be
    "float32": 16.0,
    "float32-mxfp8": 10.0625,
    "bfloat16": 8.0,
    "exact": 14.0,
    "exact-bfloat16": 10.0,
    "exact-mxfp8": 8.0625,
    "random": 8.0,
    "random-mxfp8": 6.0625,
}


@each_mode
def test_the_demo_trains_in_each_mode(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A smaller model, and fewer words of it: the same code.
    monkeypatch.setattr(train_gpt.GPT.__init__, "__defaults__", (64, 1))
    generate = train_gpt.generate
    monkeypatch.setattr(train_gpt, "generate", lambda m, p, n, seed: generate(m, p, n // 60, seed))
    arguments = ["--steps", "10", "--memory", mode, "--out", str(tmp_path / "gpt.png")]
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", *arguments])
    train_gpt.main()
    printed = capsys.readouterr().out
    assert (
        f"memory: fusedopt keeps {MEMORY[mode].kept} (torch: {MEMORY['float32'].kept})" in printed
    )
    (theirs, ours) = re.findall(
        r"^bytes kept a weight +([\d.]+) +([\d.]+)$", printed, re.MULTILINE
    )[0]
    assert float(theirs) == 16
    # Vectors keep float32 moments under 8 bits.
    assert float(ours) == pytest.approx(BYTES[mode], abs=0.1)
    assert float(ours) >= BYTES[mode]


@each_mode
def test_masters_start_as_the_float32_weights(mode: str) -> None:
    torch.manual_seed(0)
    start = train_gpt.GPT(32, 1)
    model = copy.deepcopy(start).to(MEMORY[mode].dtype)
    optimizer = train_gpt.fused_side("AdamW", model, start, MEMORY[mode], seed=0)
    weights = optimizer.master_state_dict(model)
    equal = all(torch.equal(weights[name], w) for name, w in start.state_dict().items())
    assert equal == (mode.startswith(("exact", "float32")))


def test_a_loss_is_of_the_stored_weights() -> None:
    torch.manual_seed(0)
    model = train_gpt.GPT(32, 1)
    tokens = torch.randint(256, (2, 8))
    stored = copy.deepcopy(model).bfloat16()
    assert torch.equal(model.logits(tokens), model(tokens))
    assert torch.equal(stored.logits(tokens), copy.deepcopy(stored).float()(tokens))
    # (Torch gives backward() no types.)
    stored.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in stored.parameters())
