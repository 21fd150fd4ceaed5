"""docs/muon.md: its snippets run, and its table is that of docs/muon.json."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import nn

import fusedopt
from tools import muon_page

TEXT = muon_page.PAGE.read_text()
RESULTS = json.loads(muon_page.RESULTS.read_text())


def test_the_snippets_run_in_order() -> None:
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(snippets) == TEXT.count("```python")
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for code in snippets:
        exec(compile(code, "docs/muon.md", "exec"), namespace)


def test_the_table_is_what_was_measured() -> None:
    block = TEXT.split("<!-- begin training -->\n")[1].split("<!-- end training -->")[0]
    assert block.splitlines() == muon_page.table(RESULTS)


def test_muon_reaches_the_loss_in_fewer_steps_with_every_seed() -> None:
    took = muon_page.reached(RESULTS)
    assert len(took) >= 3
    assert all(steps is not None and steps < RESULTS["steps"] for steps in took)


def test_the_best_rates_of_the_search_are_between_others() -> None:
    for name, search in RESULTS["search"].items():
        losses = dict(search)
        assert RESULTS["lr"][name] == muon_page.best_rate(losses)
        assert min(losses) < RESULTS["lr"][name] < max(losses)
    assert not muon_page.rates_beyond({k: dict(v) for k, v in RESULTS["search"].items()})


def test_the_search_goes_on_beside_a_best_rate_at_an_edge() -> None:
    nan = float("nan")
    inside, upper, lower = (
        {1.0: 3.0, 2.0: 2.0, 4.0: nan},
        {1.0: 3.0, 2.0: 2.0},
        {1.0: 2.0, 2.0: 3.0},
    )
    assert muon_page.rates_beyond({"a": inside}) == set()
    assert muon_page.rates_beyond({"a": inside, "b": upper}) == {4.0}
    assert muon_page.rates_beyond({"a": lower, "b": upper}) == {0.5, 4.0}


def test_both_optimizers_of_the_tool_step_every_parameter() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    for name in muon_page.OPTIMIZERS:
        optimizer = muon_page.make_optimizer(name, model, 1e-3)
        assert isinstance(optimizer, getattr(fusedopt, name))
        found = [p for group in optimizer.param_groups for p in group["params"]]
        assert set(found) == set(model.parameters())
