"""Tests one wheel with each torch that it says it works with: ``make test-torches``.

    python -m tools.test_torches WHEEL [VERSION...] [--again]

Without versions, the last release of each minor version on the package index, from the oldest that
pyproject.toml allows. Each gets a virtual environment of its own, removed afterwards, with what
``import torch`` loads of its dependencies, and without the gigabytes that it does not. Results go
into docs/torches.json, one after the other; versions that this wheel has been tested with are
passed over, unless --again is given. ``python -m tools.support_page --write`` draws the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "torches.json"
WORK = ROOT / "build" / "torches"

TESTS = [
    "contract", "test_gather.py", "test_kernels.py", "test_pending_clip.py",
    "test_clip_to_infinity.py", "test_traps.py",
]  # fmt: skip
TEST_NEEDS = ["pytest", "pytest-xdist", "hypothesis", "expecttest", "numpy"]

# Of the dependencies of torch for CUDA, what nothing loads until a GPU or a compiler is used.
NOT_LOADED = re.compile(r"(triton|cuda-bindings|cuda-pathfinder|nvidia-(cusolver|nvtx)(-cu\d+)?)$")

# Prints, as JSON, what a step takes with each gather; read by `facts`.
PROBE = Path(__file__).parent / "gather_ratio.py"


def run(*command: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(x) for x in command], text=True, check=False, **kwargs)


def pip(python: Path, *arguments: str) -> str:
    """Run pip for another Python, which needs none of its own; return what it prints."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    done = run(*command, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def oldest() -> tuple[int, ...]:
    """Return the oldest torch that the package asks for."""
    found = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert found
    return version_of(found[1])


def version_of(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", text.split("+", maxsplit=1)[0]))


def last_of_each_minor(versions: list[str], first: tuple[int, ...]) -> list[str]:
    """Return the newest of each minor version from the first on, oldest first."""
    last: dict[tuple[int, ...], str] = {}
    for version in sorted({v.split("+")[0] for v in versions}, key=version_of):
        if version_of(version)[:2] >= first[:2]:
            last[version_of(version)[:2]] = version
    return list(last.values())


def on_the_index() -> list[str]:
    done = run(sys.executable, "-m", "pip", "index", "versions", "torch", stdout=subprocess.PIPE)
    found = re.search(r"Available versions: (.*)", done.stdout)
    if not found:
        raise SystemExit("the package index does not say which versions of torch there are")
    return found[1].split(", ")


def install(python: Path, torch: str, wheel: Path) -> None:
    """Install torch, what it loads, what the tests need, and the wheel."""
    constraints = WORK / "constraints.txt"
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    dependencies = {"torch", "setuptools", "fsspec", "sympy", "networkx", "jinja2", "filelock"}
    constraints.write_text(
        "\n".join(line for line in pinned if line.split("==")[0].lower() not in dependencies)
    )
    wanted = [f"torch=={torch}", *TEST_NEEDS, "--constraint", str(constraints)]
    resolved = json.loads(pip(python, "install", "--dry-run", "--quiet", "--report", "-", *wanted))
    pins = [
        f"{item['metadata']['name']}=={item['metadata']['version']}"
        for item in resolved["install"]
        if not NOT_LOADED.match(item["metadata"]["name"])
    ]
    pip(python, "install", "--quiet", "--no-deps", "--no-cache-dir", *pins, str(wheel))


def counts(text: str) -> dict[str, int]:
    """Return how many tests passed, failed and so on, by pytest's last line."""
    lines = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1]) if lines else []
    return {name: int(count) for count, name in found}


def facts(python: Path) -> dict[str, Any]:
    """Say what the installed wheel sees of the installed torch."""
    done = run(python, PROBE, cwd=WORK, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test(torch: str, wheel: Path, names: list[str], workers: str) -> dict[str, Any]:
    """Return what became of the named tests with one torch."""
    place = WORK / f"torch-{torch}"
    python = place / "bin" / "python"
    shutil.rmtree(place, ignore_errors=True)
    try:
        venv.create(place, symlinks=True)
        began = time.monotonic()
        install(python, torch, wheel)
        print(f"torch {torch}: installed in {time.monotonic() - began:.0f} s", flush=True)
        result = facts(python)
        log = WORK / f"torch-{torch}.log"
        pytest = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers]
        tests = [f"tests/{name}" for name in names]
        with log.open("w") as file:
            done = run(*pytest, "--dist", "worksteal", *tests, cwd=ROOT, stdout=file, stderr=file)
        tally = counts(log.read_text())
        if done.returncode > 1:  # pytest itself has failed, or was stopped
            tally = {}
        print(f"torch {torch}: {tally or 'no tests ran'} ({log.relative_to(ROOT)})", flush=True)
        return {**result, "of": names, "tests": tally, "seconds": round(time.monotonic() - began)}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def known(wheel: Path) -> dict[str, Any]:
    """Return the results that there are, or an empty page for a wheel that has none."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    page: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if page.get("sha256") == digest:
        return page
    system = f"{platform.system()} {platform.machine()}"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    names = {"sha256": digest, "wheel": wheel.name, "system": system, "python": python}
    return {**names, "torches": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    parser.add_argument("--again", action="store_true", help="also those with results")
    parser.add_argument("--only", nargs="+", metavar="TESTS", help="some of these, for a start")
    parser.add_argument("--workers", default="2", help="processes of pytest")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    wheel = args.wheel.resolve()
    bad: list[str] = []
    for version in args.versions or last_of_each_minor(on_the_index(), oldest()):
        result = known(wheel)["torches"].get(version)
        if result and not args.again:
            print(f"torch {version}: has results", flush=True)
        else:
            try:
                result = test(version, wheel, args.only or TESTS, args.workers)
            except SystemExit as error:  # it cannot be installed: the others may be
                print(f"torch {version}: not run\n{error}", flush=True)
                bad.append(version)
                continue
            page = known(wheel)  # as another process may have left it
            page["torches"][version] = result
            RESULTS.write_text(json.dumps(page, indent=1) + "\n")
        if set(result["tests"]) != {"passed"}:
            bad.append(version)
    if bad:
        sys.exit(f"not all tests pass with torch {', '.join(bad)}")


if __name__ == "__main__":
    main()
