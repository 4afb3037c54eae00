"""Runs what a page of documentation shows: its Python blocks one after the other, in one namespace."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def python_blocks(page: str) -> list[str]:
    """The Python blocks of a page of ``docs/``, each with as many lines in front as it has in the page."""
    text = (ROOT / "docs" / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match.group(1) for match in found]


def run_page(page: str) -> dict[str, object]:
    """Run the blocks; returns what they defined."""
    module = types.ModuleType("page_" + page.removesuffix(".md"))
    sys.modules[module.__name__] = module  # where dataclasses, and a compiler that comes later, look it up
    for block in python_blocks(page):
        exec(compile(block, page, "exec"), module.__dict__)
    return module.__dict__
