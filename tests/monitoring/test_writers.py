"""Where records go: lines that survive a kill and a resume, TensorBoard, W&B, functions; what is absent, in words."""

from __future__ import annotations

import builtins
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from monitoring_cases import FIELDS, QUIET, H

import dmoe
from dmoe.monitoring.heat_map import colour, heat_map
from dmoe.monitoring.writers import scalars


def run(to, steps=3, first=0, **options):
    torch.manual_seed(0)
    layer = dmoe.MoE(**FIELDS, num_experts=4, aux_loss="attached", **options)
    with dmoe.monitor(layer, to, limits=QUIET, every=1) as monitor:
        for number in range(first, first + steps):
            with monitor.step(number), monitor.part("forward"):
                layer(torch.randn(6, H))
    return monitor


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_folder_has_a_line_for_each_record(tmp_path):
    monitor = run(tmp_path / "new" / "run", capacity_factor=0.5)
    about, *steps = lines_of(tmp_path / "new" / "run")
    assert about["kind"] == "run"
    assert about["layers"] == {"": {"num_experts": 4, "top_k": 2}}
    assert [line["step"] for line in steps] == [0, 1, 2]
    line, layer = steps[-1]["layers"][""], monitor.last.layers[""]
    assert line["tokens_per_expert"] == list(layer.tokens_per_expert)
    assert line["kept_per_expert"] == list(layer.kept_per_expert)
    assert math.isclose(line["entropy"], layer.entropy, rel_tol=1e-5)
    assert set(steps[-1]["parts"]) == {"forward"}
    assert "kept_per_expert" not in lines_of(_folder(tmp_path))[1]["layers"][""]


def _folder(tmp_path):
    run(tmp_path / "dropless")
    return tmp_path / "dropless"


def test_a_resumed_run_appends_and_half_a_line_spoils_no_other(tmp_path):
    run(str(tmp_path))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind":"step","st')
    run(str(tmp_path), first=2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[4] == '{"kind":"step","st'
    assert [json.loads(line)["step"] for line in lines[6:]] == [2, 3, 4]


_KILLED = """
import os, signal, sys
import torch
import dmoe
layer = dmoe.MoE(hidden_size=8, ffn_hidden_size=8, num_experts=4, top_k=2, aux_loss="attached")
monitor = dmoe.monitor(layer, sys.argv[1], every=1).start()
for _ in range(5):
    with monitor.step():
        layer(torch.randn(64, 8))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_whole_lines(tmp_path):
    subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], env=dict(os.environ), check=False)
    assert [line.get("step") for line in lines_of(tmp_path)] == [None, 0, 1, 2, 3, 4]


def test_numbers_that_json_has_not_are_null(tmp_path):
    layer = dmoe.MoE(**FIELDS, num_experts=4, aux_loss="attached")
    with (
        pytest.warns(UserWarning, match="not finite"),
        dmoe.monitor(layer, tmp_path, every=1) as monitor,
        monitor.step(),
    ):
        layer(torch.full((3, H), math.nan))
    line = lines_of(tmp_path)[1]
    assert line["layers"][""]["entropy"] is None
    assert line["layers"][""]["router_logits_rms"] is None
    assert "not finite" in line["warnings"][0]


class Board:
    """TensorBoard's writer, as far as it is used."""

    def __init__(self):
        self.scalars, self.images, self.flushed = {}, [], False

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def add_image(self, name, image, step, dataformats):
        self.images.append((name, tuple(image.shape), step, dataformats))

    def flush(self):
        self.flushed = True


def test_tensorboard_wandb_and_functions_get_the_same_numbers():
    board, seen, logged = Board(), [], []
    wandb = SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    monitor = run([board, seen.append, wandb])
    assert [record.step for record in seen] == [0, 1, 2]
    assert seen[-1] is monitor.last
    expected = dict(scalars(monitor.last))
    assert expected["moe//entropy"] == monitor.last.layers[""].entropy
    assert {"moe/step_seconds", "moe/tokens", "moe/seconds/forward", "moe//max_load", "moe//seconds/experts"} <= set(
        expected
    )
    assert {name: value for (name, step), value in board.scalars.items() if step == 2} == expected
    assert logged[-1] == (2, expected)  # without the package there are no images
    assert board.images == [("moe/load", (12, 48, 3), 0, "HWC")]
    assert board.flushed


def test_wandb_gets_images_where_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Image=lambda array: array.shape))
    logged = []
    run(SimpleNamespace(log=lambda values, step: logged.append(values)))
    assert [values.get("moe/load") for values in logged] == [(12, 48, 3), None, None]


def test_tensorboard_without_pillow_is_one_sentence():
    board = Board()
    board.add_image = lambda *_, **__: builtins.__import__("PIL_that_is_absent")
    with pytest.raises(ImportError, match="expected Pillow for TensorBoard's images, got none: pip install pillow"):
        run(board)


def test_the_heat_map_is_blue_below_an_even_load_and_orange_above():
    seen = []
    run(seen.append, steps=1)
    image = heat_map(seen[0])
    assert image.shape == (12, 48, 3)
    for expert, share in enumerate(seen[0].layers[""].load):
        assert tuple(image[0, 12 * expert].tolist()) == colour(4 * share)
    assert colour(1) == (240, 240, 236)
    assert colour(0) == colour(0.01) == (24, 59, 110)
    assert colour(8) == colour(1000) == (140, 45, 4)
    assert colour(2)[0] > colour(2)[2]
    assert colour(0.5)[0] < colour(0.5)[2]


def test_a_folder_that_cannot_be_made_leaves_no_hooks(tmp_path):
    (tmp_path / "file").write_text("")
    layer = dmoe.MoE(**FIELDS, num_experts=4)
    with pytest.raises(OSError, match="file"):
        dmoe.monitor(layer, tmp_path / "file" / "run").start()
    assert not layer._forward_hooks
