"""docs/deepspeed_tutel.md lists every argument, its blocks run, and the README leads there."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from doc_blocks import run_page

from dmoe.compat.deepspeed import MoE
from dmoe.compat.tutel import moe_layer
from dmoe.compat.tutel.arguments import COMMON_KEYS, FFN_KEYS, REFUSED_KEYS, GateOptions

ROOT = Path(__file__).resolve().parents[2]
PAGE = "deepspeed_tutel.md"


def tables():
    """The names in the first column of each table, by its headings."""
    found, above, heading = {}, "", ""
    for line in (ROOT / "docs" / PAGE).read_text().splitlines():
        if line.startswith("## "):
            above = line[3:]
        elif line.startswith("### "):
            heading = line[4:]
        elif line.startswith("| `"):
            found.setdefault((above, heading), []).extend(re.findall(r"`(\w+)`", line.split("|")[1]))
    return found


def arguments(function):
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind not in kinds and parameter.name != "self"]


@pytest.mark.parametrize(
    ("place", "names"),
    [
        (("DeepSpeed", "`MoE(...)`"), arguments(MoE)),
        (("DeepSpeed", "A forward"), arguments(MoE.forward)),
        (("Tutel", "`moe_layer(...)`"), arguments(moe_layer)),
        (("Tutel", "A gate's dictionary"), [field.name for field in fields(GateOptions)]),
        (("Tutel", "The experts' dictionary"), [*COMMON_KEYS, *FFN_KEYS, *REFUSED_KEYS]),
        (("Tutel", "A forward"), arguments(moe_layer.forward)),
    ],
)
def test_the_page_lists_every_argument(place, names):
    assert sorted(tables()[place]) == sorted(names)


def test_nothing_else_is_listed():
    assert len(tables()) == 6


def test_the_blocks_run():
    page = run_page(PAGE)
    page["loss"].backward()
    assert page["moe"].deepspeed_moe.gate.wg.weight.shape == (8, 64)
    assert page["layer"].experts.batched_fc1_w.skip_allreduce


def test_the_readme_leads_to_it():
    text = (ROOT / "README.md").read_text()
    section = re.search(r"^## Moving from DeepSpeed-MoE and Tutel\n(.*?)^## ", text, re.MULTILINE | re.DOTALL).group(1)
    assert f"(docs/{PAGE})" in section
    assert len(section.strip().splitlines()) <= 15
