"""docs/adding_an_optimizer.md, followed to the letter in a copy of the source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

USE = """
import torch
from fusedopt import SignSGD, _core, _engine
from tests.reference import reference_update, same_bits

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    p = torch.randn(1001).to(dtype).requires_grad_()
    p.grad = torch.randn(1001).to(dtype)
    p.grad[::7] = 0
    optimizer = SignSGD([p], lr=0.1, weight_decay=0.3)
    (expected,) = reference_update(optimizer, optimizer.param_groups[0], 1, [p, p.grad])
    before = p.detach().clone()
    optimizer.step()
    assert same_bits(p, expected)
    assert not same_bits(p, before)

# The kernels and fold() of GPUs, on one that the CPU plays.
def trained(lr):
    p = torch.linspace(-1, 1, 1001).requires_grad_()
    p.grad = torch.linspace(1, -2, 1001)
    optimizer = SignSGD([p], lr=lr, weight_decay=0.3)
    optimizer.step()
    return p.detach()

on_cpu = trained(0.1)
_engine.engine = _core.Engine(device="emulated")
assert same_bits(trained(0.1), on_cpu)
assert same_bits(trained(torch.tensor(0.1, dtype=torch.float64)), on_cpu)
"""


def blocks(kind: str) -> list[tuple[Path, str]]:
    """Return (path, text) of the code blocks that a comment marks as this kind of edit."""
    page = (ROOT / "docs" / "adding_an_optimizer.md").read_text()
    pattern = rf"<!-- {kind}: (\S+) -->\n```\w+\n(.*?)```"
    return [(Path(path), text) for path, text in re.findall(pattern, page, re.DOTALL)]


def test_the_page_is_complete(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "python", "tests", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    files, lines, rules = blocks("file"), blocks("line"), blocks("rule")
    assert len(files) == 2
    assert sum(text.count("\n") for _, text in lines + rules) == 3
    for path, text in files:
        (source / path).write_text(text)
    for path, text in lines:
        content = (source / path).read_text()
        last_import = list(re.finditer(r"^(#include|from fusedopt).*\n", content, re.MULTILINE))[-1]
        (source / path).write_text(
            content[: last_import.end()] + text + content[last_import.end() :]
        )
    for path, text in rules:
        content = (source / path).read_text()
        first_rule = content.index("  X(")
        (source / path).write_text(
            content[:first_rule] + text.rstrip("\n") + " \\\n" + content[first_rule:]
        )

    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", f"--target={site}", "-Ccmake.define.FUSEDOPT_ISAS=generic"]
    install += ["-Ccmake.define.FUSEDOPT_CUDA=OFF", "-Ccmake.define.FUSEDOPT_EMULATED_DEVICE=ON"]
    subprocess.run([*install, str(source)], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "FUSEDOPT_ISA"}
    environment["PYTHONPATH"] = f"{site}:{source}"
    subprocess.run([sys.executable, "-c", USE], check=True, env=environment, cwd=tmp_path)
