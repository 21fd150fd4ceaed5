"""What a bug report needs to say: ``python -m fusedopt``."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

import fusedopt
from fusedopt import _core
from fusedopt._engine import engine


def report() -> str:
    """Return one aligned line for each thing that can make two machines differ."""
    facts = {
        "fusedopt": fusedopt.__version__,
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "compiler": f"{_core.compiler}, {'with' if _core.openmp else 'without'} OpenMP",
        "isa": _isa(),
        "ahead": f"{_ahead(*_core.ahead)}; {_in('FUSEDOPT_AHEAD')}",
        "threads": _threads(torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"), _cores()),
        "openmp": _openmp(),
        "gather": "fast, by torch's C ABI" if engine.fast_gather else "slow, by attributes",
        "cuda": _cuda(
            _core.cuda_archs, _core.cuda_driver_version(), _core.cuda_devices(), engine.why_not
        ),
    }
    return "\n".join(f"{name:<8}  {fact}" for name, fact in facts.items())


def _isa() -> str:
    return f"{engine.isa}, of {', '.join(fusedopt.isas())}; {_in('FUSEDOPT_ISA')}"


def _ahead(in_two: int, in_more: int) -> str:
    return f"{in_two} bytes in two long arrays, {in_more} in more of them"


def _in(variable: str) -> str:
    forced = os.environ.get(variable)
    return f"{variable}={forced}" if forced else f"{variable} not set"


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(threads: int, omp_num_threads: str | None, cores: int) -> str:
    """Describe torch's threads, which are those of a step."""
    text = f"{threads} of {cores} cores"
    if not _core.openmp:
        return f"{text} for torch, but fusedopt was built for one"
    if omp_num_threads is None:
        return f"{text}; OMP_NUM_THREADS not set"
    text += f"; OMP_NUM_THREADS={omp_num_threads}"
    # Launchers set it to 1 in silence, and every step then takes many times as long.
    if omp_num_threads == "1" and threads == 1 < cores:
        text += f" leaves {cores - 1} idle: raise it, or call torch.set_num_threads"
    return text


def _cuda(archs: str, driver: int, devices: list[str], why_not: Callable[[int], str]) -> str:
    """Describe the CUDA kernels, the newest CUDA that the driver knows, and the devices."""
    if not archs:
        return "no kernels in this build: torch steps parameters on cuda"
    version = f"{driver // 1000}.{driver % 1000 // 10}" if driver else "none"
    described = [
        f"{device} without kernels: {why}" if (why := why_not(number)) else device
        for number, device in enumerate(devices)
    ]
    return f"{archs}; driver {version}; devices {', '.join(described) or 'none'}"


def _openmp() -> str:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return f"not known on {platform.system()}"
    runtimes = _openmp_runtimes(maps.read_text())
    text = ", ".join(runtimes) or "none"
    if len(runtimes) > 1:
        text = f"{len(runtimes)} runtimes, with threads of their own each: {text}"
    return text


def _openmp_runtimes(maps: str) -> list[str]:
    """Return the paths of the OpenMP libraries among a process's mappings."""
    paths = {fields[5] for line in maps.splitlines() if len(fields := line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if re.match(r"lib(gomp|omp|iomp5)\b", Path(path).name))


def main() -> None:
    """Print the report."""
    print(report())


if __name__ == "__main__":
    main()
