"""tools/gpu_check.py, rehearsed: the CPU plays the GPU, and what can go wrong goes wrong here."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusedopt import _engine
from tools import gpu_check, gpu_rows
from tools.gpu_check import Results, Steps
from tools.gpu_rows import ASKED

Rehearse = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that $OUT names; results go to one beside it."""
    monkeypatch.setattr(gpu_check, "REHEARSED", tmp_path / "results")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    # The package that these tests have, wherever it is.
    path = [str(Path(_engine.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    return tmp_path / "out"


@pytest.fixture
def rehearse(out: Path) -> Rehearse:
    """Return what runs a command and returns its status, and what it left in $OUT."""

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        status = gpu_check.main([*arguments, "--rehearse"])
        results: dict[str, Any] = json.loads((out / "rehearsal.json").read_text())
        assert results == json.loads((gpu_check.REHEARSED / "rehearsal.json").read_text())
        return status, results

    return run


def outcomes(results: dict[str, Any]) -> dict[str, str]:
    return {name: outcome.split(",")[0] for name, outcome in results["steps"].items()}


SANITIZER = "compute-sanitizer"
PASSES = "def test_passes():\n    pass\n"
FAILS = "def test_fails():\n    assert False\n"


def file_with(folder: Path, text: str) -> str:
    options = "from tests.conftest import pytest_addoption as pytest_addoption\n"
    (folder / "conftest.py").write_text(options)
    path = folder / "test_one.py"
    path.write_text(text)
    return str(path)


# ---- what becomes of each command ----------------------------------------------------------------


def test_all_three_in_turn(
    rehearse: Rehearse, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, results = rehearse("check", file_with(tmp_path, PASSES))
    assert (status, outcomes(results)) == (0, {"build": "passed", "tests on the GPU": "passed"})
    status, results = rehearse("rows")
    assert status == 0
    assert outcomes(results)["rows"] == "passed"
    assert len(results["report"]["rows"]) == len({asked[:4] for asked in ASKED})
    measured = {(row["model"], row["peer"]): row["measured"] for row in results["asked"]}
    assert measured["1 x 100M", "torch fused"] is not None
    printed = capsys.readouterr().out
    assert "bandwidth of a copy" in printed
    status, results = rehearse("sanitize")
    assert status == 1  # nothing was looked for
    assert outcomes(results)["memcheck"] == "not run: no compute-sanitizer"
    assert list(outcomes(results))[:3] == ["build", "tests on the GPU", "rows"]


def test_a_failing_test_is_kept(rehearse: Rehearse, tmp_path: Path) -> None:
    status, results = rehearse("check", file_with(tmp_path, FAILS))
    assert status == 1
    assert outcomes(results) == {"build": "passed", "tests on the GPU": "failed (1)"}


def test_nothing_is_tested_that_was_not_built(
    rehearse: Rehearse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "fusedopt.py").write_text("raise ImportError")
    status, results = rehearse("check", file_with(tmp_path, PASSES))
    assert (status, outcomes(results)) == (1, {"build": "failed (1)"})


def test_a_full_clock(rehearse: Rehearse, tmp_path: Path) -> None:
    """What runs is ended, with all that it has started; what comes after is not run."""
    slow = "import subprocess\n\ndef test_slow():\n    subprocess.run(['sleep', '60'])\n"
    begin = time.monotonic()
    # (Looking at the build takes some of them.)
    status, results = rehearse("check", file_with(tmp_path, slow), "--seconds", "12")
    assert time.monotonic() - begin < 40
    assert status == 1
    assert outcomes(results)["tests on the GPU"] == "ran out of time"
    status, results = rehearse("rows", "--seconds", "0")
    assert (status, outcomes(results)["rows"]) == (1, "not run: no time left")


def test_rows_end_with_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_engine, "engine", _engine.engine)  # a rehearsal takes another one
    assert not gpu_rows.measure(tmp_path / "rows.json", -1.0, rehearse=True)
    assert "no time for the other rows" in capsys.readouterr().out


def test_a_killed_benchmark_leaves_the_rows_before(
    rehearse: Rehearse, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = Steps.run

    def kill_after_a_row(self: Steps, name: str, command: list[str], **environment: str) -> bool:
        killer = (
            "import json, os, pathlib, signal, sys, time, subprocess\n"
            "child = subprocess.Popen(sys.argv[2:])\n"
            "path = pathlib.Path(sys.argv[1])\n"
            "while not json.loads(path.read_text())['report']['rows']:\n"
            "    time.sleep(0.01)\n"
            "child.send_signal(signal.SIGKILL)\n"
            "child.wait()\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        watched = [sys.executable, "-c", killer, str(self.results.path), *command]
        return wait(self, name, watched, **environment)

    monkeypatch.setattr(Steps, "run", kill_after_a_row)
    status, results = rehearse("rows")
    assert (status, outcomes(results)["rows"]) == (1, f"failed ({-signal.SIGKILL})")
    assert results["report"]["rows"]
    assert results["asked"][0]["measured"] is not None


def test_a_step_that_never_came_back_says_so(out: Path) -> None:
    """Whoever is killed from outside has no time to write."""
    results = Results(on_gpu=False)
    expected = {"step": "was interrupted"}
    script = f"import json; assert json.load(open({str(results.path)!r}))['steps'] == {expected}"
    assert Steps(results, 60).run("step", [sys.executable, "-c", script])
    assert outcomes(Results(on_gpu=False).data) == {"step": "passed"}


def test_another_commit_begins_anew(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(on_gpu=False)
    results.data["steps"]["build"] = "passed"
    results.save()
    assert Results(on_gpu=False).data["steps"] == {"build": "passed"}
    monkeypatch.setattr(gpu_check, "output_of", lambda *_: "another")
    assert Results(on_gpu=False).data["steps"] == {}


# ---- what has to be there ------------------------------------------------------------------------


def test_a_missing_package_is_named_before_anything_runs(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec

    def absent(name: str) -> Any:
        return None if name == "hypothesis" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main(["check", "--rehearse"])
    assert stopped.value.code == 2
    assert f"not installed for {sys.executable}: hypothesis; nothing was run" in (
        capsys.readouterr().err
    )
    assert not out.exists()


def test_old_tools_are_named_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "nvcc": "Cuda compilation tools, release 11.8, V11.8.89",
        "cmake": "cmake version 3.18.4",
    }
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(gpu_check, "output_of", lambda command, *_: said[command])
    versions = {"pip": "23.0", "scikit-build-core": "0.10.7", "pybind11": None, "ninja": "1.11"}
    monkeypatch.setattr(gpu_check, "version_of", versions.get)
    assert gpu_check.missing(builds=True) == [
        "scikit-build-core >= 0.11 (here 0.10.7)",
        "pybind11",
        "nvcc (or CUDACXX) >= 12 (here 11.8)",
        "cmake >= 3.20 (here 3.18.4)",
    ]
    assert gpu_check.missing(builds=False) == []


def test_what_cannot_be_asked_is_unknown() -> None:
    assert gpu_check.output_of("no-such-program") == "unknown"
    assert gpu_check.output_of(sys.executable, "-c", "raise SystemExit(1)") == "unknown"
    assert gpu_check.output_of(sys.executable, "-c", "print(5)") == "5"


# ---- how it is asked -----------------------------------------------------------------------------


def test_sanitizers_see_what_torch_hides(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[list[str], dict[str, str]]] = {}

    def take_note(self: Steps, name: str, command: list[str], **environment: str) -> bool:
        asked[name] = (command, environment)
        return True

    monkeypatch.setattr(Steps, "run", take_note)
    names = {SANITIZER: SANITIZER}  # and no other program
    monkeypatch.setattr(shutil, "which", names.get)
    gpu_check.main(["sanitize", "--rehearse"])
    command, environment = asked["memcheck"]
    assert command[command.index("--report-api-errors") + 1] == "no"
    assert environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert asked["racecheck"][1] == {}


def test_foreign_plugins_are_left_out(out: Path) -> None:
    steps = Steps(Results(on_gpu=False), 60)
    assert steps.environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] == "1"


def test_make_has_a_target_for_each_command() -> None:
    makefile = (gpu_check.ROOT / "Makefile").read_text()
    for command in gpu_check.COMMANDS:
        assert f"\ngpu-{command}:\n\t$(PYTHON) -m tools.gpu_check {command} $(ARGS)\n" in makefile
    assert gpu_check.SECONDS < 9 * 60


# ---- the figures ---------------------------------------------------------------------------------


def timing(name: str, **figures: Any) -> dict[str, Any]:
    some = {"failed": "", "milliseconds": 2.0, "ratio": 1.0, "host_microseconds": 41.0}
    return {"name": name, **some, **figures}


def row(index: int, *timings: dict[str, Any]) -> dict[str, Any]:
    names = ("model", "optimizer", "mode", "dtype")
    return {**dict(zip(names, ASKED[index], strict=False)), "timings": list(timings)}


def test_each_figure_is_beside_the_one_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row(0, timing("fusedopt", share_of_limit=0.95), timing("torch fused", ratio=0.8)),
        row(2, timing("fusedopt", share_of_limit=0.9), timing("torch fused", failed="no memory")),
    ]
    asked = list(gpu_rows.compare(rows))
    assert [each["measured"] for each in asked[:3]] == [0.95, 0.8, None]
    assert [each["milliseconds"] for each in asked[:4]] == [2.0, 2.0, 2.0, None]
    gpu_rows.print_asked(asked)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-3:] for line in lines if line[:3] == ["1", "x", "100M,"]][:3] == [
        ["0.90", "0.95", "41"],
        ["0.80", "41", "SHORT"],
        ["1.20", "none", "41"],
    ]
