#!/usr/bin/env bash
# torchao 0.18.0, AdamW8bit: an element whose gradient is 1e-4 of its neighbours' has a second moment of exactly 0,
# since nothing smaller than that fits the code, and so steps as far as eps lets it: 8 times as far as each of
# its neighbours, where Adam steps all equally far whatever their gradients' sizes.
#
# Seen: after 200 steps at lr=1e-3: neighbours -0.200, the quiet element -1.650; its exp_avg_sq 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy torchao==0.18.0
"$folder/venv/bin/python" - <<'PYTHON'
import logging

import torch

logging.disable(logging.CRITICAL)  # kernels of other devices, which it fails to load
from torchao.optim import AdamW8bit

p = torch.nn.Parameter(torch.zeros(64, 64))
optimizer = AdamW8bit([p], lr=1e-3, weight_decay=0.0)
gradient = torch.ones(64, 64)
gradient[0, 1] = 1e-4
for _ in range(200):
    p.grad = gradient.clone()
    optimizer.step()
second_moment = optimizer.state[p]["exp_avg_sq"].dequantize()[0, 1].item()
loud, quiet = p[0, 0].item(), p[0, 1].item()
print(f"torchao 0.18.0: neighbours {loud:.3f}, quiet {quiet:.3f}; its exp_avg_sq {second_moment}")
assert abs(loud + 0.2) < 1e-3
assert second_moment == 0 and quiet < 5 * loud, "it has changed"
PYTHON
