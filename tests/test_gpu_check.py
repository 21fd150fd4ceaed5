"""tools/gpu_check.py, as far as it goes without a GPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools import gpu_check
from tools.gpu_check import ASKED, Steps


def timing(name: str, **figures: Any) -> dict[str, Any]:
    return {"name": name, "failed": "", "milliseconds": 2.0, "ratio": 1.0, **figures}


def row(index: int, *timings: dict[str, Any]) -> dict[str, Any]:
    names = ("model", "optimizer", "mode", "dtype")
    return {**dict(zip(names, ASKED[index], strict=False)), "timings": list(timings)}


def test_each_figure_is_beside_the_one_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        row(0, timing("fusedopt", share_of_limit=0.95), timing("torch fused", ratio=0.8)),
        row(2, timing("fusedopt", share_of_limit=0.9), timing("torch fused", failed="no memory")),
    ]
    asked = list(gpu_check.compare(rows))
    assert [each["measured"] for each in asked[:3]] == [0.95, 0.8, None]
    assert [each["milliseconds"] for each in asked[:4]] == [2.0, 2.0, 2.0, None]

    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    path = tmp_path / "gpu.json"
    facts = {"device": "G", "torch": "T", "driver": "D", "steps": {"build": "passed, 9 s"}}
    path.write_text(json.dumps({**facts, "asked": asked}))
    gpu_check.print_table(path)
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["build", "passed,", "9", "s"] in lines
    assert [line[-2:] for line in lines if line[:3] == ["1", "x", "100M,"]][:3] == [
        ["0.90", "0.95"],
        ["0.80", "SHORT"],
        ["1.20", "none"],
    ]


def test_steps_pass_fail_and_run_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps()
    assert steps.run("good", [sys.executable, "-c", ""])
    assert not steps.run("bad", [sys.executable, "-c", "raise SystemExit(3)"])
    monkeypatch.setattr(gpu_check, "MOST_SECONDS", time.monotonic() - steps.start + 2)
    # What it has started ends with it.
    sleeps = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    begin = time.monotonic()
    assert not steps.run("slow", [sys.executable, "-c", sleeps])
    assert time.monotonic() - begin < 30
    outcomes = {name: outcome.split(",")[0] for name, outcome in steps.outcomes.items()}
    assert outcomes == {"good": "passed", "bad": "failed (3)", "slow": "ran out of time"}


def test_what_cannot_be_asked_is_unknown() -> None:
    assert gpu_check.output_of("no-such-program") == "unknown"
    assert gpu_check.output_of(sys.executable, "-c", "raise SystemExit(1)") == "unknown"
    assert gpu_check.output_of(sys.executable, "-c", "print(5)") == "5"
