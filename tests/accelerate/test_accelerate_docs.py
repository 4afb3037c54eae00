"""docs/accelerate.md: its code runs."""

from __future__ import annotations

import pytest
from doc_blocks import run_page
from training_cases import alone

pytestmark = pytest.mark.xdist_group("pair")


def test_the_page_runs(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.chdir(tmp_path)  # Trainer's output_dir
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with alone():
        page = run_page("accelerate.md")
        assert page["trainer"].state.global_step == 2
        assert any("moe/model.layers.0.mlp.moe/entropy" in each for each in page["trainer"].state.log_history)
