"""Builds the CUDA kernels on a machine with a GPU, tests them there, and measures them.

    make gpu-check

Nothing is downloaded: PyTorch with CUDA, numpy, pytest, scikit-build-core, pybind11, ninja and nvcc
have to be there already. It takes at most nine minutes, and writes what it found to
benchmarks/results/<name of the GPU>.json: figures as they were measured, beside those asked for.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "gpu"
NEEDED = ("torch", "numpy", "pip", "pytest", "scikit_build_core", "pybind11", "ninja")
MOST_SECONDS = 9 * 60

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


class Asked(NamedTuple):
    """A row, and what it is to reach."""

    model: str
    optimizer: str
    mode: str
    dtype: str
    peer: str
    """The contestant whose time is divided by fusedopt's; empty for the share of the bandwidth."""
    least: float


ASKED = [
    Asked("1 x 100M", "AdamW", "plain", "float32", "", 0.90),
    Asked("1 x 100M", "AdamW", "plain", "float32", "torch fused", 1.0),
    Asked("1 x 100M", "AdamW", "clip", "float32", "torch fused", 1.2),
    Asked("1 x 100M", "SGD", "plain", "bfloat16", "torch fused", 1.2),
    Asked("1 x 100M", "RMSprop", "plain", "float32", "torch foreach", 2.5),
    Asked("1 x 100M", "Lion", "plain", "float32", "lion-pytorch", 1.0),
    Asked("ResNet-50", "AdamW", "plain", "float32", "torch fused", 1.5),
    Asked("2000 x 1K", "AdamW", "plain", "float32", "torch fused", 3.0),
]


def stop(text: str) -> None:
    print(f"gpu-check: {text}", file=sys.stderr)
    raise SystemExit(2)


def require_a_gpu() -> None:
    """Stop with what is missing, before anything takes time."""
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        stop(f"{', '.join(absent)} not installed for {sys.executable}; nothing was run")
    import torch  # noqa: PLC0415  (may be absent)

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "no GPU or no driver" if built else "this PyTorch is a build without CUDA"
        stop(f"torch.cuda finds no GPU here ({why}); nothing was run")
    if not os.environ.get("CUDACXX") and shutil.which("nvcc") is None:
        stop("no nvcc: install the CUDA toolkit, or name it by CUDACXX; nothing was run")


class Steps:
    """Runs one command after the other, within the time there is."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.outcomes: dict[str, str] = {}
        path = os.pathsep.join(p for p in (str(SITE), os.environ.get("PYTHONPATH")) if p)
        self.environment = {**os.environ, "PYTHONPATH": path}

    def left(self) -> float:
        return MOST_SECONDS - (time.monotonic() - self.start)

    def run(self, name: str, command: list[str], reserve: float = 0) -> bool:
        """Run a command, which leaves so many seconds to those after it."""
        print(f"\n==== {name} ({self.left():.0f} s left)", flush=True)
        begin = time.monotonic()
        try:
            running = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, start_new_session=True
            )
            status = running.wait(timeout=max(1, self.left() - reserve))
            outcome = "passed" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # with all that it has started
            running.wait()
            outcome = "ran out of time"
        self.outcomes[name] = f"{outcome}, {time.monotonic() - begin:.0f} s"
        print(f"==== {name}: {self.outcomes[name]}", flush=True)
        return outcome == "passed"


def build(steps: Steps) -> bool:
    import torch  # noqa: PLC0415

    shutil.rmtree(SITE, ignore_errors=True)
    major, minor = torch.cuda.get_device_capability()
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", f"--target={SITE}"]
    options += ["-Ccmake.define.FUSEDOPT_CUDA=ON", "-Cbuild-dir=build/gpu-objects"]
    options += ["-Ccmake.define.FUSEDOPT_EMULATED_DEVICE=ON"]  # tests ask it for its arithmetic
    options += [f"-Ccmake.define.FUSEDOPT_CUDA_ARCHS={major}{minor}"]
    return steps.run("build", [sys.executable, "-m", "pip", "install", *options, "."])


def measure() -> None:
    """Measure the rows and write the results; run in a process of its own, with the new build."""
    import torch  # noqa: PLC0415

    from fusedopt.bench.contestants import contestants  # noqa: PLC0415
    from fusedopt.bench.measure import measure as measure_row  # noqa: PLC0415
    from fusedopt.bench.results import Report, machine  # noqa: PLC0415
    from fusedopt.bench.rows import Row  # noqa: PLC0415

    report = Report(machine("cuda"))
    entrants = contestants("", quick=True)
    report.missing = {each.name: each.missing for each in entrants if each.missing}
    for model, optimizer, mode, dtype in dict.fromkeys(asked[:4] for asked in ASKED):
        row = Row(model, optimizer, mode, getattr(torch, dtype), threads=1, device="cuda")
        print(row, flush=True)
        report.rows.append(measure_row(row, entrants, budget=8.0))
        torch.cuda.empty_cache()
    report.write(SITE / "rows.json")


def output_of(*command: str) -> str:
    """Return what a command prints; "unknown" where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def write_results(steps: Steps) -> Path:
    import torch  # noqa: PLC0415

    rows = SITE / "rows.json"
    report = json.loads(rows.read_text()) if rows.exists() else {"rows": []}
    name = torch.cuda.get_device_name()
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    results = {
        "device": name,
        "devices": torch.cuda.device_count(),
        "driver": driver.split("\n")[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "steps": steps.outcomes,
        "asked": list(compare(report["rows"])),
        "report": report,
    }
    path = ROOT / "benchmarks" / "results" / f"{re.sub(r'[^A-Za-z0-9]+', '-', name).lower()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def compare(rows: list[dict[str, Any]]) -> Any:
    """Yield each figure asked for beside the one measured; None where there is none."""
    for asked in ASKED:
        measured, milliseconds = None, None
        for row in rows:
            if (row["model"], row["optimizer"], row["mode"], row["dtype"]) != asked[:4]:
                continue
            timings = {each["name"]: each for each in row["timings"] if not each["failed"]}
            if "fusedopt" in timings:
                milliseconds = timings["fusedopt"]["milliseconds"]
                if not asked.peer:
                    measured = timings["fusedopt"]["share_of_limit"]
                elif asked.peer in timings:
                    measured = timings[asked.peer]["ratio"]
        yield {**asked._asdict(), "measured": measured, "milliseconds": milliseconds}


def print_table(path: Path) -> None:
    results = json.loads(path.read_text())
    print(f"\n{results['device']}, torch {results['torch']}, driver {results['driver']}")
    for step, outcome in results["steps"].items():
        print(f"{step:<24} {outcome}")
    print(f"\n{'row':<36} {'against':<20} {'asked':>6} {'measured':>9}")
    for row in results["asked"]:
        name = f"{row['model']}, {row['optimizer']}, {row['mode']}, {row['dtype']}"
        against = row["peer"] or "bandwidth of a copy"
        measured = "none" if row["measured"] is None else f"{row['measured']:.2f}"
        short = row["measured"] is not None and row["measured"] < row["least"]
        print(f"{name:<36} {against:<20} {row['least']:>6.2f} {measured:>9}{' SHORT' * short}")
    print(f"\nwritten to {path.relative_to(ROOT)}")


def main() -> None:
    require_a_gpu()
    steps = Steps()
    passed = build(steps)
    if passed:
        pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=30", "--device", "cuda"]
        tests = [*pytest, "tests/gpu", "tests/device"]
        passed &= steps.run("tests on the GPU", tests, reserve=180)
        passed &= steps.run("benchmark", [sys.executable, __file__, "measure"], reserve=60)
        sanitizer = shutil.which("compute-sanitizer")
        for tool in ("memcheck", "racecheck"):
            if sanitizer is None:
                steps.outcomes[tool] = "not run: no compute-sanitizer"
                continue
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
            passed &= steps.run(tool, [*command, sys.executable, "-c", SANITIZED])
    print_table(write_results(steps))
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    else:
        main()
