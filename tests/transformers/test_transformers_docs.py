"""docs/transformers.md: its code runs."""

from __future__ import annotations

from doc_blocks import run_page


def test_the_page_runs():
    page = run_page("transformers.md")
    assert "model.layers.1.mlp.experts" in page["names"]
