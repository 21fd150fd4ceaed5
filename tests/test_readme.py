"""The first screen of the README shows the rule as it is."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_rule_is_adam_without_its_flags() -> None:
    rule = (ROOT / "csrc" / "rules" / "adam.h").read_text()
    body = rule[rule.index("  template <class V>") : rule.rindex("};")]
    body = body.replace("FUSEDOPT_FN ", "").replace("if constexpr (!kCoupled) ", "")
    body = re.sub(r".*if constexpr \(k(Coupled|Amsgrad)\) .*\n", "", body)
    assert "constexpr" not in body
    (shown,) = re.findall(r"```cpp\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown == textwrap.dedent(body)


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)\s#]+)", (ROOT / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target
