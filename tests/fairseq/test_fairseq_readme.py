"""The commands of README's block: every tool is there, and knows every flag."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import fairseq_tools as tools
from fairseq_pool import in_fairseq, needs_fairseq

MODULE = "dmoe.integrations.fairseq_moe"


def commands():
    """The block's commands of this package: how many ranks, the tool, its flags."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    block = readme.split("## In fairseq")[1].split("```\n")[1]
    lines = re.sub(r"<<'END'.*?\nEND\n", "\n", block, flags=re.DOTALL).replace("\\\n", " ")
    (model,) = re.findall(r'^MODEL="(.*)"$', lines, re.MULTILINE)
    found = []
    for line in lines.splitlines():
        words = shlex.split(line.replace("$MODEL", model), comments=True)
        if MODULE in words:
            at = words.index(MODULE)
            ranks = int(words[words.index("--nproc_per_node", 0, at) + 1]) if words[0] == "torchrun" else 1
            found.append((ranks, *words[at + 1 :]))
    return found


@needs_fairseq
def test_every_command_is_understood():
    block = commands()
    assert [(ranks, tool) for ranks, tool, *_ in block] == [
        (1, "preprocess"),
        (1, "train"),
        (1, "eval_lm"),
        (2, "train"),
        (2, "eval_lm"),
        (1, "count"),
    ]
    ranks, tool, *flags = block[2]
    *told, unknown, no_tool = in_fairseq(tools.read_alone, [*block, (ranks, tool, *flags, "--moe"), (1, "tain")])
    assert told == [tools.READ] * len(block)
    assert "unrecognized arguments: --moe" in unknown or "ambiguous option: --moe" in unknown
    assert "expected one of train, eval_lm" in no_tool
