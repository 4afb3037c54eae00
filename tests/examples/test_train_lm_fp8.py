"""The example with experts in fp8: every layer's are, a preset's too; the run learns, and goes on where it ended."""

from __future__ import annotations

import json

import pytest
import train_lm
from lm.layers import moe_configs
from lm.settings import Settings
from lm_cases import command_line

FLAGS = ["--expert-compute", "fp8", "--saved-activations", "fp8"]


@pytest.mark.parametrize("preset", [None, "deepseek_v3", "mixtral"])
def test_every_layer_computes_in_fp8(preset):
    settings = Settings(experts=8, top_k=2, preset=preset, expert_compute="fp8", saved_activations="fp8")
    for config in moe_configs(settings):
        assert (config.expert_compute, config.saved_activations) == ("fp8", "fp8")
    for config in moe_configs(Settings(experts=8, top_k=2, preset=preset)):
        assert (config.expert_compute, config.saved_activations) == (None, None)


def test_a_run_in_fp8_learns_and_is_near_the_other(text, tmp_path, monkeypatch):
    monkeypatch.setattr("lm.report.draw", lambda *_: None)  # which is most of the time
    found = {}
    for name, flags in (("fp8", FLAGS), ("float32", [])):
        out = tmp_path / name
        assert train_lm.main(command_line(text, out, "--steps", "20", "--eval-every", "10", *flags)) == 0
        found[name] = json.loads((out / "report.json").read_text())
    curves = {name: [point["held_out_bpb"] for point in s["models"]["moe"]["curve"]] for name, s in found.items()}
    assert found["fp8"]["settings"]["expert_compute"] == "fp8"
    assert curves["fp8"][-1] < curves["fp8"][0] - 0.1
    assert curves["fp8"] != curves["float32"]
    assert abs(curves["fp8"][-1] - curves["float32"][-1]) < 0.1
    assert train_lm.main(["--out", str(tmp_path / "fp8"), "--resume", *FLAGS]) == 0
    assert train_lm.main(["--out", str(tmp_path / "float32"), "--resume", *FLAGS]) == 2
