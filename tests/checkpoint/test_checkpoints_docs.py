"""The page on checkpoints: its Python runs, and its table is the program's."""

from __future__ import annotations

import re

import torch
from doc_blocks import ROOT, run_page

from dmoe.checkpoint.formats.known import FORMATS


def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page("checkpoints.md")
    back = torch.load("back.pt", weights_only=True)
    assert list(back) == list(names["state"])
    assert all(torch.equal(back[name], tensor) for name, tensor in names["state"].items())


def test_the_table_has_every_layout():
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    table = page.partition("| `--to`")[2].partition("\n\n")[0]
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`([\w-]+)`", line.split("|")[1])]
    first = [name if not name.startswith("-") else f"megatron{name}" for name in named]
    assert set(first) == set(FORMATS)


def test_the_commands_are_ones_that_there_are():
    page = (ROOT / "docs" / "checkpoints.md").read_text() + (ROOT / "README.md").read_text()
    for layout in re.findall(r"--to ([\w-]+)", page):
        assert layout in FORMATS or layout in ("sequential",), layout
