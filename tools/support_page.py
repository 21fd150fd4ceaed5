"""Writes the tables of docs/support.md from docs/torches.json and docs/wheels.json.

python -m tools.support_page --write
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tools.blocks import rewrite
from tools.test_torches import TESTS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "support.md"


def read(name: str) -> Any:
    path = ROOT / "docs" / name
    return json.loads(path.read_text()) if path.exists() else {}


def torch_lines(results: dict[str, Any]) -> list[str]:
    """One row a torch that the wheel was tested with."""
    if not results:
        return ["Nothing was run yet."]
    lines = [
        f"`{results['wheel']}` on {results['python']}, {results['system']}:",
        "",
        "| torch | tests | gather | a step by attributes takes |",
        "| --- | --- | --- | --: |",
    ]
    for version, result in sorted(
        results["torches"].items(), key=lambda item: [int(x) for x in item[0].split(".")]
    ):
        tests = ", ".join(f"{count} {name}" for name, count in result["tests"].items())
        gather = "fast" if result.get("fast_gather") else "slow"
        ratio = result.get("times_slower_by_attributes")
        times = f"{ratio} times as long" if ratio else ""
        if result["of"] != TESTS:
            tests += " of " + ", ".join(f"`{name}`" for name in result["of"])
        lines.append(
            f"| {result.get('torch', version)} | {tests or 'none ran'} | {gather} | {times} |"
        )
    return lines


def wheel_lines(sizes: dict[str, dict[str, int]]) -> list[str]:
    """One row a wheel."""
    lines = ["| kernels | wheel | MB |", "| --- | --- | --: |"]
    for kernels, wheels in sizes.items():
        lines += [f"| {kernels} | `{name}` | {size / 1e6:.2f} |" for name, size in wheels.items()]
    return lines


def blocks() -> dict[str, list[str]]:
    """Return all lines that are made here, by the name of their block."""
    return {
        "torches": torch_lines(read("torches.json")),
        "wheels": wheel_lines(read("wheels.json")),
    }


def main() -> None:
    """Write them."""
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    for name, lines in blocks().items():
        rewrite(PAGE, name, lines)


if __name__ == "__main__":
    main()
