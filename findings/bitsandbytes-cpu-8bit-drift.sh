#!/usr/bin/env bash
# bitsandbytes 0.50.2, AdamW8bit on a CPU: elements whose gradient is always zero move. Zero is not among the codes
# of the first moment, so every element has some momentum.
#
# Seen: after 100 steps at lr=1e-3 the elements without a gradient moved by up to 4.8e-04, and back in no step
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy bitsandbytes==0.50.2
"$folder/venv/bin/python" - <<'PYTHON'
import bitsandbytes
import torch

p = torch.nn.Parameter(torch.zeros(8192))
optimizer = bitsandbytes.optim.AdamW8bit([p], lr=1e-3, weight_decay=0.0)
gradient = torch.zeros(8192)
gradient[::2] = 1
drift = []
for _ in range(100):
    p.grad = gradient.clone()
    optimizer.step()
    drift.append(p[1::2].abs().max().item())
print(f"bitsandbytes {bitsandbytes.__version__}: elements without a gradient moved by {drift[-1]:.1e}")
assert drift == sorted(drift)
assert drift[-1] > 1e-4, "it has changed"
PYTHON
