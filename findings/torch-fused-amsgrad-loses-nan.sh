#!/usr/bin/env bash
# torch 2.13.0, Adam(amsgrad=True, fused=True) on a CPU: of a NaN gradient the largest second moment keeps NaN
# in whole groups of 8 elements, and a number in those after them; the for-loop has NaN in all.
#
# Seen: of 23 elements NaN in max_exp_avg_sq: fused 16, for-loop 23
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def count(**kwargs):
    p = torch.nn.Parameter(torch.zeros(23))
    optimizer = torch.optim.Adam([p], amsgrad=True, **kwargs)
    p.grad = torch.full((23,), torch.nan)
    optimizer.step()
    return int(optimizer.state[p]["max_exp_avg_sq"].isnan().sum())


fused, loop = count(fused=True), count(foreach=False)
print(f"torch {torch.__version__}: of 23 NaN in max_exp_avg_sq: fused {fused}, for-loop {loop}")
assert loop == 23
assert fused < 23, "it has changed"
PYTHON
