"""`python -m fusedopt`, and what an import does and refuses to do."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt import __main__ as diagnosis
from fusedopt import _core
from tests.helpers import run_python


def report_of(**env: str) -> dict[str, str]:
    done = run_python("-m", "fusedopt", **env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines())


def test_report() -> None:
    facts = report_of()
    assert facts["fusedopt"] == fusedopt.__version__
    assert facts["torch"] == torch.__version__
    assert facts["numpy"] == np.__version__
    assert facts["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    best = fusedopt.isas()[0]
    assert facts["isa"] == f"{best}, of {', '.join(fusedopt.isas())}; FUSEDOPT_ISA not set"
    two, more = _core.ahead
    assert facts["ahead"] == (
        f"{two} bytes in two long arrays, {more} in more of them; FUSEDOPT_AHEAD not set"
    )
    assert facts["threads"].endswith("OMP_NUM_THREADS not set")
    no_kernels = "no kernels in this build: torch steps parameters on cuda"
    assert facts["cuda"].startswith(_core.cuda_archs or no_kernels)


def test_report_of_cuda() -> None:
    devices = ["NVIDIA H100 (sm_90)", "NVIDIA V100 (sm_70)"]
    why = ["", "cudaFuncGetAttributes on cuda:1: no kernel image"].__getitem__
    assert (
        diagnosis._cuda("", 13000, devices, why)
        == "no kernels in this build: torch steps parameters on cuda"
    )
    assert diagnosis._cuda("sm_80 sm_90", 0, [], why) == "sm_80 sm_90; driver none; devices none"
    report = diagnosis._cuda("sm_80 sm_90", 12040, devices, why)
    assert report == (
        f"sm_80 sm_90; driver 12.4; devices {devices[0]}, {devices[1]} without kernels: {why(1)}"
    )


def test_report_names_what_the_environment_forces() -> None:
    facts = report_of(FUSEDOPT_ISA="generic", OMP_NUM_THREADS="1")
    assert facts["isa"].startswith("generic, of ")
    assert facts["isa"].endswith("; FUSEDOPT_ISA=generic")
    assert facts["threads"].startswith("1 of ")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_torch_and_the_engine_share_one_openmp_runtime() -> None:
    runtime = report_of()["openmp"]
    assert "libgomp" in runtime
    assert "runtimes" not in runtime


def test_columns_are_aligned() -> None:
    report = diagnosis.report()
    assert all(line[8:10] == "  " and line[10] != " " for line in report.splitlines())


@pytest.mark.parametrize(
    ("threads", "omp_num_threads", "cores", "expected"),
    [
        (2, None, 2, "2 of 2 cores; OMP_NUM_THREADS not set"),
        (4, "4", 8, "4 of 8 cores; OMP_NUM_THREADS=4"),
        (1, "1", 1, "1 of 1 cores; OMP_NUM_THREADS=1"),
        (8, "1", 8, "8 of 8 cores; OMP_NUM_THREADS=1"),  # after torch.set_num_threads(8)
        (
            1,
            "1",
            8,
            "1 of 8 cores; OMP_NUM_THREADS=1 leaves 7 idle: "
            "raise it, or call torch.set_num_threads",
        ),
    ],
)
def test_threads(threads: int, omp_num_threads: str | None, cores: int, expected: str) -> None:
    assert diagnosis._threads(threads, omp_num_threads, cores) == expected


def test_openmp_runtimes_are_found_by_file_name() -> None:
    maps = """\
7f00-7f01 r-xp 00000000 fe:00 1 /env/torch/lib/libgomp.so.1
7f01-7f02 r--p 00001000 fe:00 1 /env/torch/lib/libgomp.so.1
7f02-7f03 r-xp 00000000 fe:00 2 /env/with a space/libgomp-a34b3233.so.1.0.0
7f03-7f04 r-xp 00000000 fe:00 3 /env/libiomp5.so
7f04-7f05 r-xp 00000000 fe:00 4 /env/libomptarget.so
7f05-7f06 r-xp 00000000 fe:00 5 /env/libgomp/libc.so.6
7f06-7f07 rw-p 00000000 00:00 0
7f07-7f08 rw-p 00000000 00:00 0 [heap]
"""
    assert diagnosis._openmp_runtimes(maps) == [
        "/env/libiomp5.so",
        "/env/torch/lib/libgomp.so.1",
        "/env/with a space/libgomp-a34b3233.so.1.0.0",
    ]


def test_unknown_isa_fails_at_import_and_names_the_valid_ones() -> None:
    done = run_python("-c", "import fusedopt", FUSEDOPT_ISA="sse9")
    assert done.returncode != 0
    error = done.stderr.splitlines()[-1]
    assert "FUSEDOPT_ISA='sse9'" in error
    assert error.endswith(f"expected one of: {', '.join(fusedopt.isas())}")


def test_import_touches_nothing_outside() -> None:
    """Beyond torch's own import: no network, no other process, no file opened for writing."""
    script = """
import os, sys, torch
def watch(event, args):
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event.startswith(("socket.", "subprocess.", "os.system", "os.fork", "os.exec")):
        raise RuntimeError(f"{event}{args}")
sys.addaudithook(watch)
import fusedopt
"""
    done = run_python("-B", "-W", "error", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
