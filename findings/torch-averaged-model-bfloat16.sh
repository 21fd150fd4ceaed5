#!/usr/bin/env bash
# torch 2.13.0, torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn(0.999) on a bfloat16 model: the average
# never moves. A thousandth of the way rounds to nothing, so 5000 updates after the weights went from 1 to 2
# it is still 1, where it should be 1.993. Nothing warns.
#
# Seen: bfloat16 1.0, float32 1.9933
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def average(dtype):
    model = torch.nn.Linear(4, 4).to(dtype)
    torch.nn.init.constant_(model.weight, 1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    averaged.update_parameters(model)  # the first one copies
    torch.nn.init.constant_(model.weight, 2)
    for _ in range(5000):
        averaged.update_parameters(model)
    return averaged.module.weight[0, 0].item()


low, full = average(torch.bfloat16), average(torch.float32)
print(f"torch {torch.__version__}: bfloat16 {low}, float32 {full:.4f}")
assert full > 1.99
assert low == 1.0, "it has changed"
PYTHON
