"""Builds the CUDA kernels on a machine with a GPU, tests them there, and measures them.

    make gpu-check       build and test
    make gpu-rows        measure what gpu-check has built
    make gpu-sanitize    run it under compute-sanitizer

Each takes less than nine minutes, and nothing is downloaded. What was found is in
benchmarks/results/<name of the GPU>.json after each step and each row, and in the folder that $OUT
names, if it is set. With --rehearse, all but nvcc and compute-sanitizer is run without a GPU, on
tiny rows: a build for tests has a device that the CPU plays.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.gpu_rows import compare, print_asked

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "gpu"
RESULTS = ROOT / "benchmarks" / "results"
REHEARSED = ROOT / "build"
SECONDS = 8.5 * 60
# What has to be there, and which version of it at least.
IMPORTED = ("torch", "numpy", "pytest", "hypothesis")
TO_BUILD = {"pip": "22", "scikit-build-core": "0.11", "pybind11": "3.0", "ninja": "1"}
NVCC, CMAKE = "12", "3.20"

SANITIZED = """
import torch, fusedopt
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for cls in (fusedopt.AdamW, fusedopt.SGD, fusedopt.Lion):
        params = [torch.randn(n, device="cuda").to(dtype) for n in (0, 1, 4099, 77)]
        kwargs = {"capturable": True} if cls is fusedopt.AdamW else {}
        optimizer = cls(params, lr=1e-3, max_grad_norm=0.1, skip_nonfinite=True, **kwargs)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        assert float(optimizer.grad_norm) > 0
"""
# Importing torch makes calls that fail by design. In memory that torch caches, a write past the end
# of a tensor is inside of some other.
TOOLS = {
    "memcheck": (["--report-api-errors", "no"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    "racecheck": ([], {}),
}


# ---- what has to be there --------------------------------------------------------------------


def stop(text: str) -> None:
    print(f"gpu-check: {text}; nothing was run", file=sys.stderr)
    raise SystemExit(2)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def output_of(*command: str) -> str:
    """Return what a command prints; "unknown" where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(builds: bool) -> list[str]:
    """Return what is not there, or too old."""
    absent = [name for name in IMPORTED if importlib.util.find_spec(name) is None]
    if not builds:
        return absent
    nvcc = re.search(r"release ([\d.]+)", output_of(os.environ.get("CUDACXX", "nvcc"), "--version"))
    cmake = re.search(r"version ([\d.]+)", output_of("cmake", "--version"))
    found = {name: (version_of(name), least) for name, least in TO_BUILD.items()}
    found["nvcc (or CUDACXX)"] = (nvcc and nvcc[1], NVCC)
    found["cmake"] = (cmake and cmake[1], CMAKE)
    for name, (version, least) in found.items():
        if version is None:
            absent.append(name)
        elif numbers(version) < numbers(least):
            absent.append(f"{name} >= {least} (here {version})")
    return absent


def require(builds: bool, on_gpu: bool) -> None:
    """Stop with what is missing, before anything takes time."""
    if absent := missing(builds):
        stop(f"not installed for {sys.executable}: {', '.join(absent)}")
    if on_gpu:
        import torch  # noqa: PLC0415  (may be absent)

        if not torch.cuda.is_available():
            built = torch.version.cuda
            why = "no GPU or no driver" if built else "this PyTorch is a build without CUDA"
            stop(f"torch.cuda finds no GPU here ({why})")


# ---- what was found --------------------------------------------------------------------------


class Results:
    """The file of one GPU, or of a rehearsal; of one commit, to which all commands add."""

    def __init__(self, on_gpu: bool) -> None:
        import torch  # noqa: PLC0415  (may be absent)

        name = torch.cuda.get_device_name() if on_gpu else "rehearsal"
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts = {
            "device": name,
            "devices": torch.cuda.device_count(),
            "driver": driver.split("\n")[0],
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "commit": output_of("git", "describe", "--always", "--dirty"),
        }
        plain = re.sub(r"[^A-Za-z0-9]+", "-", name).lower()
        self.path = (RESULTS if on_gpu else REHEARSED) / f"{plain}.json"
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        if any(found.get(key) != value for key, value in facts.items()):
            found = {}
        self.data: dict[str, Any] = {"steps": {}, "report": {"rows": []}, **found, **facts}

    def save(self) -> None:
        """Write all that is known, and copy it to where it is wanted."""
        self.data["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        self.data["asked"] = list(compare(self.data["report"]["rows"]))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".part")  # so that whoever is stopped leaves a whole file
        whole.write_text(json.dumps(self.data, indent=1) + "\n")
        whole.replace(self.path)
        if out := os.environ.get("OUT"):
            Path(out).mkdir(parents=True, exist_ok=True)
            shutil.copy(self.path, out)

    def reread(self) -> None:
        """Take what another process has added."""
        if self.path.exists():
            self.data["report"] = json.loads(self.path.read_text())["report"]


class Steps:
    """Runs one command after the other, within the time there is, and keeps what became of each."""

    def __init__(self, results: Results, seconds: float) -> None:
        self.results, self.end = results, time.monotonic() + seconds
        self.passed = True
        path = os.pathsep.join(p for p in (str(SITE), os.environ.get("PYTHONPATH")) if p)
        # Plugins that others have installed may warn, and warnings are errors.
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def left(self) -> float:
        return self.end - time.monotonic()

    def note(self, name: str, outcome: str) -> None:
        self.passed &= outcome.startswith("passed")
        self.results.data["steps"][name] = outcome
        self.results.save()
        print(f"==== {name}: {outcome}", flush=True)

    def run(self, name: str, command: list[str], **environment: str) -> bool:
        """Run a command, and end it with the time."""
        left = self.left()
        if left < 1:
            self.note(name, "not run: no time left")
            return False
        print(f"\n==== {name} ({left:.0f} s left)", flush=True)
        begin = time.monotonic()
        self.results.data["steps"][name] = "was interrupted"  # unless this goes on
        self.results.save()
        running = subprocess.Popen(
            command, cwd=ROOT, env={**self.environment, **environment}, start_new_session=True
        )
        try:
            status = running.wait(timeout=left)
            outcome = "passed" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            outcome = "ran out of time"
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)  # with all that it has started
                running.wait()
        self.results.reread()
        self.note(name, f"{outcome}, {time.monotonic() - begin:.0f} s")
        return outcome == "passed"


# ---- the commands ----------------------------------------------------------------------------


def build_command() -> list[str]:
    import torch  # noqa: PLC0415  (may be absent)

    major, minor = torch.cuda.get_device_capability()
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--upgrade"]
    options += [f"--target={SITE}", "-Cbuild-dir=build/gpu-objects"]
    options += ["-Ccmake.define.FUSEDOPT_CUDA=ON"]
    options += ["-Ccmake.define.FUSEDOPT_EMULATED_DEVICE=ON"]  # tests ask it for its arithmetic
    options += [f"-Ccmake.define.FUSEDOPT_CUDA_ARCHS={major}{minor}"]
    return [sys.executable, "-m", "pip", "install", *options, "."]


def check(steps: Steps, on_gpu: bool, tests: list[str]) -> None:
    """Build and test."""
    looks = [sys.executable, "-c", "from fusedopt import _core; assert _core.emulated_device"]
    if steps.run("build", build_command() if on_gpu else looks):
        device = "cuda" if on_gpu else "emulated"
        pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=30", "--device", device]
        steps.run("tests on the GPU", [*pytest, *(tests or ["tests/gpu", "tests/device"])])


def rows(steps: Steps, on_gpu: bool, tests: list[str]) -> None:
    """Measure."""
    del tests
    steps.results.data["report"] = {"rows": []}
    command = [sys.executable, "-m", "tools.gpu_rows", str(steps.results.path)]
    steps.run("rows", [*command, f"{steps.left() - 10:.0f}", *([] if on_gpu else ["--rehearse"])])
    print_asked(steps.results.data["asked"])


def sanitize(steps: Steps, on_gpu: bool, tests: list[str]) -> None:
    """Look for accesses out of bounds, and races."""
    del tests, on_gpu
    sanitizer = shutil.which("compute-sanitizer")
    for tool, (options, environment) in TOOLS.items():
        if sanitizer is None:
            steps.note(tool, "not run: no compute-sanitizer")
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *options]
        steps.run(tool, [*command, sys.executable, "-c", SANITIZED], **environment)


COMMANDS: dict[str, Callable[[Steps, bool, list[str]], None]] = {
    "check": check,
    "rows": rows,
    "sanitize": sanitize,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="the time there is")
    parser.add_argument("tests", nargs="*", help="for check: which ones")
    options = parser.parse_intermixed_args(arguments)
    on_gpu = not options.rehearse
    require(builds=on_gpu and options.command == "check", on_gpu=on_gpu)
    steps = Steps(Results(on_gpu), options.seconds)
    COMMANDS[options.command](steps, on_gpu, options.tests)
    print(f"\n{steps.results.data['device']}: what was found is in {steps.results.path}")
    for name, outcome in steps.results.data["steps"].items():
        print(f"{name:<24} {outcome}")
    return 0 if steps.passed else 1


if __name__ == "__main__":
    sys.exit(main())
