"""docs/lightning.md: its code runs."""

from __future__ import annotations

import pytest
from doc_blocks import run_page
from training_cases import alone

pytestmark = pytest.mark.xdist_group("pair")


def test_the_page_runs():
    with alone():
        assert run_page("lightning.md")["trainer"].global_step == 2
