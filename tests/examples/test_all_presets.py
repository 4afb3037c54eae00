"""The example that trains every preset: what it measures, and that it fails where one does not learn."""

import json

import all_presets
import pytest
import torch
from lm.training import Run

TINY = "--steps 20 --batch 2 --seq-len 32 --hidden 16 --ffn 16 --experts 4 --eval-bytes 512"


def run(text, out, names, *more):
    return all_presets.main(["--only", names, "--data", str(text), "--out", str(out), *TINY.split(), *more])


def test_presets_learn_and_are_drawn(text, tmp_path, capsys):
    assert run(text, tmp_path, "switch,gshard,hash_layer,deepseek_v3") == 0
    summary = json.loads((tmp_path / "presets.json").read_text())
    assert list(summary["presets"]) == ["switch", "gshard", "hash_layer", "deepseek_v3"]
    assert (tmp_path / "presets.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for preset in summary["presets"].values():
        assert preset["failure"] is None
        assert [point["step"] for point in preset["curve"]] == list(range(0, 21, 2))
        losses = [point["held_out_bpb"] for point in preset["curve"]]
        assert losses[-1] < losses[0] - 0.5
        for when in ("training", "held_out"):
            loads = torch.tensor(preset[when]["load"])
            assert loads.shape == (2, 4)
            torch.testing.assert_close(loads.mean(dim=1), torch.ones(2), rtol=0, atol=1e-3)
            assert preset[when]["busiest"] == [pytest.approx(float(layer.max())) for layer in loads]
            assert all(0 <= share < 1 for share in preset[when]["dropped"])
    presets = summary["presets"]
    assert presets["hash_layer"]["training"]["dropped"] == [0, 0]
    assert presets["switch"]["held_out_sees_later_bytes"] is None
    assert "choice_major" in presets["gshard"]["held_out_sees_later_bytes"]
    assert presets["switch"]["experts_of_a_token"] == 1
    assert (presets["deepseek_v3"]["experts_of_a_token"], presets["deepseek_v3"]["beside_them"]) == (2, "shared")
    assert summary["settings"]["steps"] == 20
    assert summary["hardware"]["name"]


@pytest.mark.parametrize("losses", [[3.0] * 11, [3.0, 2.0, *[2.5] * 9], [3.0, *[float("nan")] * 10]])
def test_a_loss_that_does_not_fall_is_a_failure(text, tmp_path, monkeypatch, capsys, losses):
    measured = iter(losses)
    evaluate = Run.evaluate

    def told(self, loads=None):
        return evaluate(self, loads) if self.name == "dense" or loads is not None else next(measured)

    monkeypatch.setattr(Run, "evaluate", told)
    monkeypatch.setattr("lm.panels.draw", lambda *_: None)
    assert run(text, tmp_path, "switch") == 1
    assert "all_presets.py: switch: the loss " in capsys.readouterr().err
    assert json.loads((tmp_path / "presets.json").read_text())["presets"]["switch"]["failure"]


def test_a_preset_that_cannot_be_built_is_a_failure_and_the_others_are_tried(text, tmp_path, monkeypatch, capsys):
    def broken(**_):
        raise ValueError("MoEConfig: router: expected another one")

    monkeypatch.setitem(all_presets.dmoe.presets.NAMES, "tutel", broken)
    assert run(text, tmp_path, "tutel,switch") == 1
    assert "all_presets.py: tutel: MoEConfig: router: expected another one" in capsys.readouterr().err
    presets = json.loads((tmp_path / "presets.json").read_text())["presets"]
    assert presets["switch"]["failure"] is None


def test_an_unknown_preset_is_refused(text, tmp_path, capsys):
    assert run(text, tmp_path / "out", "switch,swtich") == 2
    assert "--only: expected names of switch, gshard" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
