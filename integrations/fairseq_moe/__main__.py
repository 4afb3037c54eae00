"""``python -m dmoe.integrations.fairseq_moe TOOL ...``: fairseq's command-line tools, with MoE models.

TOOL is one of train, eval_lm, preprocess, generate, interactive, validate (fairseq's own, with its flags), or count.
"""

from __future__ import annotations

import importlib
import os
import sys

import torch.distributed as dist

from dmoe.integrations import fairseq_moe

# At import, not in main(): processes that fairseq spawns import this file again and go on from here.
fairseq_moe.compat.apply()
fairseq_moe.register()
# What --user-dir with this folder would import under the folder's name is here already.
sys.modules.setdefault("fairseq_moe", fairseq_moe)

_OWN = {"count": "dmoe.integrations.fairseq_moe.count"}
_TOOLS = ("train", "eval_lm", "preprocess", "generate", "interactive", "validate", *_OWN)
# Their ranks would take batches of their own, as many as there are, while experts need every rank in every forward.
_ON_ONE_RANK = ("generate", "interactive", "validate")


def main() -> None:
    """Run the tool that the first argument names, with the rest."""
    from dmoe.integrations.fairseq_moe.flags import FlagError

    if len(sys.argv) < 2 or sys.argv[1] not in _TOOLS:
        got = sys.argv[1] if len(sys.argv) > 1 else "nothing"
        sys.exit(f"fairseq_moe: expected one of {', '.join(_TOOLS)}, and its flags; got {got}")
    tool = sys.argv.pop(1)
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    if tool in _ON_ONE_RANK and ranks > 1:
        sys.exit(f"fairseq_moe: {tool}: expected one process, got {ranks}; train and eval_lm run on several")
    try:
        importlib.import_module(_OWN.get(tool, f"fairseq_cli.{tool}")).cli_main()
    except FlagError as error:
        sys.exit(f"fairseq_moe: {error}")


if __name__ == "__main__":
    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, str):  # Python writes the end of the line apart, and ranks share a stream
            sys.stderr.write(f"{stop.code}\n")
            sys.exit(1)
        raise
    if dist.is_initialized():  # left to the end of the process, its threads may abort that after all work is done
        dist.destroy_process_group()
