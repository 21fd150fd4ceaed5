"""docs/integrations.md: each of its snippets runs, on as many processes as it says."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.ecosystem.ranks import ROOT, run_ranks
from tests.helpers import run_script

PAGE = (ROOT / "docs" / "integrations.md").read_text()
# (number of processes, code); the first of them is what all the others go on from.
START, *SNIPPETS = [
    (int(processes or 1), code)
    for processes, code in re.findall(
        r"(?:<!-- processes: (\d) -->\n)?```python\n(.*?)```", PAGE, re.DOTALL
    )
]


def run(code: str) -> None:
    namespace: dict[str, Any] = {}
    exec(compile(START[1], "docs/integrations.md", "exec"), namespace)
    exec(compile(code, "docs/integrations.md", "exec"), namespace)
    model = namespace["model"]
    before = namespace["make_model"]().state_dict().values()
    after = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.state_dict().values()]
    assert not any(torch.equal(p, q) for p, q in zip(after, before, strict=True))


def snippet_of_a_rank() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, for its own imports
        run(SNIPPETS[int(os.environ["SNIPPET"])][1])


def test_every_block_is_one_of_these() -> None:
    assert 1 + len(SNIPPETS) == PAGE.count("```python")
    assert PAGE.count("<!-- processes") == sum(processes > 1 for processes, _ in SNIPPETS)


def test_fusedopt_imports_no_library() -> None:
    """Nor does what it has for Lightning, so that either of Lightning's packages will do."""
    libraries = {"accelerate", "lightning", "pytorch_lightning", "transformers"}
    run_script(
        "import sys, fusedopt, fusedopt.integrations.lightning\n"
        f"assert not {libraries} & set(sys.modules)"
    )


# Lightning's own use of torch; and it finds a list slow to load.
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    processes, code = SNIPPETS[number]
    if processes > 1:
        run_ranks(snippet_of_a_rank, processes, tmp_path, SNIPPET=str(number))
    else:
        run(code)
