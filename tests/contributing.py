"""The examples of CONTRIBUTING.md's "Adding ..." sections, so that tests run what it says and nothing else."""

import re

from tests.conftest import ROOT


def example(heading: str) -> str:
    """Return the lines of code that a section says to add; at most five."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 5, heading
    return code
