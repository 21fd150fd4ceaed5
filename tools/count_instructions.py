"""Counts the instructions of a step on many tiny tensors, and holds them to recorded bounds.

    make count [ARGS=--record]

The exit status is 1 if a step takes more than it may; --record makes what it takes the new bound.

Times on a busy machine say little; valgrind counts the same instructions again and again. What is
counted is all of `optimizer.step()` on 100 tensors of 16 elements: Python, gather and kernel, in
the generic instruction set, since valgrind has no AVX-512. Also where each tensor is a param group
of its own, where each step has new gradients from a backward pass, and, in a build for tests, on a
device whose kernels do nothing. Python and torch are part of it, and their counts hold for one
version of each: with others, the counts are printed without a verdict.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tools" / "instructions.json"
BUILD = ROOT / "build" / "instructions"
REQUESTS = BUILD / "libcallgrind_requests.so"

OPTIMIZERS = ("SGD", "AdamW", "Lion")
ON_DEVICE = "AdamW_on_device"
IN_GROUPS = "AdamW_in_groups"  # of one tensor each
FRESH = "AdamW_fresh"  # gradients, from a backward pass
TENSORS, ELEMENTS, STEPS = 100, 16, 10
MARGIN = 0.05


def environment() -> dict[str, str]:
    """Return what the counts depend on, besides this project."""
    import torch  # noqa: PLC0415  (the process that only starts valgrind needs none of it)

    from fusedopt import _core  # noqa: PLC0415

    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "torch": torch.__version__, "compiler": _core.compiler}


def rows(emulated_device: bool) -> tuple[str, ...]:
    """Return what is counted; the device is last, since it stays."""
    return (*OPTIMIZERS, IN_GROUPS, FRESH, *([ON_DEVICE] if emulated_device else []))


def step_under_valgrind() -> None:
    """Take the steps that are counted; runs under callgrind."""
    import torch  # noqa: PLC0415

    import fusedopt  # noqa: PLC0415
    from fusedopt import _core, _engine  # noqa: PLC0415
    from fusedopt.bench.rows import ARGUMENTS  # noqa: PLC0415

    callgrind = ctypes.CDLL(str(REQUESTS))
    for row in rows(_core.emulated_device):
        name = row.partition("_")[0]
        if row == ON_DEVICE:
            _engine.engine = _core.Engine(device="idle")
        params = [torch.ones(ELEMENTS, requires_grad=True) for _ in range(TENSORS)]
        groups = [{"params": [p]} for p in params] if row == IN_GROUPS else params
        optimizer = getattr(fusedopt, name)(groups, **ARGUMENTS[name])
        for step in range(-3, STEPS):
            if step == -3 or row == FRESH:
                optimizer.zero_grad()
                torch.autograd.backward([(p * p).sum() for p in params])
            if step >= 0:
                callgrind.start()
            optimizer.step()
            if step >= 0:
                callgrind.stop(row.encode())


def count() -> dict[str, int]:
    """Return the instructions a tensor of one step, for each optimizer."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for old in BUILD.glob("callgrind.out*"):
        old.unlink()
    source = ROOT / "tools" / "callgrind_requests.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", source, "-o", REQUESTS], check=True)
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
    valgrind += [f"--callgrind-out-file={BUILD / 'callgrind.out'}", "--combine-dumps=no"]
    fixed = {"FUSEDOPT_ISA": "generic", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [*valgrind, sys.executable, __file__, "--under-valgrind"],
        env={**os.environ, **fixed},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"valgrind failed:\n{done.stderr}")
    totals: Counter[str] = Counter()
    for path in BUILD.glob("callgrind.out.*"):
        text = path.read_text()
        trigger = re.search(r"^desc: Trigger: Client Request: (\w+)$", text, re.MULTILINE)
        total = re.search(r"^totals: (\d+)$", text, re.MULTILINE)
        if trigger and total:
            totals[trigger[1]] += int(total[1])
    return {row: round(totals[row] / STEPS / TENSORS) for row in rows(ON_DEVICE in totals)}


def main() -> int:
    """Count, and record or compare."""
    if sys.argv[1:] == ["--under-valgrind"]:
        step_under_valgrind()
        return 0
    counts = count()
    here = environment()
    if sys.argv[1:] == ["--record"]:
        recorded = {"environment": here, "margin": MARGIN, "instructions_a_tensor": counts}
        DATA.write_text(json.dumps(recorded, indent=1) + "\n")
    data: dict[str, Any] = json.loads(DATA.read_text())
    comparable = data["environment"] == here
    failed = False
    print(f"instructions a tensor, {TENSORS} tensors of {ELEMENTS} elements:")
    for name, number in counts.items():
        bound = round(data["instructions_a_tensor"][name] * (1 + data["margin"]))
        more = comparable and number > bound
        failed |= more
        print(f"  {name:<15} {number:>6}, may be {bound}{': TOO MANY' if more else ''}")
    if not comparable:
        print(f"no verdict: the bounds are for {data['environment']}, this is {here}")
    if failed:
        print("make it cheaper; or, if it is worth it: make count ARGS=--record")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
