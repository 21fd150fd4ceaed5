"""Virtual environments outside of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

# Argument: where fusedopt is. Prints which OpenMP runtimes are in the process.
STEP = """
import re, sys, torch, fusedopt
assert fusedopt.__file__.startswith(sys.argv[1]), fusedopt.__file__
w = torch.ones(5, requires_grad=True)
optimizer = fusedopt.SGD([w], lr=0.5, max_grad_norm=1e9)
(w * w).sum().backward()
optimizer.step()
assert w.tolist() == [0.0] * 5, w
try:
    fusedopt._core.Engine("none")
except RuntimeError as error:  # thrown in C++
    assert "none" in str(error)
else:
    raise AssertionError("not thrown")
with torch.inference_mode():  # a torch exception, caught in the module
    frozen = torch.ones(3)
    frozen.grad = torch.ones(3)
    fusedopt.SGD([frozen], lr=0.5).step()
assert frozen.tolist() == [0.5] * 3, frozen
with open("/proc/self/maps") as maps:
    print(*{x for x in re.findall(r"/\\S*lib(?:gomp|omp|iomp5)\\b\\S*", maps.read())})
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command without the checkout on its path; return what it prints."""
    ours = {"PYTHONPATH", "SKBUILD_CMAKE_DEFINE"}
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [str(x) for x in command],
        cwd=cwd,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(place: Path) -> Path:
    """Make an empty environment; return its Python."""
    venv.create(place, symlinks=True)
    return place / "bin" / "python"


def show_torch(python: Path) -> None:
    """Let an environment see this one's packages after its own, once it has its own fusedopt."""
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")


def pip(python: Path, *arguments: str | Path, cwd: Path, **variables: str) -> str:
    """Run this environment's pip for another one."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    return run(*command, *arguments, cwd=cwd, **variables)
