"""The language-model example: what it computes, what it refuses, and that an interruption changes no bit of its end."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
import train_lm
from helpers import written_to_stderr
from lm import checkpoint, report
from lm.data import Corpus, held_out_batches, load_corpus, training_batch
from lm.generate import generate
from lm.model import ByteLM, DenseFFN, count_parameters
from lm.settings import Settings, UsageError
from lm.training import Run, learning_rate, train
from lm_cases import CPU, EXAMPLES, TINY, command_line, never
from patience import PATIENCE

# ---------------------------------------------------------------------------------------------------------- the whole


def test_a_run_ends_with_a_picture_and_numbers(text, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--steps", "30", "--eval-every", "10", "--compare-dense", "--generate", "return expert"]
    assert train_lm.main(command_line(text, out, *flags)) == 0

    png = (out / "report.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
    assert width >= 1500
    assert height >= 1000

    summary = json.loads((out / "report.json").read_text())
    for name in ("moe", "dense"):
        model = summary["models"][name]
        assert [point["step"] for point in model["curve"]] == [10, 20, 30]
        losses = [point["held_out_bpb"] for point in model["curve"]]
        assert all(math.isfinite(loss) for loss in losses)
        assert losses[0] > losses[1] > losses[2]
        seconds = [point["seconds"] for point in model["curve"]]
        assert 0 < seconds[0] < seconds[1] < seconds[2]
        assert model["final"]["held_out_bpb"] == losses[-1]
    assert [entry["step"] for entry in summary["routing"]] == list(range(1, 31))
    for entry in summary["routing"]:
        load = torch.tensor(entry["load"])
        assert load.shape == (2, 4)
        torch.testing.assert_close(load.mean(dim=1), torch.ones(2))
        assert len(entry["entropy"]) == 2
        assert all(0 < entropy <= math.log(4) + 1e-6 for entropy in entry["entropy"])
    moe, dense = (summary["models"][name]["final"] for name in ("moe", "dense"))
    difference = moe["held_out_bpb"] - dense["held_out_bpb"]
    assert summary["comparison"]["held_out_bpb_moe_minus_dense"] == difference

    printed = capsys.readouterr().out
    assert f"moe - dense: {difference:+.4f} bits per byte" in printed
    assert len(printed.split("return expert", 1)[1]) > 200


def test_a_finished_run_can_speak_again(text, tmp_path, capsys):
    out = tmp_path / "out"
    assert train_lm.main(command_line(text, out, "--steps", "4", "--generate", "def")) == 0
    said = capsys.readouterr().out.split("\ndef", 1)[1]
    assert train_lm.main(["--out", str(out), "--resume", "--generate", "def"]) == 0
    assert capsys.readouterr().out.split("\ndef", 1)[1] == said
    # ... and does not stand in the way of a new one.
    assert train_lm.main(command_line(text, out, "--steps", "2")) == 0


# ------------------------------------------------------------------------------------------------------------- resuming


def finished(settings: Settings, corpus: Corpus) -> list[Run]:
    runs = [Run(name, settings, corpus, CPU) for name in ("moe", "dense")]
    train(runs, lambda: None, never)
    return runs


@pytest.mark.parametrize("stop_at", [(3, 0), (4, 0), (4, 2), (5, 4), (6, 5)])
def test_a_resumed_run_ends_with_the_same_bits(corpus, tmp_path, stop_at):
    whole = finished(TINY, corpus)
    first = [Run(name, TINY, corpus, CPU) for name in ("moe", "dense")]
    train(first, lambda: None, lambda: all(run.step >= stop for run, stop in zip(first, stop_at, strict=True)))
    assert tuple(run.step for run in first) == stop_at
    checkpoint.save(tmp_path, TINY, corpus, first)

    torch.manual_seed(12345)  # what a new process brings along must not matter
    second = [Run(name, TINY, corpus, CPU) for name in ("moe", "dense")]
    for run in second:
        run.warm_up()
    checkpoint.restore(checkpoint.load(tmp_path), corpus, second)
    train(second, lambda: None, never)

    for expected, actual in zip(whole, second, strict=True):
        assert expected.step == actual.step == 6
        for (name, parameter), other in zip(expected.model.named_parameters(), actual.model.parameters(), strict=True):
            assert torch.equal(parameter, other), name
        moments, others = (run.optimizer.state_dict()["state"] for run in (expected, actual))
        for index, moment in moments.items():
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(moment[key], others[index][key])
        assert expected.routing == actual.routing
        for before, after in zip(expected.curve, actual.curve, strict=True):
            assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_routing_entries_survive_a_stop_inside_one(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("lm.training.ROUTING_POINTS", 2)  # 6 steps in entries of 3; the stop comes after 4
    (whole,) = [run for run in finished(TINY, corpus) if run.name == "moe"]
    assert [entry["step"] for entry in whole.routing] == [3, 6]
    first = Run("moe", TINY, corpus, CPU)
    train([first], lambda: None, lambda: first.step >= 4)
    checkpoint.save(tmp_path, TINY, corpus, [first])
    second = Run("moe", TINY, corpus, CPU)
    checkpoint.restore(checkpoint.load(tmp_path), corpus, [second])
    train([second], lambda: None, never)
    assert second.routing == whole.routing


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(text, tmp_path, number):
    steps = ["--steps", "200", "--eval-every", "20"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "train_lm.py"), *command_line(text, stopped, *steps)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:  # the first measurement: training is under way
        if "held-out" in line and line.lstrip().startswith("moe  step"):
            break
    process.send_signal(number)
    rest = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 128 + number, rest
    assert f"{number.name}: saved" in rest
    assert "--resume" in rest
    made, wanted = checkpoint.progress(stopped)
    assert made < wanted == 200
    assert not (stopped / "report.json").exists()

    assert train_lm.main(["--out", str(stopped), "--resume"]) == 0
    whole = tmp_path / "whole"
    assert train_lm.main(command_line(text, whole, *steps)) == 0
    after, before = (checkpoint.load(folder)["runs"]["moe"]["model"] for folder in (stopped, whole))
    assert after.keys() == before.keys()
    for name in after:
        assert torch.equal(after[name], before[name]), name


def test_a_failed_save_leaves_the_old_checkpoint(corpus, tmp_path, monkeypatch):
    run = Run("moe", TINY, corpus, CPU)
    path = checkpoint.save(tmp_path, TINY, corpus, [run])
    before = path.read_bytes()

    def half(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(UsageError, match=r"--out .*: expected to write checkpoint.pt, got: no space left"):
        checkpoint.save(tmp_path, TINY, corpus, [run])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if "checkpoint" in file.name] == [path.name]


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize(("experts", "top_k", "ffn"), [(4, 2, 8), (6, 3, 5), (1, 1, 7)])
def test_the_dense_twin_multiplies_as_much(experts, top_k, ffn):
    settings = dataclasses.replace(TINY, experts=experts, top_k=top_k, ffn=ffn)
    mixture, twin = ByteLM(settings), ByteLM(settings, dense=True)
    assert not any(isinstance(module, DenseFFN) for module in mixture.modules())
    assert len(mixture.moe_layers) == settings.layers
    assert not twin.moe_layers
    moe, dense = count_parameters(mixture), count_parameters(twin)
    ffn_weights = settings.layers * 3 * settings.hidden * ffn  # gate, up, down
    assert moe["active_ffn"] == dense["active_ffn"] == ffn_weights * top_k
    assert moe["router"] == settings.layers * experts * settings.hidden
    assert moe["active"] - moe["router"] == dense["active"] == dense["total"]
    assert moe["total"] == dense["total"] + ffn_weights * (experts - top_k) + moe["router"]
    for (name, a), b in zip(mixture.blocks[0].attention.named_parameters(),
                            twin.blocks[0].attention.parameters(), strict=True):  # fmt: skip
        assert a.shape == b.shape, name


@pytest.mark.parametrize("dense", [False, True])
def test_no_byte_sees_the_next(dense):
    torch.manual_seed(0)
    model = ByteLM(TINY, dense=dense).eval()
    tokens = torch.randint(256, (1, TINY.seq_len))
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_the_order_of_bytes_counts():
    torch.manual_seed(0)
    # One layer: in two, the causal mask alone would tell a little of the order.
    model = ByteLM(dataclasses.replace(TINY, layers=1), dense=True).eval()
    tokens = torch.randint(256, (1, TINY.seq_len))
    swapped = tokens[:, [1, 0, *range(2, TINY.seq_len)]]
    with torch.no_grad():
        assert not torch.allclose(model(tokens)[:, 5], model(swapped)[:, 5], atol=1e-4)


def test_bits_per_byte_is_the_mean_of_minus_log2_of_the_next_byte(corpus):
    run = Run("moe", TINY, corpus, CPU)
    text = corpus.held_out.tolist()
    run.model.eval()
    total, count = 0.0, TINY.eval_bytes // TINY.seq_len
    for index in range(count):
        start = (len(text) - 1 - TINY.seq_len) * index // (count - 1)
        with torch.no_grad():
            logits = run.model(torch.tensor([text[start : start + TINY.seq_len]]))[0].double()
        for position, row in enumerate(logits.tolist()):
            top = max(row)
            log_sum = top + math.log(sum(math.exp(value - top) for value in row))
            total -= (row[text[start + position + 1]] - log_sum) / math.log(2)
    run.model.train()
    assert run.evaluate() == pytest.approx(total / (count * TINY.seq_len), rel=1e-5)
    assert run.model.training


def test_a_warm_up_leaves_no_trace(corpus):
    fresh, warm = (Run("moe", TINY, corpus, CPU) for _ in range(2))
    assert warm.warm_up(3) > 0
    for run in (fresh, warm):
        train([run], lambda: None, never)
    assert warm.step == TINY.steps
    for expected, actual in zip(fresh.model.parameters(), warm.model.parameters(), strict=True):
        assert torch.equal(expected, actual)


def test_every_step_has_its_own_batch_and_rate_and_both_models_the_same(corpus, monkeypatch):
    drawn = []

    def spy(corpus, **arguments):
        drawn.append((arguments["seed"], arguments["step"]))
        return training_batch(corpus, **arguments)

    monkeypatch.setattr("lm.training.training_batch", spy)
    settings = dataclasses.replace(TINY, steps=3, eval_every=1, seed=7)
    runs = [Run(name, settings, corpus, CPU) for name in ("moe", "dense")]
    rates = []
    train(runs, lambda: rates.append([run.optimizer.param_groups[0]["lr"] for run in runs]), never)
    assert rates == [[learning_rate(step, settings)] * 2 for step in range(3)]
    assert len({first for first, _ in rates}) > 1
    assert drawn == [(7, 0), (7, 0), (7, 1), (7, 1), (7, 2), (7, 2)]


def test_a_divergence_is_said(corpus):
    run = Run("dense", dataclasses.replace(TINY, lr=1e30, clip=1e30), corpus, CPU)
    with pytest.raises(UsageError, match="dense: the loss is nan at step"):
        train([run], lambda: None, never)


def test_learning_rate():
    settings = dataclasses.replace(TINY, steps=10, warmup=4, lr=0.4)
    rates = [learning_rate(step, settings) for step in range(10)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4] == pytest.approx(0.4)
    assert rates[7] == pytest.approx((0.4 + 0.04) / 2)  # half way down
    assert rates == sorted(rates[:4]) + sorted(rates[4:], reverse=True)
    assert learning_rate(0, dataclasses.replace(settings, warmup=0)) == pytest.approx(0.4)


def test_experts_learn_slower_by_the_root_of_the_share_they_see(corpus):
    settings = dataclasses.replace(TINY, experts=8, top_k=2, steps=1, warmup=1, eval_every=1, lr=0.1, weight_decay=0.0)
    run = Run("moe", settings, corpus, CPU)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    train([run], lambda: None, never)
    # Adam's first step moves every weight that has a gradient by the rate.
    moved = {
        name: float((parameter.detach() - before[name]).abs().max()) for name, parameter in run.model.named_parameters()
    }
    assert moved["head.weight"] == pytest.approx(0.1, rel=1e-3)
    assert moved["embedding.weight"] == pytest.approx(0.1, rel=1e-3)
    experts = {name: size for name, size in moved.items() if ".experts." in name}
    assert len(experts) == 2 * settings.layers
    assert list(experts.values()) == pytest.approx([0.1 * math.sqrt(2 / 8)] * len(experts), rel=1e-3)


def test_generated_text_is_a_function_of_the_weights(corpus):
    run = Run("moe", TINY, corpus, CPU)
    text = "".join(generate(run, "é", length=40))
    assert text == "".join(generate(run, "é", length=40))
    assert run.model.training
    assert "".join(generate(run, "", length=3)) != ""


# ------------------------------------------------------------------------------------------------------------- the text


def test_a_batch_is_consecutive_text_and_depends_on_seed_and_step_alone(corpus):
    def batch(seed, step):
        return training_batch(corpus, seed=seed, step=step, batch=8, seq_len=16)

    inputs, targets = batch(1, 5)
    assert inputs.shape == targets.shape == (8, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    whole = bytes(corpus.train.tolist())
    for row, target in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert bytes([*row, target[-1]]) in whole
    assert torch.equal(inputs, batch(1, 5)[0])
    assert not torch.equal(inputs, batch(1, 6)[0])
    assert not torch.equal(inputs, batch(2, 5)[0])


def test_training_windows_reach_both_ends():
    corpus = Corpus("", torch.arange(12, dtype=torch.uint8), torch.arange(5, dtype=torch.uint8), 1)
    seen = [training_batch(corpus, seed=0, step=step, batch=8, seq_len=8) for step in range(8)]
    assert min(int(inputs.min()) for inputs, _ in seen) == 0
    assert max(int(targets.max()) for _, targets in seen) == 11
    (last,) = held_out_batches(corpus, max_bytes=100, batch=8, seq_len=2)
    assert last[0].tolist() == [[0, 1], [2, 3]]
    assert last[1].tolist() == [[1, 2], [3, 4]]


def test_with_many_files_whole_files_are_held_out(tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.txt").write_bytes(bytes([index]) * 100)
    (tmp_path / ".hidden").write_bytes(b"\xff" * 100)
    corpus = load_corpus([str(tmp_path)], 1_000_000, 16)
    train_files, held_out_files = set(corpus.train.tolist()), set(corpus.held_out.tolist())
    assert not train_files & held_out_files
    assert train_files | held_out_files == set(range(40))
    assert len(held_out_files) == 2  # a twentieth
    assert corpus.fingerprint == load_corpus([str(tmp_path)], 1_000_000, 16).fingerprint
    (tmp_path / "3.txt").write_bytes(bytes([3]) * 99 + b"x")
    assert corpus.fingerprint != load_corpus([str(tmp_path)], 1_000_000, 16).fingerprint


def test_of_few_files_the_ends_are_held_out(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 950 + name.upper().encode() * 50)
    corpus = load_corpus([str(tmp_path / "a"), str(tmp_path / "b")], 1_000_000, 16)
    assert set(corpus.train.tolist()) == set(b"ab")
    assert sorted(corpus.held_out.tolist()) == sorted(b"A" * 50 + b"B" * 50)


def test_the_limit_on_bytes_is_kept(tmp_path, text):
    corpus = load_corpus([str(text)], 1000, 16)
    assert len(corpus.train) + len(corpus.held_out) == 1000


def test_the_default_text_is_the_standard_library():
    corpus = load_corpus([], 300_000, 128)
    assert corpus.name == "the Python standard library"
    assert len(corpus.train) + len(corpus.held_out) == 300_000
    assert b"import " in bytes(corpus.train.tolist())
    assert len(corpus.held_out) >= 15_000


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere/at/all"], "--data nowhere/at/all: no such file or folder"),
        (["--data", "{empty}"], "holds no text: 1 files, 0 bytes"),
        (["--data", "{short}"], "too short: the held-out part has 5 bytes, and a sequence takes 17"),
        (["--top-k", "5", "--experts", "4"], "--top-k must be at most --experts (4), got 5"),
        (["--hidden", "30", "--heads", "4"], "--hidden must be --heads times an even number"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--lr", "nan"], "--lr must be positive and finite, got nan"),
        (["--resume", "--out", "{folder}"], "checkpoint.pt does not exist"),
        (["--resume", "--out", "{broken}"], "checkpoint.pt cannot be read"),
        (["--minutes", "-1", "--data", "{text}"], "--minutes must be positive, got -1"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, text, capsys, flags, message):
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("x" * 100)
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "checkpoint.pt").write_bytes(b"no checkpoint")
    flags = [flag.format(text=text, **{name: tmp_path / name for name in ("empty", "short", "folder", "broken")})
             for flag in flags]  # fmt: skip
    if not {"--hidden", "--resume"} & set(flags):
        flags += ["--seq-len", "16", "--hidden", "16", "--heads", "2"]
    if "--out" not in flags:
        flags += ["--out", str(tmp_path / "out")]
    assert train_lm.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_without_cuda_the_device_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_lm.main(["--device", "cuda"]) == 2
    assert "--device cuda: PyTorch" in capsys.readouterr().err


def test_resuming_refuses_what_would_change_the_run(corpus, text, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    settings = dataclasses.replace(TINY, data=(str(text),))
    run = Run("moe", settings, corpus, CPU)
    checkpoint.save(out, dataclasses.replace(settings, compare_dense=False), corpus, [run])
    resume = ["--out", str(out), "--resume"]
    assert train_lm.main([*resume, "--lr", "1"]) == 2
    assert "the checkpoint was made with --lr 0.006, not 1.0" in capsys.readouterr().err
    assert train_lm.main(["--out", str(out)]) == 2
    assert "holds a run that is at step 0 of 6" in capsys.readouterr().err
    text.write_text(text.read_text() + " more")
    assert train_lm.main(resume) == 2
    assert "is not the one that the checkpoint was trained on" in capsys.readouterr().err


def test_minutes_shorten_the_run_and_its_schedule():
    settings = dataclasses.replace(TINY, steps=1000, warmup=100, eval_every=50)
    assert train_lm._fit_steps(settings, 8, 0.1) is settings
    shorter = train_lm._fit_steps(settings, 1, 0.24)
    assert (shorter.steps, shorter.warmup, shorter.eval_every) == (250, 25, 12)


def test_crossing_is_where_a_curve_comes_down_to_a_level():
    curve = [
        {"step": step, "seconds": 2 * step, "held_out_bpb": bpb} for step, bpb in [(10, 4.0), (20, 3.0), (30, 2.0)]
    ]
    assert report.crossing(curve, 2.5) == {"step": 25, "seconds": 50}
    assert report.crossing(curve, 2.0) == {"step": 30, "seconds": 60}
    assert report.crossing(curve, 1.9) is None


@pytest.mark.gpu
def test_on_a_gpu_a_run_goes_through_and_can_be_resumed(text, tmp_path, capsys):
    flags = command_line(text, tmp_path / "out", "--steps", "20", "--eval-every", "10", "--generate", "def")
    flags[flags.index("--device") + 1] = "cuda"
    flags[flags.index("--dtype") + 1] = "auto"
    assert train_lm.main(flags) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["hardware"]["device"] == "cuda"
    assert report["settings"]["dtype"] == "bfloat16"
    first, last = report["models"]["moe"]["curve"]
    assert last["held_out_bpb"] < first["held_out_bpb"] < 8
    assert train_lm.main(["--out", str(tmp_path / "out"), "--resume", "--device", "cuda"]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["moe", "dense"])
def test_on_a_gpu_the_host_does_not_wait_within_a_step(name, corpus):
    settings = dataclasses.replace(TINY, dtype="bfloat16", steps=1000)
    run = Run(name, settings, corpus, torch.device("cuda"))
    run.warm_up(2)
    assert run.routing_every > 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_error_of_a_rank_is_written_in_one_piece(tmp_path):
    """Ranks share a stream, and a line whose end comes apart may end after another rank's sentence."""
    wrong = [sys.executable, str(EXAMPLES / "train_lm.py"), "--resume", "--out", str(tmp_path / "no")]
    pieces = written_to_stderr(wrong, env=os.environ | {"RANK": "3"})
    (told,) = [piece for piece in pieces if "error: " in piece]
    assert told.startswith("[rank 3] train_lm.py: error: --resume: ")
    assert told.endswith("\n")
