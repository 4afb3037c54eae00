"""Nothing that layers leave for their losses goes from one test to the next."""

from __future__ import annotations

import pytest

from dmoe.compat.megablocks.layers.moe import _LOADS
from dmoe.compat.megablocks.layers.router import _LOGITS


@pytest.fixture(autouse=True)
def _nothing_left_over():
    for rounds in (_LOADS, _LOGITS):
        rounds.clear()
        rounds._warned = False
    yield
    for rounds in (_LOADS, _LOGITS):
        rounds.clear()
