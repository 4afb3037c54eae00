"""A student of the example: what its teacher adds to the loss, until when, and that an interruption changes nothing."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
import train_lm
from lm import checkpoint, teacher
from lm.data import training_batch
from lm.layers import moe_configs
from lm.model import ByteLM
from lm.settings import Settings, UsageError
from lm.training import Run, train
from lm_cases import CPU, TINY, command_line, never

PUPIL = dataclasses.replace(TINY, layers=1, compare_dense=False, kd_temperature=1.0)


@pytest.fixture
def school(corpus, tmp_path):
    """The folder of a teacher, with two layers of a pyramid."""
    folder = tmp_path / "teacher"
    settings = dataclasses.replace(TINY, experts=(2, 4), residual=True, steps=4, compare_dense=False)
    run = Run("moe", settings, corpus, CPU)
    train([run], lambda: None, never)
    folder.mkdir()
    checkpoint.save(folder, settings, corpus, [run])
    return str(folder)


def taught(school, **changes):
    return dataclasses.replace(PUPIL, **{"teacher": school, **changes})


def student(settings, corpus):
    return Run("moe", settings, corpus, CPU, teacher=teacher.load(settings.teacher, settings, CPU))


def test_the_loss_is_the_texts_and_the_distance_from_the_teacher(school, corpus):
    settings = taught(school, kd_temperature=2.0, kd_coefficient=0.7, balance=0.0, clip=1e9)
    run = student(settings, corpus)
    grads = {}
    step = run.optimizer.step
    run.optimizer.step = lambda: (
        grads.update({name: p.grad.clone() for name, p in run.model.named_parameters()}), step())  # fmt: skip
    before = ByteLM(settings)
    before.load_state_dict(run.model.state_dict())
    told = run._update(0, rate=0.1)

    content = checkpoint.load(train_lm.Path(school))
    theirs = ByteLM(Settings.from_dict(content["settings"]))
    theirs.load_state_dict(content["runs"]["moe"]["model"])
    theirs.eval()
    inputs, targets = training_batch(corpus, seed=0, step=0, batch=2, seq_len=16)
    with torch.no_grad():
        p = torch.softmax(theirs(inputs) / 2.0, -1)
    logits = before(inputs)
    q = torch.softmax(logits / 2.0, -1)
    distance = (p * (p.log() - q.log())).sum() / inputs.numel()
    task = -torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).mean()
    (task + 0.7 * 2.0**2 * distance).backward()
    assert float(told) == pytest.approx(float(task.detach()), rel=1e-6)  # curves are of the task's loss alone
    for name, parameter in before.named_parameters():
        if ".router." not in name:  # without a balance loss its share is rounding
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert distance > 0


def test_the_teacher_is_in_evaluation_and_learns_nothing(school, corpus):
    run = student(taught(school), corpus)
    model = run.teacher._model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train([run], lambda: None, never)
    assert not model.training
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_staged_distillation_ends_on_the_texts_loss(school, corpus, monkeypatch):
    asked = []
    logits = teacher.Teacher.logits
    monkeypatch.setattr(teacher.Teacher, "logits", lambda *args: (asked.append(1), logits(*args))[1])
    whole, staged, alone = (
        student(taught(school, kd_stop=stop), corpus) if stop is None or stop else Run("moe", PUPIL, corpus, CPU)
        for stop in (None, 4, 0)
    )
    counts = []
    for run in (whole, staged, alone):
        asked.clear()
        train([run], lambda: None, never)
        counts.append(len(asked))
    assert counts == [6, 4, 0]
    ends = [run.model.head.weight.detach() for run in (whole, staged, alone)]
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])
    # A coefficient of 0, or a stage of no steps, is training without a teacher, to the bit.
    for changes in ({"kd_stop": 0}, {"kd_coefficient": 0.0}):
        run = student(taught(school, **changes), corpus)
        train([run], lambda: None, never)
        assert torch.equal(run.model.head.weight, ends[2])


def test_a_student_comes_nearer_to_its_teacher(school, corpus):
    def distance(run):
        inputs, _ = training_batch(corpus, seed=9, step=9, batch=4, seq_len=16)
        with torch.no_grad():
            p = torch.log_softmax(guide.logits(inputs, torch.no_grad()), -1)
            q = torch.log_softmax(run.model.eval()(inputs), -1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    longer = dataclasses.replace(PUPIL, steps=40, eval_every=40)
    guide = teacher.load(school, longer, CPU)
    alone = Run("moe", longer, corpus, CPU)
    pupil = student(dataclasses.replace(longer, teacher=school, kd_coefficient=3.0), corpus)
    for run in (alone, pupil):
        train([run], lambda: None, never)
    assert distance(pupil) < 0.8 * distance(alone)


@pytest.mark.parametrize("stop_at", [2, 5])
def test_an_interrupted_student_ends_with_the_same_bits(text, school, tmp_path, stop_at, monkeypatch):
    """Also one whose teacher is gone by then, after the stage in which it taught."""
    flags = ["--layers", "1", "--seq-len", "16", "--steps", "6", "--eval-every", "3", "--teacher", school,
             "--kd-stop", "4", "--kd-temperature", "1.5"]  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train_lm.main(command_line(text, whole, *flags)) == 0

    def until(runs, on_turn, should_stop):
        train(runs, on_turn, lambda: runs[0].step >= stop_at)

    with monkeypatch.context() as patch:
        patch.setattr(train_lm, "train", until)
        patch.setattr(train_lm, "_finish", lambda *_: None)
        patch.setattr(train_lm.report, "summarise", lambda *_: None)  # of a run that has ended
        assert train_lm.main(command_line(text, stopped, *flags)) == 0
    assert checkpoint.progress(stopped) == (stop_at, 6)
    if stop_at >= 4:
        shutil.rmtree(school)
    assert train_lm.main(["--out", str(stopped), "--resume"]) == 0
    after, before = (checkpoint.load(folder)["runs"]["moe"] for folder in (stopped, whole))
    for name, value in before["model"].items():
        assert torch.equal(value, after["model"][name]), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (stopped, whole)]
    assert reports[0]["teacher"] == reports[1]["teacher"]
    assert reports[0]["teacher"]["settings"]["experts"] == [2, 4]
    assert math.isfinite(reports[0]["teacher"]["held_out_bpb"])


def test_a_changed_or_missing_teacher_stops_a_student_that_still_needs_it(text, school, corpus, tmp_path, capsys):
    settings = dataclasses.replace(taught(school), data=(str(text),))
    run = student(settings, corpus)
    train([run], lambda: None, lambda: run.step >= 2)
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.save(out, settings, corpus, [run])
    path = tmp_path / "teacher" / checkpoint.FILE
    content = checkpoint.load(tmp_path / "teacher")
    content["runs"]["moe"]["model"]["head.weight"][0, 0] += 1
    torch.save(content, path)
    assert train_lm.main(["--out", str(out), "--resume"]) == 2
    assert f"--teacher: {school} holds another model than the one that this run began with" in capsys.readouterr().err
    path.unlink()
    assert train_lm.main(["--out", str(out), "--resume"]) == 2
    assert "error: --teacher: " in capsys.readouterr().err
    assert train_lm.main(["--out", str(out), "--resume", "--kd-stop", "3"]) == 2
    assert "the checkpoint was made with --kd-stop None, not 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher", "{tmp}/nowhere"], "nowhere/checkpoint.pt does not exist"),
        (["--teacher", "{tmp}/evil"], "evil/checkpoint.pt cannot be read"),
        (["--teacher", "{tmp}/other"], "other/checkpoint.pt is no checkpoint of this program"),
        (["--teacher", "{tmp}/half"], "half holds a run that is at step 2 of 4: finish it (--resume)"),
        (["--teacher", "{school}", "--seq-len", "32"], "was trained on sequences of 16 bytes: expected at least"),
        (["--teacher", "{school}", "--out", "{school}"], "is --out, where the student is to go"),
        (["--teacher", "{school}", "--kd-temperature", "0"], "--kd-temperature must be positive and finite, got 0.0"),
        (["--teacher", "{school}", "--kd-temperature", "nan"], "--kd-temperature must be positive and finite, got nan"),
        (["--teacher", "{school}", "--kd-coefficient", "-1"], "--kd-coefficient must not be negative, got -1.0"),
        (["--teacher", "{school}", "--kd-stop", "-1"], "--kd-stop must not be negative, got -1"),
        (["--kd-stop", "2"], "--kd-stop: expected a --teacher to learn from, got none"),
    ],
)
def test_bad_teachers_are_one_clear_line(text, school, tmp_path, capsys, flags, message):
    for name in ("evil", "other", "half"):
        (tmp_path / name).mkdir()
    torch.save({"format": 1, "run": Evil(tmp_path / "ran")}, tmp_path / "evil" / checkpoint.FILE)
    torch.save({"model": torch.zeros(2)}, tmp_path / "other" / checkpoint.FILE)
    content = checkpoint.load(tmp_path / "teacher")
    content["runs"]["moe"]["step"] = 2
    torch.save(content, tmp_path / "half" / checkpoint.FILE)
    flags = [flag.format(tmp=tmp_path, school=school) for flag in flags]
    assert train_lm.main([*command_line(text, tmp_path / "out", "--seq-len", "16"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


class Evil:
    """Would write a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_stage_shrinks_with_the_steps():
    settings = dataclasses.replace(taught("anywhere"), steps=1000, kd_stop=800)
    assert train_lm._fit_steps(settings, 1, 0.24).kd_stop == 200


def test_a_student_may_have_another_layer(school, corpus):
    settings = taught(school, preset="switch", top_k=1)
    run = student(settings, corpus)
    train([run], lambda: None, never)
    assert moe_configs(settings)[0].activation == "relu"
    assert run.step == 6


def test_a_teacher_that_is_needed_no_more_is_not_asked(school, corpus):
    settings = taught(school, kd_stop=1)
    gone = teacher.again(teacher.load(school, settings, CPU).facts, settings, CPU, needed=False)
    run = Run("moe", settings, corpus, CPU, teacher=gone)
    run.warm_up()
    with pytest.raises(RuntimeError, match="expected its model, which is not loaded any more"):
        gone.logits(torch.zeros(1, 4, dtype=torch.int64), torch.no_grad())
    with pytest.raises(UsageError, match="nowhere"):
        teacher.load("nowhere", settings, CPU)
