"""How far ahead kernels ask for memory changes no bits, and may be said in the environment."""

from __future__ import annotations

import pytest

from fusedopt import _core
from tests.helpers import run_python

HASH = """
import hashlib, torch, fusedopt
from fusedopt import _core
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype, options in [
    (torch.float32, {}),
    (torch.float64, {}),
    (torch.float16, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"state_dtype": "mxfp8", "master_weights": True}),
    (torch.bfloat16, {"state_dtype": torch.bfloat16, "stochastic_rounding": True}),
]:
    shapes = [(70_001,), (3,), (1000, 64), (17, 33)]
    params = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    optimizer = fusedopt.AdamW(params, lr=1e-2, max_grad_norm=1.0, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
        digest.update(float(optimizer.grad_norm).hex().encode())
    for p in params:
        digest.update(p.detach().view(torch.uint8).numpy().tobytes())
print(*_core.ahead, digest.hexdigest())
"""


def in_a_process(ahead: str) -> list[str]:
    done = run_python("-c", HASH, FUSEDOPT_AHEAD=ahead)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_any_distance_gives_the_same_bits() -> None:
    *distances, bits = in_a_process("")
    assert distances == [str(ahead) for ahead in _core.ahead]
    for ahead in ("0", "64", "512", "2048", "8192"):
        assert in_a_process(ahead) == [ahead, ahead, bits]


@pytest.mark.parametrize("ahead", ["100", "-0x40", "-64", "512,", "512x", "16384", "far", "1e3"])
def test_what_is_no_distance_fails_at_import(ahead: str) -> None:
    done = run_python("-c", "import fusedopt", FUSEDOPT_AHEAD=ahead)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith(
        f"FUSEDOPT_AHEAD='{ahead}', expected a multiple of 64 from 0 to 8192: bytes"
    )
