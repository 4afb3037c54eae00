"""docs/monitoring.md: its code runs, and its tables have every field."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path

from doc_blocks import run_page

from dmoe.monitoring import LayerRecord, Limits
from dmoe.report.__main__ import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "monitoring.md"


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # untrained experts, a loss that is left on purpose
        page = run_page("monitoring.md")
    assert page["layer"].forwards == 1
    assert page["monitor"].warnings
    assert (tmp_path / "runs" / "first" / "tokens.json").exists()
    assert main([str(tmp_path / "runs" / "first")]) == 0


def test_every_field_is_explained():
    named = set(re.findall(r"`(\w+)`", PAGE.read_text()))
    fields = {field.name for kind in (LayerRecord, Limits) for field in dataclasses.fields(kind)}
    assert fields <= named
