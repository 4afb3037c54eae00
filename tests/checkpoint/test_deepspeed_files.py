"""DeepSpeed's folders, written by DeepSpeed itself on two ranks: to dmoe, the same output, and back to the bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import deepspeed_writes as theirs
import pytest
import torch
from patience import PATIENCE

import dmoe
from dmoe.checkpoint import read_model
from dmoe.checkpoint.__main__ import main

INSTALLED = Path(sys.prefix) / "deepspeed"  # `make .venv/deepspeed`
SUPPORT = Path(theirs.__file__).parent
CASES = ("plain", "gated", "residual")
pytestmark = pytest.mark.xdist_group("deepspeed files")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder for each case."""
    if not INSTALLED.is_dir():
        pytest.skip("DeepSpeed is not installed: make .venv/deepspeed")
    out = tmp_path_factory.mktemp("deepspeed")
    path = os.pathsep.join([str(INSTALLED), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, theirs.__file__, str(out), *CASES],
            env=os.environ
            | {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), told[0][-3000:]
    return out


def module_of(model, prefix, case):
    """The layer that a model's tensors make."""
    moe = dmoe.MoE(model.layers[prefix])
    layer, outer = (
        (dmoe.ResidualMoE(moe, theirs.Ffn()), prefix.removesuffix("moe.")) if case == "residual" else (moe, prefix)
    )
    tensors = {name: stored for name, stored in model.tensors.items() if name.startswith(outer)}
    layer.double().eval().load_state_dict({name[len(outer) :]: each.read().double() for name, each in tensors.items()})
    return layer


@pytest.mark.parametrize("case", CASES)
def test_to_dmoe_the_same_output_and_back_to_the_bit(written, tmp_path, case):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(written / case / "ckpt"), str(ours), "--to", "dmoe"]) == 0
    model = read_model(ours)
    ran = torch.load(written / case / "run.pt")["layers"]
    assert len(model.layers) == len(ran) == 2
    for prefix, (x, y) in zip(model.layers, ran, strict=True):
        error = (module_of(model, prefix, case)(x) - y).abs().max()
        assert error <= 2e-7 * y.abs().max()  # DeepSpeed's gate is float32, whatever the model's dtype
    assert main(["convert", str(ours), str(back), "--to", "deepspeed"]) == 0
    given, found = written / case / "ckpt" / "global_step0", back / "global_step0"
    files = {file.name for file in given.iterdir() if "optim_states" not in file.name}
    assert {file.name for file in found.iterdir()} == files
    assert (back / "latest").read_text() == "global_step0"
    for name in files:
        a, b = (torch.load(folder / name, weights_only=False) for folder in (given, found))
        assert a.keys() - {"optimizer", "lr_scheduler"} <= b.keys() | {"optimizer", "lr_scheduler"}
        a, b = a.get("module", a), b.get("module", b)
        assert list(a) == list(b)
        assert all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def test_files_of_its_first_versions(written, tmp_path):
    """``expert_{e}_...`` held that expert of all layers."""
    old = tmp_path / "old"
    shutil.copytree(written / "plain" / "ckpt", old)
    for expert in range(theirs.E):
        files = [old / "global_step0" / f"layer_{n}_expert_{expert}_mp_rank_00_model_states.pt" for n in range(2)]
        whole = {name: value for file in files for name, value in torch.load(file).items()}
        torch.save(whole, old / "global_step0" / f"expert_{expert}_mp_rank_00_model_states.pt")
        for file in files:
            file.unlink()
    found, expected = read_model(old), read_model(written / "plain" / "ckpt")
    assert list(found.tensors) == list(expected.tensors)
    assert all(torch.equal(found.tensors[name].read(), expected.tensors[name].read()) for name in expected.tensors)
    assert main(["convert", str(old), str(tmp_path / "back"), "--to", "deepspeed"]) == 0
    names = {file.name for file in (tmp_path / "back" / "global_step0").iterdir()}
    assert names == {file.name for file in (old / "global_step0").iterdir() if "optim_states" not in file.name}


DAMAGE = {
    "an expert is missing": "expected layer_1_expert_2_mp_rank_00_model_states.pt",
    "another layer than the name says": "layer_0_expert_1_mp_rank_00_model_states.pt: expected the layer moe1",
    "another expert than the name says": "layer_0_expert_1_mp_rank_00_model_states.pt: expected tensors of expert 1",
    "cut off": "layer_1_expert_0_mp_rank_00_model_states.pt: expected a whole file",
    "a pickle of os.system": "layer_1_expert_0_mp_rank_00_model_states.pt: expected tensors, plain data and objects of",
    "latest leads elsewhere": "latest: expected the name of a folder beside it",
    "two tensor ranks": "mp_rank_01_model_states.pt: expected one file of all that is no expert",
}


class _Runs:
    """A pickle that would run a program."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_and_leaves_nothing(written, tmp_path, capfd, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "in"
    shutil.copytree(written / "plain" / "ckpt", source)
    files = source / "global_step0"

    def expert(layer, number):
        return files / f"layer_{layer}_expert_{number}_mp_rank_00_model_states.pt"

    if damage == "an expert is missing":
        expert(1, 2).unlink()
    elif damage == "another layer than the name says":
        shutil.copy(expert(1, 1), expert(0, 1))
    elif damage == "another expert than the name says":
        shutil.copy(expert(0, 2), expert(0, 1))
    elif damage == "cut off":
        whole = expert(1, 0).read_bytes()
        expert(1, 0).write_bytes(whole[: len(whole) // 2])
    elif damage == "a pickle of os.system":
        torch.save(torch.load(expert(1, 0)) | {"extra": _Runs()}, expert(1, 0))
    elif damage == "latest leads elsewhere":
        (source / "latest").write_text("../elsewhere")
    else:
        shutil.copy(files / "mp_rank_00_model_states.pt", files / "mp_rank_01_model_states.pt")
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", "in", "out", "--to", "dmoe", "--from", "deepspeed"]) == 2
    told = capfd.readouterr().err
    assert told.count("\n") == 1
    assert DAMAGE[damage] in told
    assert sorted(tmp_path.rglob("*")) == before
