"""docs/reinforcement.md: its code runs, and it names every option that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from doc_blocks import run_page

from dmoe.ops._library import compiled

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reinforcement.md"


@pytest.mark.skipif(not compiled, reason="csrc/ was not built, and nothing else promises batch invariance")
def test_the_page_runs():
    page = run_page("reinforcement.md")
    assert page["record"].num_tokens == 30
    assert page["with_last_token"].num_tokens == 31
    router = next(p for name, p in page["trainer"].named_parameters() if name.endswith("router.weight"))
    assert torch.isfinite(router.grad).all()
    assert router.grad.abs().max() > 0


def test_its_links_lead_somewhere():
    text = PAGE.read_text()
    assert "RESULT.md" not in text
    for link in [part.split(")")[0] for part in text.split("](")[1:]]:
        assert (PAGE.parent / link).exists(), link
