"""Builds, repairs and checks a wheel for each Python: ``make wheels PYTHONS="python3.11"``.

    python -m tools.make_wheels [PYTHON...] [--cuda ARCHS] [--plat TAG] [--record]

A PYTHON is a command or a path; without any, all of NAMES that run. The wheels go into dist/, with
the tag that auditwheel finds their symbols to fulfil, or an error. Where there is ccache, the
kernels, which do not depend on Python, are compiled once. --record puts the sizes into
docs/wheels.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RAW, DIST = ROOT / "build" / "wheels", ROOT / "dist"
SIZES = ROOT / "docs" / "wheels.json"

NAMES = [f"python3.{minor}" for minor in range(10, 15)] + ["python3.14t"]
# What a module may be linked with. libgomp.so.1 is the one that torch has loaded: a second would
# have threads of its own.
MAY_NEED = re.compile(r"lib(gomp\.so\.1|stdc\+\+\.so\.6|gcc_s\.so\.1|[cm]\.so\.6)$|ld-linux")
OLDER_LIBRARIES = re.compile(r"lib(dl\.so\.2|pthread\.so\.0|rt\.so\.1)$")  # of glibc before 2.34
# The time of all files in a wheel: the first that a zip can hold. Otherwise auditwheel writes the
# time at which it runs, and no two wheels are the same.
TIME = "315532800"


def tool(*command: str | Path) -> str:
    """Run a tool that is beside this Python or on PATH; return what it prints."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = shutil.which(command[0], path=path) or str(command[0])
    arguments = [found, *map(str, command[1:])]
    environment = {"SOURCE_DATE_EPOCH": TIME, **os.environ, "PATH": path}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def interpreter(python: str) -> str | None:
    """Return the path of the Python that a command starts, if it starts one."""
    if shutil.which(python) is None:
        return None
    command = [python, "-c", "import sys; print(sys.executable)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def build(python: str, cuda: str) -> Path:
    """Return the wheel for one Python as it is built here."""
    shutil.rmtree(RAW, ignore_errors=True)
    if launcher := shutil.which("ccache"):
        for language in ("CXX", "CUDA"):
            os.environ.setdefault(f"CMAKE_{language}_COMPILER_LAUNCHER", launcher)
    settings = {
        "FUSEDOPT_CUDA": "ON" if cuda else "OFF",
        "FUSEDOPT_CUDA_ARCHS": cuda.replace(" ", ";"),
        "FUSEDOPT_OLDER_GLIBC": "ON",
    }
    options = [x for name, v in settings.items() for x in ("-C", f"cmake.define.{name}={v}")]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    constraints = ["--build-constraint", str(ROOT / "constraints.txt")]
    tool(*pip, "wheel", "--no-deps", *constraints, "--wheel-dir", RAW, *options, ROOT)
    (wheel,) = RAW.glob("*.whl")
    return wheel


def repair(wheel: Path, plat: str) -> Path:
    """Give the wheel the tags that its symbols fulfil, down from plat, which they must."""
    repaired = RAW / "repaired"
    options = ["--exclude", "libgomp.so.1", "--plat", plat, "--wheel-dir", str(repaired)]
    tool("auditwheel", "repair", *options, wheel)
    (found,) = repaired.glob("*.whl")
    return found


def needed(module: Path) -> list[str]:
    """Return the libraries that a module is linked with."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", tool("readelf", "-d", module))


def unwanted(module: Path) -> list[str]:
    """Return the libraries that a module is linked with, and should not be."""
    return [x for x in needed(module) if not MAY_NEED.match(x) and not OLDER_LIBRARIES.match(x)]


def faults(wheel: Path) -> list[str]:
    """Return what is wrong with what the wheel holds and is linked with."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [x for x in archive.namelist() if re.search(r"\.so(\.|$)", x)]
        modules = [x for x in libraries if x.startswith("fusedopt/_core.")]
        files = [Path(archive.extract(x, RAW)) for x in modules]
    found = [f"{x} is in the wheel" for x in libraries if x not in modules]
    if len(modules) != 1:
        found.append(f"it has {len(modules)} modules")
    found += [f"the module needs {name}" for file in files for name in unwanted(file)]
    return found


def make(python: str, cuda: str, plat: str) -> Path:
    """Return the checked wheel for one Python, in dist/."""
    wheel = repair(build(python, cuda), plat)
    if wrong := faults(wheel):
        raise SystemExit(f"{wheel.name}: {'; '.join(wrong)}")
    tool("twine", "check", "--strict", wheel)
    tool("check-wheel-contents", wheel)
    DIST.mkdir(exist_ok=True)
    return Path(shutil.move(wheel, DIST / wheel.name))


def main() -> None:
    """Make them one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pythons", nargs="*", metavar="PYTHON")
    parser.add_argument(
        "--cuda", default="", metavar="ARCHS", help='with CUDA kernels, as in "80 90"'
    )
    parser.add_argument("--plat", help="the newest tag to claim")
    parser.add_argument("--record", action="store_true", help="sizes into docs/wheels.json")
    args = parser.parse_args()
    # What CUDA links statically asks for the glibc that it is linked on.
    usual = f"manylinux_2_{'34' if args.cuda else '28'}_{platform.machine()}"
    found = {name: interpreter(name) for name in args.pythons or NAMES}
    if absent := [name for name in args.pythons if found[name] is None]:
        raise SystemExit(f"{', '.join(absent)}: no such Python: name others with PYTHONS=")
    sizes = {}
    for python in filter(None, found.values()):
        print(f"a wheel for {python}", flush=True)
        wheel = make(python, args.cuda, args.plat or usual)
        sizes[wheel.name] = wheel.stat().st_size
        print(f"{sizes[wheel.name] / 1e6:6.2f} MB  {wheel.relative_to(ROOT)}", flush=True)
    if args.record:
        recorded = json.loads(SIZES.read_text()) if SIZES.exists() else {}
        recorded.setdefault(f"CUDA: {args.cuda}" if args.cuda else "CPU", {}).update(sizes)
        SIZES.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
