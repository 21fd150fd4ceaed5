#!/usr/bin/env bash
# torch 2.13.0, optim.Muon(nesterov=False) with bfloat16 parameters: the momentum buffer is handed to the
# Newton-Schulz iteration as it is, because a bfloat16 tensor needs no cast, and divided by its norm there, in
# place. From then on the momentum is a unit matrix's, whatever the gradients are. With float32 parameters, and
# with nesterov=True, the buffer stays what it should be.
#
# Seen: an 8 x 8 gradient of eights, momentum 0.5, one step: the buffer is 4.0 in float32, 0.125 in bfloat16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch

found = {}
for dtype in (torch.float32, torch.bfloat16):
    for nesterov in (True, False):
        p = torch.nn.Parameter(torch.zeros(8, 8, dtype=dtype))
        optimizer = torch.optim.Muon([p], lr=0.1, momentum=0.5, nesterov=nesterov, weight_decay=0.0)
        p.grad = torch.full_like(p, 8.0)
        optimizer.step()
        found[dtype, nesterov] = optimizer.state[p]["momentum_buffer"][0, 0].item()
for (dtype, nesterov), buffer in found.items():
    print(f"torch {torch.__version__}, {dtype}, nesterov={nesterov}: buffer {buffer}, expected 4.0")
assert found.pop((torch.bfloat16, False)) == 0.125, "it has changed"
assert all(buffer == 4.0 for buffer in found.values())
PYTHON
