#!/usr/bin/env bash
# pytorch-optimizer 4.1.0: the number of the step, from which moments are corrected, belongs to the group. A parameter
# whose first gradient comes in step 4 (an expert that was not routed to, a layer that was frozen) is
# corrected as if it had four, and its first steps are of the wrong size, in most of its optimizers.
#
# Seen: first two steps of a late parameter, over those of one that is alone: AdaBelief 0.66, AdaBound 0.66,
#       Adan 0.58, Lamb 0.35, LaProp 1.89, StableAdamW 0.38
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy pytorch-optimizer==4.1.0
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import pytorch_optimizer
import torch

warnings.simplefilter("ignore")
NAMES = ["AdaBelief", "AdaBound", "Adan", "Lamb", "LaProp", "StableAdamW"]


def moved(name, late):
    torch.manual_seed(0)
    always, sometimes = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    params = [always, sometimes] if late else [sometimes]
    optimizer = getattr(pytorch_optimizer, name)(params, lr=1e-3)
    for step in range(5 if late else 2):
        always.grad = torch.ones(3)
        sometimes.grad = torch.ones(3) if not late or step >= 3 else None
        optimizer.step()
    return (1 - sometimes).mean().item()


ratios = {name: moved(name, True) / moved(name, False) for name in NAMES}
print("pytorch-optimizer 4.1.0, steps of a late parameter over what they should be:")
print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
assert all(abs(ratio - 1) > 0.2 for ratio in ratios.values()), "it has changed"
PYTHON
