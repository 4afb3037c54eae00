"""docs/finetuning.md: its code runs, and its table has every option."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import torch
from doc_blocks import run_page

import dmoe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "finetuning.md"


def test_the_page_runs():
    page = run_page("finetuning.md")
    assert page["loss"] < 1.5
    assert torch.isfinite(page["y"]).all()


def test_every_option_has_a_row():
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE.read_text(), re.MULTILINE)
    named = set(re.findall(r"`(\w+)", " ".join(rows)))
    options = {field.name for field in dataclasses.fields(dmoe.lora.LoRA)}
    options |= set(inspect.signature(dmoe.lora.add).parameters) - {"model", "config", "fields"}
    assert options <= named
