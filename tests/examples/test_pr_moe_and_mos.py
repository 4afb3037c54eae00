"""The recipe of PR-MoE and its students: what it trains, what it writes, and that it goes on where it was."""

import json
import math

import pr_moe_and_mos
import pytest
from lm import checkpoint

SMALL = "--hidden 16 --ffn 8 --batch 2 --seq-len 16 --eval-bytes 256 --device cpu --lr 0.01"


def test_the_recipe_trains_a_teacher_and_its_students(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm.report.draw", lambda *_: None)  # which is most of the time
    runs, out = tmp_path / "runs", tmp_path / "out"
    line = ["--steps", "10", "--runs", str(runs), "--out", str(out), "--more", f"{SMALL} --data {text}"]
    assert pr_moe_and_mos.main(line) == 0
    result = json.loads((out / "pr_moe_and_mos.json").read_text())
    assert result["teacher"]["experts"] == [8, 8, 16, 16]
    stops = {kind: students[0]["kd_stop"] for kind, students in result["students"].items()}
    assert stops == {"alone": None, "taught": None, "staged": 7}
    ends = {}
    for kind, (student,) in result["students"].items():
        assert student["experts"] == [8, 8, 16]
        assert student["parameters"]["total"] < result["teacher"]["parameters"]["total"]
        ends[kind] = student["held_out_bpb"][-1]
        assert ends[kind][0] == 10
        assert math.isfinite(ends[kind][1])
    assert len(set(map(tuple, ends.values()))) == 3
    printed = capsys.readouterr().out
    for kind, (_, bits) in ends.items():
        gain = "" if kind == "alone" else f"{bits - ends['alone'][1]:+.4f}"
        assert f"| {bits:.4f} | {gain} |" in printed
    teachers = {kind: checkpoint.load(runs / f"{kind}-1")["teacher"] for kind in stops}
    assert teachers["alone"] is None
    assert teachers["taught"] == teachers["staged"]

    # Again: all is there, and nothing is trained anew.
    before = {path: path.read_bytes() for path in runs.glob("*/checkpoint.pt")}
    monkeypatch.setattr("lm.training.Run._train_step", lambda self: pytest.fail("a finished model trained on"))
    assert pr_moe_and_mos.main(line) == 0
    assert {path.parent.name for path in before} == {"teacher", "alone-1", "taught-1", "staged-1"}
    assert json.loads((out / "pr_moe_and_mos.json").read_text()) == result


def test_the_table_says_how_much_is_chance():
    def student(bits):
        parameters = {"total": 2000, "active": 1000}
        return {"experts": [2, 4], "parameters": parameters, "held_out_bpb": [[1, 9.0], [2, bits]]}

    students = {"alone": [3.0, 3.2], "taught": [2.9, 3.2], "staged": [2.9, 3.1]}
    result = {"teacher": student(2.5), "students": {kind: [*map(student, bits)] for kind, bits in students.items()}}
    lines = pr_moe_and_mos.table(result).splitlines()
    assert lines[2] == "| teacher | 2/4 | 2,000 | 1,000 | 2.5000 |  |"
    assert lines[3] == "| student, on the text alone | 2/4 | 2,000 | 1,000 | 3.1000 ± 0.1414 |  |"
    assert lines[4].endswith("| 3.0500 ± 0.2121 | -0.0500 ± 0.0707 |")
    assert lines[5].endswith("| 3.0000 ± 0.1414 | -0.1000 ± 0.0000 |")


def test_a_model_that_cannot_be_trained_ends_the_recipe(tmp_path, capsys):
    line = ["--steps", "2", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path), "--more", "--data nowhere"]
    assert pr_moe_and_mos.main(line) == 2
    assert "--data nowhere: no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "pr_moe_and_mos.json").exists()
