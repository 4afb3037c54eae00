"""DeepSpeed's engine with dmoe's layers equals plain PyTorch on the same batch of all ranks: 1, 2 and 4 of them."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import deepspeed_cases as cases
import pytest
import torch
from patience import PATIENCE

import dmoe
import dmoe.integrations.deepspeed as on_deepspeed
from dmoe.checkpoint.__main__ import main

INSTALLED = Path(sys.prefix) / "deepspeed"  # `make .venv/deepspeed`
SUPPORT = Path(cases.__file__).parent
EXAMPLE = SUPPORT.parents[1] / "examples" / "train_deepspeed.py"
# Of the largest change of a parameter. An auxiliary loss that misses the loss scale is 0.015 of it, in both.
PRECISION = {torch.float16: 0.004, torch.bfloat16: 0.015}
RUNS = [(world, name) for world, of_world in cases.CASES.items() for name in of_world]
pytestmark = pytest.mark.xdist_group("deepspeed engine")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of all runs, what each rank found, by the number of ranks, and what they wrote."""
    if not INSTALLED.is_dir():
        pytest.skip("DeepSpeed is not installed: make .venv/deepspeed")
    out = tmp_path_factory.mktemp("deepspeed")
    path = os.pathsep.join([str(INSTALLED), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "deepspeed_trains.py"), str(out), str(EXAMPLE)],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = {world: [torch.load(out / f"{world}/rank{rank}.pt") for rank in range(world)] for world in cases.CASES}
    return out, found, done.stdout


@functools.cache
def plain(world, name):
    return cases.plain_loop(cases.CASES[world][name])


def whole(ranks, name, case):
    """The tensors of the model on all ranks, experts put together; what every rank has is alike on all of them."""
    ep = case.ep or len(ranks)
    found = {}
    for key, first in ranks[0][name]["tensors"].items():
        parts = [rank[name]["tensors"][key] for rank in ranks]
        shared = ep > 1 and ".experts." in key
        for other, part in enumerate(parts):
            assert torch.equal(part, parts[other % ep] if shared else first), (key, other)
        found[key] = torch.cat(parts[:ep]) if shared else first
    return found


@pytest.mark.parametrize(("world", "name"), RUNS, ids=[f"{world} ranks, {name}" for world, name in RUNS])
def test_losses_norms_and_parameters_equal_plain_pytorch(trained, world, name):
    case, ranks, expected = cases.CASES[world][name], trained[1][world], plain(world, name)
    found = whole(ranks, name, case)
    half = case.dtype != torch.float32
    began = cases.STEPS // 2 if case.load else 0
    until = began if case.weights else cases.STEPS
    if case.aux == "explicit":
        for rank in ranks:
            assert rank[name]["losses"] == pytest.approx(expected["losses"][began:until], rel=0, abs=1e-5)
    told = [norm for norm in ranks[0][name]["norms"] if norm is not None]
    if case.clip or case.zero["stage"]:
        assert len(told) == until - began
    for step, (norm, right) in enumerate(zip(told, expected["norms"][began:until], strict=True) if told else ()):
        if step != case.overflow:
            assert norm == pytest.approx(right, rel=1e-2 if half else 1e-5)
    start, end = expected["states"][0], expected["states"][until]
    assert found.keys() == end.keys()
    moved = max(float((end[key] - start[key]).abs().max()) for key in found)
    for key, tensor in found.items():
        error = float((tensor - end[key]).abs().max())
        assert error <= (PRECISION[case.dtype] * moved if half else 1e-5), (key, error, moved)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_expert_that_overflows_on_one_rank_skips_the_step_on_all(trained, stage):
    name = f"fp16, ZeRO {stage}"
    at = cases.CASES[2][name].overflow
    for rank in trained[1][2]:
        assert rank[name]["skipped"] == 1
        scales = rank[name]["scales"]
        assert scales == [scales[0]] * at + [scales[0] / 2] * (cases.STEPS - at)


REFUSED = {
    "DTensor": "prepare: ffn: expected experts of plain tensors, dmoe.MoE(..., dtensor=False), got DTensor",
    "a name": "prepare: experts: expected a layer whose name has no 'expert' in it",
    "main_grad": "prepare: ffn: accumulate_main_grad: expected False",
    "a scale": "prepare: ffn: expert_grad_scale: expected 'mean', or 'sum' for DeepSpeed to divide",
    "slices": "prepare: ffn: expected whole experts on each rank, got slices: 2 ranks share 1 experts",
    "adapters": "prepare: ffn: expected experts of plain weights, got adapters or codes in them",
    "fp16 without ZeRO": "prepare: config: expected ZeRO 1, 2 or 3 with fp16, got stage 0",
    "a pipeline": "prepare: model: expected a plain module, got DeepSpeed's PipelineModule",
    "zero.Init": "prepare: ffn: expected experts that ranks share to be built outside of deepspeed.zero.Init",
    "an older DeepSpeed": "prepare: ffn: expected ZeRO 0, 1 or 2 for experts that ranks share, or a DeepSpeed (0.19.8)",
    "no divisor": "expert_parallel_group: ep_size: expected a divisor of the number of ranks, {world}, got 3",
    "no model": "initialize: model: expected a module, got None",
    "no config": "initialize: config: expected DeepSpeed's config, a dict or the path of a file, got None",
    "one group": "initialize: optimizer: expected experts in groups of their own with ZeRO 1, as param_groups(model)",
    "not prepared": "param_groups: parameters: expected those of a model that prepare() was called with",
    "the whole model": "save_16bit_model: expected ZeRO 0, 1 or 2, or experts that no ranks share, got ZeRO 3",
    "no checkpoint": "to_universal: source: expected the folder of a tag, with mp_rank_00_model_states.pt, in ",
    "a target that is there": "to_universal: target: expected a folder that is not there yet, got ",
    "a checkpoint without ZeRO": "which has no shapes of parameters",
    "other ranks": "prepare: ffn: ep_group: expected the ranks [0, 1], which DeepSpeed's layout has, got [0, 2]",
    "another layout": "expert_parallel_group: use_data_before_expert_parallelism: expected False, as the ranks",
}


@pytest.mark.parametrize("world", [2, 4])
def test_what_is_refused_is_told_on_every_rank(trained, world):
    for rank in trained[1][world]:
        told = rank["refused"]
        assert len(told) == (len(REFUSED) - 2 if world == 2 else 2)
        for name, sentence in told.items():
            assert sentence.startswith(("ValueError: ", "FileNotFoundError: ", "FileExistsError: ")), (name, sentence)
            assert "\n" not in sentence
    for name, sentence in trained[1][world][0]["refused"].items():
        assert REFUSED[name].format(world=world) in sentence


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_the_engine_saves_is_deepspeeds_layout_and_loads_as_layers(trained, stage):
    name = f"ZeRO {stage}, saved"
    folder = trained[0] / "2" / name / "ckpt"
    files = {file.name for file in (folder / "global_step3").glob("*_model_states.pt")}
    experts = {f"layer_{n}_expert_{e}_mp_rank_00_model_states.pt" for n in range(2) for e in range(cases.E)}
    assert files == experts | {"mp_rank_00_model_states.pt"}
    layers, run = dmoe.checkpoint.load_layers(folder), plain(2, name)
    assert list(layers) == ["moe1", "moe2"]
    for key, layer in layers.items():
        assert layer.config == getattr(run["model"], key).config
        for own, value in layer.state_dict().items():
            assert torch.allclose(value, run["states"][cases.STEPS // 2][f"{key}.{own}"], rtol=0, atol=1e-5)


def test_layers_of_deepspeeds_names_are_saved_under_them(trained):
    name = "layers of DeepSpeed's names"
    folder = trained[0] / "2" / name / "ckpt"
    expert = torch.load(folder / "global_step3" / "layer_1_expert_3_mp_rank_00_model_states.pt")
    start = "moe2.deepspeed_moe.experts.deepspeed_experts.3."
    assert set(expert) == {start + each for each in ("0.weight", "0.bias", "2.weight", "2.bias")}
    layer, run = dmoe.checkpoint.load_layers(folder)["moe2"], plain(2, name)
    right = run["states"][cases.STEPS // 2]["moe2.deepspeed_moe.experts.up_proj"]
    assert torch.allclose(layer.experts.up_proj, right, rtol=0, atol=1e-5)
    assert layer.config == run["model"].moe2.deepspeed_moe.config


def test_converted_and_back_every_tensor_has_its_bits(trained, tmp_path, capsys):
    given, ours, back = trained[0] / "2/ZeRO 2, saved/ckpt", tmp_path / "ours", tmp_path / "back"
    assert main(["inspect", str(given)]) == 0
    shown = capsys.readouterr().out
    assert "moe1.experts: 4 experts, width 12, hidden size 8, plain with biases" in shown
    assert "note:" not in shown  # nothing had to be assumed
    assert main(["convert", str(given), str(ours), "--to", "dmoe"]) == 0
    assert main(["convert", str(ours), str(back), "--to", "deepspeed"]) == 0
    for file in (given / "global_step3").glob("*_model_states.pt"):
        a, b = (torch.load(each, weights_only=False) for each in (file, back / "global_step3" / file.name))
        a, b = a.get("module", a), b.get("module", b)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_example_trains_and_saves(trained):
    assert len(EXAMPLE.read_text().splitlines()) < 80
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", trained[2])]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 6  # of 256 bytes alike it is 5.5
    assert list(dmoe.checkpoint.load_layers(trained[0] / "example")) == ["ffn.0", "ffn.1"]


def test_the_page_has_every_name_and_its_blocks_ran(trained):
    page = (EXAMPLE.parents[1] / "docs" / "deepspeed.md").read_text()
    table = page.partition("| name |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)\(", table, re.MULTILINE)) == on_deepspeed.__all__
    assert (trained[0] / "runs" / "deepspeed" / "latest").exists()


def test_without_deepspeed_one_sentence_says_how_to_get_it():
    with pytest.raises(
        ImportError, match=r"expected DeepSpeed, which is not installed: pip install 'dmoe\[deepspeed\]'"
    ):
        _ = on_deepspeed.initialize
    with pytest.raises(AttributeError, match="has no attribute 'initialise'"):
        _ = on_deepspeed.initialise
    assert dir(on_deepspeed) == on_deepspeed.__all__
