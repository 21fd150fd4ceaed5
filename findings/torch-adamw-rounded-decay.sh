#!/usr/bin/env bash
# torch 2.13.0, AdamW in float32, for-loop, foreach and fused: at lr=1e-5 and weight_decay=0.01 weights decay
# 17 to 19 % too fast. Each step multiplies by 1 - lr * weight_decay = 1 - 1e-7, which float32 rounds to
# 1 - 1.19e-7. In float64 the same run decays as asked.
#
# Seen: decay of 3000 steps, over what was asked: for-loop 1.169, foreach 1.169, fused 1.169, float64 1.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.set_num_threads(1)
STEPS, LR, DECAY = 3000, 1e-5, 0.01
start = torch.linspace(1, 2, 1000, dtype=torch.float64)


def run(decay, dtype, **kwargs):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(start.to(dtype, copy=True))
    optimizer = torch.optim.AdamW([p], lr=LR, weight_decay=decay, **kwargs)
    for _ in range(STEPS):
        p.grad = torch.randn(1000, generator=generator).to(dtype)
        optimizer.step()
    return p.detach().double()


def ratio(dtype, **kwargs):
    """How much of the weights the decay took away, over how much it should have."""
    lost = (run(0.0, dtype, **kwargs) - run(DECAY, dtype, **kwargs)) / start
    return lost.mean().item() / (1 - (1 - LR * DECAY) ** STEPS)


loop = ratio(torch.float32, foreach=False)
foreach = ratio(torch.float32, foreach=True)
fused = ratio(torch.float32, fused=True)
exact = ratio(torch.float64, foreach=False)
print(f"torch {torch.__version__}: decay of {STEPS} steps, over what was asked:")
print(f"for-loop {loop:.3f}, foreach {foreach:.3f}, fused {fused:.3f}, float64 {exact:.3f}")
assert abs(exact - 1) < 1e-3
assert all(1.1 < x < 1.25 for x in (loop, foreach, fused)), "it has changed"
PYTHON
