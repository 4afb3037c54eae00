"""The recipe that fine-tunes a model of Transformers over ranks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "transformers"))

import finetune_ep


def finetune(group, line):
    """Its own part, in a group that is there; what it returns, or the error it tells."""
    try:
        return finetune_ep.run(finetune_ep.build_parser().parse_args(line))
    except finetune_ep.UsageError as error:
        return str(error)
