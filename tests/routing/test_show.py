"""``python -m dmoe.routing.show``: exact small routings as text, files of logits, pictures, errors in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dmoe
from dmoe import presets
from dmoe.routing import Cosine, TopK
from dmoe.routing.show import fewer_experts, main, parse_settings
from dmoe.routing.view import look, random_logits

HAS_BASE = hasattr(dmoe.routing, "Base")
BUILT = [name for name in presets.NAMES if HAS_BASE or name != "base_layer"]
LOGITS = [[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 1.0, 2.0], [3.0, 2.0, 1.0]]


@pytest.fixture
def logits_file(tmp_path):
    path = tmp_path / "logits.json"
    path.write_text(json.dumps(LOGITS))
    return str(path)


def shown(capsys, *arguments):
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_one_choice_and_a_capacity(capsys, logits_file):
    lines = shown(capsys, "switch:min_capacity=0", "--logits", logits_file)
    assert lines == [
        "switch, min_capacity=0: 6 tokens choose 1 of 3 experts, capacity 2, in training",  # floor(1.25 * 6 / 3)
        "Not as published: num_experts 3 instead of 128.",
        "",
        "token  e0  e1  e2",
        "    0   1   .   .",
        "    1   1   .   .",
        "    2   1x  .   .",
        "    3   .   .   1",
        "    4   1x  .   .",
        "    5   1x  .   .",
        "",
        "expert  kept/load",
        "    e0        2/5  ##|xxx",
        "    e1        0/0    |",
        "    e2        1/1  # |",
        "",
        "dropped  3 of 6 assignments (50.0%); 3 of 6 tokens reach no expert",
        "entropy  0.832 nats of at most 1.099",
        "losses   load_balancing 1.555 (coefficient 0.01)",
        "(1 is a token's first choice; x: dropped)",
    ]
    p = torch.softmax(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 0)
    assert f"{-(p * p.log()).sum():.3f}" == "0.832"
    mean = torch.softmax(torch.tensor(LOGITS, dtype=torch.float64), 1).mean(0)
    assert f"{3 * (mean * torch.tensor([5, 0, 1]) / 6).sum():.4g}" == "1.555"


def test_two_choices_in_the_order_of_their_probabilities(capsys, logits_file):
    fields = ["--field", "capacity=2", "--field", "drop_order=choice_major"]
    lines = shown(capsys, "mixtral", "--logits", logits_file, *fields)
    assert lines[3:15] == [
        "token  e0  e1  e2",
        "    0   1   .   2",
        "    1   1   .   2x",  # e2 has token 3's first choice already
        "    2   1x  2   .",
        "    3   .   2   1",
        "    4   1x  .   2x",
        "    5   1x  2x  .",
        "",
        "expert  kept/load",
        "    e0        2/5  ##|xxx",
        "    e1        2/3  ##|x",
        "    e2        2/4  ##|xx",
    ]
    assert lines[16] == "dropped  6 of 12 assignments (50.0%); 2 of 6 tokens reach no expert"
    assert lines[-1] == "(1 is a token's first choice, 2 its second; x: dropped)"


def test_experts_that_choose(capsys, tmp_path):
    (tmp_path / "logits.csv").write_text("4,0,0\n3,0,0\n2,1,0\n0,3,1\n0,0,2\n1,0,0")
    lines = shown(capsys, "expert_choice", "--logits", tmp_path / "logits.csv")
    assert lines[0] == "expert_choice: each of 3 experts takes 2 of 6 tokens, in training"
    assert lines[3:10] == [
        "token  e0  e1  e2",
        "    0   1   .   .",
        "    1   2   .   .",
        "    2   .   2   .",
        "    3   .   1   .",
        "    4   .   .   1",
        "    5   .   .   2",
    ]
    assert lines[-4] == "dropped  0 of 6 assignments (0.0%); 0 of 6 tokens reach no expert"
    assert lines[-2:] == ["losses   none", "(1 is an expert's first choice, 2 its second)"]


def test_groups_have_a_capacity_each(capsys, logits_file):
    lines = shown(capsys, "switch:min_capacity=0,token_groups=2", "--logits", logits_file)
    assert lines[0].endswith("6 tokens choose 1 of 3 experts, capacity 1 in each of 2 groups, in training")
    assert lines[3:11] == [
        "token  e0  e1  e2",
        "    0   1   .   .",
        "    1   1x  .   .",
        "    2   1x  .   .",
        "",
        "    3   .   .   1",
        "    4   1   .   .",
        "    5   1x  .   .",
    ]
    assert lines[13] == "    e0        2/5  ##xxx"


def test_experts_choose_in_each_group(capsys, tmp_path):
    (tmp_path / "logits.csv").write_text("4,0\n3,0\n2,1\n0,3\n")
    lines = shown(capsys, "expert_choice:token_groups=2", "--logits", tmp_path / "logits.csv")
    assert lines[0].endswith("each of 2 experts takes 1 of 4 tokens in each of 2 groups, in training")
    assert lines[3:9] == ["token  e0  e1", "    0   1   .", "    1   .   1", "", "    2   1   .", "    3   .   1"]


def test_evaluation(capsys, logits_file):
    lines = shown(capsys, "switch:min_capacity=0", "--logits", logits_file, "--eval")
    assert lines[0].endswith("capacity 4, in evaluation")  # eval_capacity_factor 2
    assert "losses   none in evaluation" in lines


def test_a_wide_grid_lists_experts_and_long_bars_stand_for_more(capsys):
    lines = shown(capsys, "deepseek_v3", "--experts", 256, "--tokens", 2)
    assert max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines[3:5]] == ["0", "1"]
    chosen = [line.split()[1:] for line in lines[3:5]]
    assert [len(set(experts)) for experts in chosen] == [8, 8]
    bars = [line.split() for line in lines[7 : 7 + 256]]
    assert {bar[0] for bar in bars if bar[1] != "0/0"} == set().union(*chosen)
    lines = shown(capsys, "megablocks", "--experts", 2, "--tokens", 300)
    assert max(map(len, lines)) <= 120
    bar = next(line for line in lines if line.lstrip().startswith("e0"))
    step = int(next(line for line in lines if "kept/load" in line).split()[-1])
    assert step >= 3
    assert bar.count("#") == -(-int(bar.split()[1].split("/")[0]) // step)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BUILT)
def test_every_preset_can_be_shown(name, training):
    published = presets.get(name)
    config = presets.get(name, hidden_size=16, **fewer_experts(published, min(published.num_experts, 8)))
    state = torch.get_rng_state()
    view = look(config, name=name, num_tokens=32, seed=3, training=training)
    assert torch.equal(state, torch.get_rng_state())
    again = look(config, name=name, num_tokens=32, seed=3, training=training)
    assert torch.equal(view.choice, again.choice)
    assert torch.equal(view.kept, again.kept)
    assert torch.equal((view.choice > 0).sum(0), view.load)
    assert torch.equal(view.kept.sum(0), view.computed)
    assert not (view.kept & (view.choice == 0)).any()
    if view.capacity is not None:
        assert view.computed.max() <= view.capacity
    assert view.dropped == pytest.approx(1 - view.computed.sum().item() / view.load.sum().item())
    if not view.experts_choose:
        assert set(view.choice.flatten().tolist()) <= set(range(config.top_k + 1))
    assert set(view.losses) == ({loss for loss, _ in config.coefficients} if training else set())
    if view.shade is not None:
        torch.testing.assert_close(view.shade.sum(1), torch.ones(32))


def test_a_seed_draws_the_same_logits_for_every_preset():
    assert torch.equal(random_logits(8, 4, 1), random_logits(8, 4, 1))
    assert not torch.equal(random_logits(8, 4, 1), random_logits(8, 4, 2))
    switch = look(presets.megablocks(num_experts=8), name="")
    given = look(presets.megablocks(num_experts=8), name="", logits=random_logits(32, 8, 0))
    assert torch.equal(switch.choice, given.choice)


@pytest.mark.parametrize("name", presets.NAMES if HAS_BASE else BUILT)
@pytest.mark.parametrize("experts", [2, 3, 8, 12, 64, 2048])
def test_fewer_experts_make_a_config(name, experts):
    published = presets.get(name)
    config = presets.get(name, **fewer_experts(published, experts))
    assert config.num_experts == experts
    assert config.top_k <= published.top_k
    if experts >= published.num_experts:
        assert (config.top_k, config.num_groups) == (published.top_k, published.num_groups)
    if config.num_groups > 1:
        assert config.num_groups <= published.num_groups
        assert experts // config.num_groups >= 2


def test_fewer_experts_keep_something_to_choose_from():
    few = {"num_experts": 8, "top_k": 2, "num_groups": 4, "top_k_groups": 2}
    assert fewer_experts(presets.deepseek_v3(), 8) == few
    few = {"num_experts": 64, "top_k": 8, "num_groups": 8, "top_k_groups": 4}
    assert fewer_experts(presets.deepseek_v3(), 64) == few
    assert fewer_experts(presets.qwen3(), 16) == {"num_experts": 16, "top_k": 4}
    assert fewer_experts(presets.mixtral(), 8) == {"num_experts": 8}


def test_files_of_every_kind_say_the_same(capsys, tmp_path, logits_file):
    expected = shown(capsys, "mixtral", "--logits", logits_file)
    table = tmp_path / "logits.csv"
    table.write_text("\n".join(",".join(map(str, row)) for row in LOGITS) + "\n\n")
    for dtype in (torch.float64, torch.bfloat16, torch.int32):
        torch.save(torch.tensor(LOGITS).to(dtype), tmp_path / "logits.pt")
        assert shown(capsys, "mixtral", "--logits", tmp_path / "logits.pt") == expected
    assert shown(capsys, "mixtral", "--logits", table) == expected


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(capsys, *arguments):
    """What a refused command says: one line, and nothing else."""
    assert main([*map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_nothing_in_a_file_is_run(capsys, tmp_path):
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(str(tmp_path / "made")), protocol=2))
    torch.save({"logits": Evil(str(tmp_path / "made"))}, tmp_path / "worse.pt")
    for name in ("evil.pt", "worse.pt"):
        assert f"{name}: expected a tensor of torch.save, got: " in refused(
            capsys, "switch", "--logits", tmp_path / name
        )
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "1,2\n3\n", "a.csv: expected rows of as many numbers each, got: rows of 1 to 2"),
        ("a.csv", "e0,e1\n1,2\n", "a.csv: expected rows of as many numbers each, got: could not convert"),
        ("a.csv", "", "a.csv: expected (T, E) numbers, got shape (0,)"),
        ("a.csv", "1,nan\n", "a.csv: expected finite numbers, got [1.0, nan] in row 0"),
        ("a.json", "[[1, 2], [3, true]]", "expected rows of as many numbers each, got: something that is no number"),
        ("a.json", '{"a": 1}', "a.json: expected rows of as many numbers each, got: no list of lists"),
        ("a.json", "[[1, 2", "a.json: expected rows of as many numbers each, got: Expecting"),
        ("a.json", "[[]]", "a.json: expected (T, E) numbers, got shape (1, 0)"),
        ("a.txt", "1 2", "a.txt: expected a file named *.pt, *.csv or *.json, got .txt"),
        ("a.pt", "no tensor", "a.pt: expected a tensor of torch.save, got: "),
    ],
)
def test_files_that_hold_no_logits(capsys, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    assert message in refused(capsys, "switch", "--logits", tmp_path / name)


def test_tensors_that_are_no_logits(capsys, tmp_path):
    path = tmp_path / "a.pt"
    for content, message in [
        (torch.zeros(2, 3, 4), "expected (T, E) numbers, got shape (2, 3, 4)"),
        (torch.zeros(2, 2, dtype=torch.complex64), "expected a tensor of torch.save, got: torch.complex64"),
        ({"logits": torch.zeros(2, 2)}, "expected a tensor of torch.save, got: dict"),
    ]:
        torch.save(content, path)
        assert message in refused(capsys, "switch", "--logits", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["swich"], "error: presets: expected one of switch, gshard"),
        (["switch", "--tokens", 0], "--tokens: expected at least 1, got 0"),
        (["switch", "--experts", -1], "--experts: expected at least 1, got -1"),
        (["switch", "--logits", "/nowhere/a.pt"], "error: /nowhere/a.pt: No such file or directory"),
        (["switch", "--field", "top_k"], "--field: expected NAME=VALUE, as in top_k=2, got 'top_k'"),
        (["switch", "--field", "top_k=2)(a=1"], "--field: expected NAME=VALUE"),
        (["switch", "--field", "top_k=[i for i in (1,)]"], "--field: top_k: expected a word, a number or a list"),
        (["switch:top_p=2"], "presets.switch: expected its own arguments and fields of MoEConfig, got top_p"),
        (["switch:top_k=99"], "MoEConfig: top_k: expected at most num_experts = 8, got 99"),
        (["switch:router=nowhere(a=1)"], "router: expected one of "),
        (["switch:router=top_k(a=1)"], "unexpected keyword argument 'a'"),
        (["switch:router=cosine(dim=0)"], "Cosine: dim: expected at least 1, got 0"),
        (["switch", "--tokens", 7, "--field", "token_groups=2"], "token_groups: expected a divisor of the number of"),
        (["switch", "--out", "a.bmp"], "a.bmp: expected a picture named *.png, *.svg or *.pdf, got .bmp"),
    ],
)
def test_what_is_wrong_is_told_in_one_sentence(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_logits_that_do_not_fit(capsys, logits_file):
    assert "--experts: expected 3, as " in refused(capsys, "switch", "--logits", logits_file, "--experts", 4)
    assert "--tokens: expected 6, as " in refused(capsys, "switch", "--logits", logits_file, "--tokens", 4)
    assert "expected none with router='hash', which has no logits" in refused(
        capsys, "hash_layer", "--logits", logits_file
    )


def test_settings():
    assert parse_settings("", "") == {}
    text = "top_k=2, drop_order=random, gated=False, losses={'z': 0.5}, capacity=None, router=cosine(dim=8)"
    assert parse_settings(text, "") == {
        "top_k": 2,
        "drop_order": "random",
        "gated": False,
        "losses": {"z": 0.5},
        "capacity": None,
        "router": Cosine(dim=8),
    }
    assert parse_settings("router=top_k(second_expert=all, noise_std=0.5)", "")["router"] == TopK(noise_std=0.5)


PIXEL = {"dropped": (213, 94, 0), "kept": (11, 60, 93)}


@pytest.mark.parametrize(("preset", "drops"), [("switch", True), ("megablocks", False), ("hash_layer", False)])
def test_a_picture_is_1200_wide_and_shows_what_is_dropped(capsys, tmp_path, preset, drops):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = tmp_path / "picture.png"
    assert shown(capsys, preset, "--out", path) == [f"wrote {path}"]
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert struct.unpack(">I", content[16:20]) == (1200,)
    pixels = (torch.tensor(imread(path))[..., :3] * 255).round().int()
    found = {name: (pixels == torch.tensor(colour)).all(-1).sum().item() for name, colour in PIXEL.items()}
    assert found["kept"] > 500
    assert (found["dropped"] > 100) == drops


def test_several_routers_in_one_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.svg"
    shown(capsys, "gshard", "expert_choice", "vmoe:batch_priority=True", "--tokens", 8, "--out", path)
    assert "<svg" in path.read_text()


def test_without_matplotlib_the_command_that_installs_it_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refused(capsys, "switch", "--out", tmp_path / "a.png")
    assert "a picture needs matplotlib, which is not installed: pip install matplotlib" in said
    assert not list(tmp_path.iterdir())


def test_as_a_command_into_a_pipe_that_closes():
    command = [sys.executable, "-W", "error", "-m", "dmoe.routing.show", "megablocks", "--tokens", "5000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"megablocks: 5000 tokens choose 1 of 8 experts, dropless, in training\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 0)


def test_commands_in_the_documentation_run(capsys):
    docs = Path(__file__).resolve().parents[2] / "docs"
    found = [
        line.split()[3:]
        for page in docs.glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith("python -m dmoe.routing.show ")
    ]
    assert found
    for words in found:
        picture = words.index("--out")
        assert (docs.parent / words[picture + 1]).exists()
        arguments = [word for word in words[:picture] if HAS_BASE or word != "base_layer"]
        assert shown(capsys, *arguments)[0].startswith("switch: 24 tokens choose 1 of 8 experts, capacity 4")
