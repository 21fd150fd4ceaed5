"""The sdist builds wherever it is unpacked. With one instruction set, which takes a minute each."""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from tests.wheels.helpers import ROOT, STEP, environment, pip, run, show_torch
from tools import make_wheels

CONSTRAINTS = ["--build-constraint", str(ROOT / "constraints.txt")]
SMALL = ["-C", "cmake.define.FUSEDOPT_ISAS=generic", "-C", "cmake.define.FUSEDOPT_CUDA=OFF"]
# Options of pip, variables, and what the diagnosis says of the compiler.
WAYS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "gcc": ([], {"CXX": "g++"}, "GNU"),
    "clang": ([], {"CXX": "clang++"}, "Clang"),
    "no openmp": (["-C", "cmake.define.FUSEDOPT_OPENMP=OFF"], {}, "without OpenMP"),
    "editable": (["--editable"], {}, ""),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, in a folder without git and with a space in its name."""
    place = tmp_path_factory.mktemp("sdist")
    code = f"import scikit_build_core.build as b; print(b.build_sdist({str(place)!r}))"
    run(sys.executable, "-c", code, cwd=ROOT)
    (archive,) = place.glob("*.tar.gz")
    unpacked = place / "with a space"
    with tarfile.open(archive) as file:
        file.extractall(unpacked, filter="data")
    return next(unpacked.iterdir())


def test_it_holds_what_builds_and_nothing_of_the_forge(sources: Path) -> None:
    assert (sources / "csrc" / "module.cpp").exists()
    assert not (sources / ".github").exists()
    assert not list(sources.rglob("*.so"))


@pytest.mark.parametrize("way", WAYS)
def test_it_builds(way: str, sources: Path, tmp_path: Path) -> None:
    options, variables, compiler = WAYS[way]
    if shutil.which(variables.get("CXX", "c++")) is None:
        pytest.skip(f"needs {variables['CXX']}")
    python = environment(tmp_path / "a venv")
    install = ["install", "--no-deps", *CONSTRAINTS]
    build = ["-C", f"build-dir=build/{way}"]  # without the compiler of another way
    pip(python, *install, *SMALL, *build, *options, sources, cwd=tmp_path, **variables)
    show_torch(python)
    home = sources if "--editable" in options else python.parent.parent
    run(python, "-c", STEP, home, cwd=tmp_path)
    assert compiler in run(python, "-m", "fusedopt", cwd=tmp_path)


def test_it_builds_with_uv(sources: Path, tmp_path: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    python = environment(tmp_path / "a venv")
    run(uv, "pip", "install", "--python", python, "--no-deps", *SMALL, sources, cwd=tmp_path)
    show_torch(python)
    run(python, "-c", STEP, python.parent.parent, cwd=tmp_path)


def test_two_folders_and_two_times_give_the_same_wheel(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_wheels, "RAW", tmp_path / "repaired")
    moved = tmp_path / "elsewhere"
    shutil.copytree(sources, moved, ignore=shutil.ignore_patterns("build"))
    wheel = ["wheel", "--no-deps", *CONSTRAINTS, *SMALL, "-C", "build-dir=build/gcc"]
    python = Path(sys.executable)
    made: list[bytes] = []
    for place in (sources, moved):
        raw = tmp_path / f"raw {len(made)}"
        pip(python, *wheel, "--wheel-dir", raw, place, cwd=tmp_path, CXX="g++")
        made.append(make_wheels.repair(next(raw.glob("*.whl")), "auto").read_bytes())
    assert made[0] == made[1]
