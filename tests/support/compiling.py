"""What `torch.compile` keeps in a process."""

from __future__ import annotations

import sys

import torch


def forget():
    """All compiled graphs and the counts of what was compiled go, where anything may have been."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
