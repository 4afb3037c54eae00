"""Examples of frameworks on ranks that are a group already."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist
from training_cases import environment

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(group, name, arguments):
    """What ``main`` of an example gives: a list of losses, or of a Trainer the number of its last step."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    told = environment(dist.get_rank(), dist.get_world_size())
    with patch.dict(os.environ, told), patch.object(sys, "argv", [name, *arguments]):
        given = runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]()
    if isinstance(given, list):
        return given
    return given.state.global_step if hasattr(given.state, "global_step") else given.global_step
