"""What a build without a GPU, or without nvcc, says and does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def configure(build: Path, value: str, *, as_variable: bool = False) -> str:
    """Configure a build where no nvcc is to be found; return what it says."""
    tools = build / "bin"
    tools.mkdir()
    for name in ("c++", "g++", "cc", "gcc", "ld", "as", "ar", "ranlib", "nm", "make", "uname"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    if cmake is None:
        pytest.skip("needs cmake")
    environment = {name: x for name, x in os.environ.items() if not name.startswith("CUDA")}
    environment["PATH"] = str(tools)
    command = [cmake, "-S", str(ROOT), "-B", str(build / "objects"), "-G", "Unix Makefiles"]
    command += ["-DSKBUILD=1", "-DFUSEDOPT_ISAS=generic", f"-DPython_EXECUTABLE={sys.executable}"]
    if as_variable:
        environment["FUSEDOPT_CUDA"] = value
    else:
        command.append(f"-DFUSEDOPT_CUDA={value}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("as_variable", [False, True])
def test_on_without_nvcc_says_what_to_do(tmp_path: Path, as_variable: bool) -> None:
    said = configure(tmp_path, "ON", as_variable=as_variable)
    assert "there is no nvcc of CUDA 12 or later (none was found): install the CUDA toolkit" in said


@pytest.mark.parametrize("value", ["AUTO", "OFF"])
def test_without_nvcc_there_are_no_kernels_and_no_error(tmp_path: Path, value: str) -> None:
    said = configure(tmp_path, value)
    assert f"CUDA kernels: none (FUSEDOPT_CUDA={value})" in said
    assert "no nvcc" not in said


def test_another_value_is_refused(tmp_path: Path) -> None:
    said = configure(tmp_path, "maybe")
    assert "FUSEDOPT_CUDA is 'maybe', expected AUTO, ON or OFF" in said


def test_gpu_check_says_why_it_cannot_run() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("it can")
    command = [sys.executable, "-m", "tools.gpu_check", "check"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpu-check: ")
    assert done.stderr.endswith("nothing was run\n")
