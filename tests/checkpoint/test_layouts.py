"""Files of ranks in the layouts of other systems: to dmoe, the same output, and back to the bit."""

from __future__ import annotations

import layout_cases as cases
import pytest
import torch
import torch.nn.functional as F

import dmoe
from dmoe.checkpoint import read_model
from dmoe.checkpoint.__main__ import main

# layout: how a rank's state is made, ranks, gated, biased, and the fields of the config that files do not tell
PLAIN = {"top_k": 1, "activation": "gelu"}
CASES = {
    "tutel": (cases.tutel_ffn, (1, 2, 4, 8), False, True),
    "tutel without biases": (cases.tutel_ffn, (1, 2), False, False),
    "tutel with one bias": (cases.tutel_one_bias, (1, 2, 8), False, True),
    "tutel of old": (cases.tutel_old, (1, 2), False, True),
    "tutel llama_ffn": (cases.tutel_llama, (1, 2, 4), True, False),
    "swin-moe": (cases.tutel_ffn, (2, 4), False, True),
    "fairseq": (cases.fairseq, (1, 2, 4, 8), False, True),
    "megablocks": (cases.megablocks, (1, 2, 8), False, False),
    "megablocks gated": (cases.megablocks, (1, 4, 8), True, False),
    "megablocks with capacity": (cases.megablocks_with_capacity, (1, 2), False, False),
    "megatron-sequential": (cases.sequential, (1, 2), False, True),
    "megatron-sequential gated": (cases.sequential, (1, 4), True, False),
    "megatron-te": (cases.te, (1, 2), True, False),
    "megatron-grouped": (cases.grouped, (1, 4), True, False),
    "megatron-grouped plain": (cases.grouped, (2,), False, False),
    "deepspeed": (cases.deepspeed, (1, 2), False, True),
    "deepspeed gated": (cases.deepspeed, (1, 4), True, False),
}
EACH = [(name, ranks) for name, (_, many, *_) in CASES.items() for ranks in many]
PREFIXES = ("blocks.0.moe.", "blocks.1.moe.")


def layers_of(name):
    make, _, gated, biased = CASES[name]
    layers = [cases.drawn(seed, gated=gated, biased=biased) for seed in range(len(PREFIXES))]
    for layer in layers:
        make(layer, "", 0, 1)  # which may say what it lacks
    return layers


def write(name, ranks, folder):
    """The files of a model of two layers in a layout; returns what a user names them by."""
    make, layout = CASES[name][0], name.split()[0]
    inside = "_moe_layer." if layout == "swin-moe" else ""
    states = []
    for rank in range(ranks):
        state = {"embedding.weight": torch.arange(10.0)}
        for prefix, layer in zip(PREFIXES, layers_of(name), strict=True):
            state |= make(layer, prefix + inside, rank, ranks)
            state[f"{prefix}after.weight"] = torch.ones(3, dtype=torch.bfloat16)
        states.append({key: value.clone() for key, value in state.items()})
    folder.mkdir()
    if ranks > 1 and layout in ("swin-moe", "fairseq"):
        shared = {key: value for key, value in states[0].items() if ".experts." not in key}
        states = [{key: value for key, value in state.items() if ".experts." in key} for state in states]
        rank_file, rest, whole = {
            "fairseq": ("X-rank-{}.pt", "X-shared.pt", "X.pt"),
            "swin-moe": ("X.pth.rank{}", "X.pth.master", "X.pth"),
        }[layout]
        torch.save({"model": shared, "epoch": 3}, folder / rest)
        for rank, state in enumerate(states):
            torch.save({"model": state}, folder / rank_file.format(rank))
        return folder / (whole if layout == "fairseq" else "X.pth.rank{rank}")
    nested = layout.startswith("megatron") or layout in ("fairseq", "swin-moe")
    for rank, state in enumerate(states):
        torch.save({"model": state, "iteration": 7} if nested else state, folder / f"part{rank}.pt")
    return folder / ("part{rank}.pt" if ranks > 1 else "part0.pt")


def contents(folder):
    return {file.name: torch.load(file, weights_only=True) for file in sorted(folder.iterdir())}


def same(first, other):
    if isinstance(first, dict):
        return first.keys() == other.keys() and all(same(first[key], other[key]) for key in first)
    if isinstance(first, torch.Tensor):
        return first.dtype == other.dtype and torch.equal(first, other)
    return first == other


@pytest.mark.parametrize(("name", "ranks"), EACH)
def test_to_dmoe_the_same_output_and_back_to_the_bit(tmp_path, name, ranks):
    layout = name.split()[0]
    source = write(name, ranks, tmp_path / "in")
    settings = [f"--set={key}={value}" for key, value in PLAIN.items()]
    settings += ["--set=capacity_factor=None", "--set=gate_normalization=None", "--set=softmax_order=before_topk"]
    settings += ["--set=eval_capacity_fraction=None"]
    assert main(["convert", str(source), str(tmp_path / "ours"), "--to", "dmoe", *settings]) == 0
    model = read_model(tmp_path / "ours")
    inside = "_moe_layer." if layout == "swin-moe" else ""
    assert list(model.layers) == [prefix + inside for prefix in PREFIXES]
    x = torch.randn(16, cases.H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for prefix, layer in zip(model.layers, layers_of(name), strict=True):
        config = model.layers[prefix]
        assert (config.top_k, config.activation) == (1, "gelu")
        moe = dmoe.MoE(config).double().eval()
        moe.load_state_dict({key: value.read().double() for key, value in model.of_layer(prefix).items()})
        expected = cases.output(layer, x, F.gelu)
        assert (moe(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert (
        main(
            ["convert", str(tmp_path / "ours"), str(back(source, tmp_path, ranks)), "--to", layout, f"--ranks={ranks}"]
        )
        == 0
    )
    found, given = contents(tmp_path / "back"), contents(tmp_path / "in")
    assert found.keys() == given.keys()
    for file in given:
        assert same(given[file], found[file]), file


def back(source, folder, ranks):
    (folder / "back").mkdir()
    return folder / "back" / source.name.replace("X.pth.rank{rank}", "X.pth" if ranks > 1 else "X.pth.global")


GROUPS = {
    "gated": ["tutel llama_ffn", "megablocks gated", "megatron-te", "megatron-grouped", "deepspeed gated"],
    "with biases": ["tutel", "fairseq", "megatron-sequential", "deepspeed"],
    "plain": ["tutel without biases", "megablocks", "megatron-grouped plain"],
}
PAIRS = [(a, b) for group in GROUPS.values() for a in group for b in group if a != b]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_from_any_to_any_and_back(tmp_path, one, other):
    """By way of two ranks of the other system, and of dmoe's own files for four."""
    source = write(one, 1, tmp_path / "in")
    there = tmp_path / "there"
    there.mkdir()
    layout, passed = one.split()[0], other.split()[0]
    steps = [
        (there / "two{rank}.pt", passed, 2),
        (there / "four{rank}.pt", "dmoe", 4),
        (there / "again{rank}.pt", passed, 2),
        (back(source, tmp_path, 1), layout, 1),
    ]
    for target, to, ranks in steps:
        assert main(["convert", str(source), str(target), "--to", to, f"--ranks={ranks}"]) == 0
        source = target
    given, found = (state_of(next(iter(contents(tmp_path / name).values()))) for name in ("in", "back"))
    assert set(found) == set(given)
    for name in given:
        assert same(given[name], found[name]), name


def state_of(content):
    return content.get("model", content)
