"""Runs a function in several processes of this machine, which talk to each other alone."""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent.parent
SECONDS = 120  # after so many, a rank says where it hangs, and ends


def run_ranks(
    work: Callable[[], Any], world_size: int, directory: Path, **environment: str
) -> list[Any]:
    """Call a function of a file beside this one on every rank; return what each returned.

    That may be whatever `torch.load` takes for harmless. An exception or a warning of fusedopt on
    any rank is an error here.
    """
    target = f"tests.ecosystem.{Path(inspect.getfile(work)).stem}:{work.__name__}"
    interface = "lo0" if sys.platform == "darwin" else "lo"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ecosystem.ranks", target, str(world_size), str(directory)],
        cwd=ROOT,
        env={**os.environ, "GLOO_SOCKET_IFNAME": interface, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS + 30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"the ranks did not end:\n{output}") from None
    assert process.returncode == 0, output
    return [torch.load(directory / f"{rank}.pt") for rank in range(world_size)]


def be_rank(work: Callable[[], Any], rank: int, world_size: int, directory: Path) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="fusedopt")
    store = f"file://{directory / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.save(work(), directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    target, size, directory = sys.argv[1:]
    module, name = target.split(":")
    work = getattr(importlib.import_module(module), name)
    children = set()
    for rank in range(int(size)):
        # Torch is imported once, before the processes part.
        if child := os.fork():
            children.add(child)
            continue
        try:
            be_rank(work, rank, int(size), Path(directory))
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status != 0:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    main()
