"""The wheel in dist/, in an environment of its own: ``make wheels``, then ``make test-wheels``."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
from readme_renderer import markdown

from tests.wheels.helpers import ROOT, STEP, environment, pip, run, show_torch
from tools.make_wheels import unwanted

SECONDS = 10  # at most, to install it where torch is
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel and, beside it, the torch of this one."""
    wheels = sorted(ROOT.glob(f"dist/*-{TAG}-{TAG}-manylinux*.whl"))
    if not wheels:
        pytest.fail(f"no wheel for {TAG} in dist/: make wheels")
    place = tmp_path_factory.mktemp("a wheel")
    python = environment(place / "venv")
    began = time.monotonic()
    pip(python, "install", "--no-index", "--no-deps", wheels[-1], cwd=place)
    assert time.monotonic() - began < SECONDS
    show_torch(python)
    return python


def test_it_steps_with_one_openmp_runtime_that_of_torch(python: Path) -> None:
    runtimes = run(python, "-c", STEP, python.parent.parent, cwd=python.parent).split()
    assert len(runtimes) == 1
    assert "/torch/lib/" in runtimes[0]


def test_it_is_linked_with_nothing_of_torch_or_cuda(python: Path) -> None:
    where = "from fusedopt import _core; print(_core.__file__)"
    module = Path(run(python, "-c", where, cwd=python.parent).strip())
    assert unwanted(module) == []


def test_the_diagnosis_runs_without_the_checkout(python: Path) -> None:
    assert "gather    fast" in run(python, "-m", "fusedopt", cwd=python.parent)


def test_the_benchmark_runs_without_the_checkout(python: Path, tmp_path: Path) -> None:
    row = [
        "--rows",
        "YOLOv8 n, SGD, 1 thread",
        "--threads",
        "1",
        "--repeats",
        "1",
        "--peers",
        "none",
    ]
    run(python, "-m", "fusedopt.bench", *row, "--json", "figures.json", cwd=tmp_path)
    assert json.loads((tmp_path / "figures.json").read_text())["rows"]


def test_an_index_shows_its_description_and_no_link_leads_nowhere(python: Path) -> None:
    ask = "from importlib import metadata; print(metadata.metadata('fusedopt')['Description'])"
    page = markdown.render(run(python, "-c", ask, cwd=python.parent))
    assert page
    assert "<table>" in page
    for target in re.findall(r'(?:href|src)="([^"]*)"', page):
        assert target.startswith(("http", "#")), target
