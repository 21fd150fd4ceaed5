#!/usr/bin/env bash
# schedulefree 1.4.1 on bfloat16 parameters: nothing moves under a constant gradient, and under a noisy one the
# weights go the wrong way. The average of the iterates moves by 1/t of the way, which rounds to nothing, and
# the iterate itself is not stored but computed back from it.
#
# Seen: after 2000 steps from 1: constant gradient: float32 -0.000, bfloat16 1.000;
#       gradients of mean 0.5 and variance 1: float32 0.553, bfloat16 1.020
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy schedulefree==1.4.1
"$folder/venv/bin/python" - <<'PYTHON'
import schedulefree
import torch

torch.set_num_threads(1)


def run(dtype, noisy):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    optimizer = schedulefree.AdamWScheduleFree([p], lr=1e-3)
    optimizer.train()
    for _ in range(2000):
        gradient = torch.randn(1000, generator=generator) + 0.5 if noisy else torch.ones(1000)
        p.grad = gradient.bfloat16().to(dtype)
        optimizer.step()
    optimizer.eval()
    return p.float().mean().item()


constant = run(torch.float32, False), run(torch.bfloat16, False)
noisy = run(torch.float32, True), run(torch.bfloat16, True)
print("schedulefree 1.4.1: float32, bfloat16 from 1:")
print("constant gradient: %.3f, %.3f; noisy: %.3f, %.3f" % (*constant, *noisy))
assert constant[0] < 0.1 and noisy[0] < 0.7
assert constant[1] == 1 and noisy[1] > 1, "it has changed"
PYTHON
