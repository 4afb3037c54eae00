"""Where a NaN came from: fairseq's ``NanDetector``, which runs a bad batch again with hooks on every module."""

from __future__ import annotations

from typing import Any

import fairseq.trainer
from fairseq.nan_detector import NanDetector
from torch import nn

from dmoe.integrations.fairseq_moe.gate import Gate


class MoENanDetector(NanDetector):
    """fairseq's, for models with gates.

    Its hooks on backward look for a tensor in what a module returns. A gate returns a ``Routing``, and is left to the
    layer around it.
    """

    backward: bool

    def add_hooks(self, module: nn.Module) -> None:
        """Both hooks on a module, or the one on forward alone."""
        backward, self.backward = self.backward, self.backward and not isinstance(module, Gate)
        super().add_hooks(module)
        self.backward = backward


def register() -> None:
    """Put it where fairseq's trainer looks for its own."""
    where: Any = fairseq.trainer
    where.NanDetector = MoENanDetector
