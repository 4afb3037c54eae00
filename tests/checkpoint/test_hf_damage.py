"""Hugging Face's folders that are damaged or contradict themselves: a sentence with the file, and nothing executed."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.formats.hf import HF
from dmoe.checkpoint.formats.hf_files import BIN, BIN_INDEX, CONFIG, INDEX, SINGLE

pytest.importorskip("transformers")
import hf_folder_cases as cases


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders that nobody changes, by family and form."""
    made = {}

    def folder(family, form="files"):
        if (family, form) not in made:
            made[family, form] = cases.saved(family, tmp_path_factory.mktemp(family), form)
        return made[family, form]

    return folder


def damaged(whole, tmp_path, family="mixtral", form="files", change=None):
    """A copy, whose tensors a function has changed."""
    folder = shutil.copytree(whole(family, form), tmp_path / "model")
    if change is not None:
        state = load_file(folder / SINGLE)
        change(state)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / SINGLE)
    return folder


def refused(folder, file, problem, kind=ValueError, **options):
    """Reading ends in one sentence, which begins with the file; so does whoever asks first whether it fits."""
    HF.fits([folder])
    with pytest.raises(kind, match=problem) as told:
        HF.read([folder], Options(**options))
    assert str(told.value).startswith(f"{file}: ")
    assert "\n" not in str(told.value)


LAYER = "model.layers.1.block_sparse_moe."
CHANGES = {
    "an expert": (
        lambda s: s.pop(LAYER + "experts.2.w1.weight"),
        r"expected experts\.\*\.w1\.weight of .*none of 2",
    ),
    "the last expert": (lambda s: [s.pop(f"{LAYER}experts.4.w{n}.weight") for n in (1, 2, 3)], "experts are missing"),
    "all of a kind": (lambda s: [s.pop(f"{LAYER}experts.{e}.w2.weight") for e in range(5)], "w2.weight beside .*none"),
    "the router": (lambda s: s.pop(LAYER + "gate.weight"), r"expected gate\.weight in a layer of mixtral, got none"),
    "half an expert": (
        lambda s: s.update({LAYER + "experts.0.w1.weight": torch.zeros(9, 32)}),
        r"w1\.weight of one shape",
    ),
    "another name": (
        lambda s: s.update({LAYER + "experts.0.w4.weight": torch.zeros(9, 32)}),
        r"w4\.weight: expected a",
    ),
    "scales": (
        lambda s: s.update({LAYER + "experts.0.w1.weight_scale_inv": torch.zeros(1, 1)}),
        "FineGrainedFP8Config",
    ),
    "blocks": (lambda s: s.update(a_blocks=torch.zeros(1, 4, 2, 16, dtype=torch.uint8)), "got no a_scales"),
    "no experts": (lambda s: [s.pop(name) for name in list(s) if ".experts." in name], "expected MoE layers with the"),
}


@pytest.mark.parametrize(("change", "problem"), CHANGES.values(), ids=CHANGES)
def test_tensors_that_are_no_whole_model(whole, tmp_path, change, problem):
    folder = damaged(whole, tmp_path, change=change)
    refused(folder, folder / SINGLE, problem)
    refused(folder, folder / SINGLE, problem, family="mixtral")


def test_layers_in_two_forms(whole, tmp_path):
    both = {LAYER.replace("block_sparse_moe", "mlp") + "experts.gate_up_proj": torch.zeros(5, 48, 32)}
    folder = damaged(whole, tmp_path, change=lambda state: state.update(both))
    problem = r"in one form, got \S+experts\.0\.w1\.weight \(files\) beside \S+experts\.gate_up_proj \(memory\)"
    refused(folder, folder / SINGLE, problem)
    shutil.rmtree(folder)
    both = {"model.layers.1.mlp.experts.gate_up_proj": torch.zeros(5, 48, 32)}
    folder = damaged(whole, tmp_path, "qwen3_moe", change=lambda state: state.update(both))
    refused(folder, folder / SINGLE, r"in one form, got .* \(files\) beside .* \(memory\)")


@pytest.mark.parametrize(
    ("family", "fields", "problem"),
    [
        ("mixtral", {"num_local_experts": 8}, "num_local_experts: expected 5, as the tensors of .* have it, got 8"),
        ("mixtral", {"hidden_size": 64}, "hidden_size: expected 32"),
        ("mixtral", {"intermediate_size": 20}, "intermediate_size: expected 24"),
        ("mixtral", {"num_experts_per_tok": 6}, "expected the config of a mixtral, got: MoEConfig: top_k"),
        ("mixtral", {"num_experts_per_tok": "two"}, "expected the config of a mixtral, got: "),
        ("qwen2_moe", {"moe_intermediate_size": 20}, "moe_intermediate_size: expected 24"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size: expected 28"),
        ("deepseek_v3", {"n_shared_experts": 1}, r"n_shared_experts \* moe_intermediate_size: expected 48"),
        ("deepseek_v3", {"n_group": 3}, "expected the config of a deepseek_v3, got: MoEConfig: num_groups"),
        ("nllb_moe", {"decoder_ffn_dim": 32}, "encoder_ffn_dim or decoder_ffn_dim: expected 28"),
        ("switch_transformers", {"d_ff": 32}, "d_ff: expected 24"),
    ],
)
def test_a_config_that_the_tensors_contradict(whole, tmp_path, family, fields, problem):
    folder = damaged(whole, tmp_path, family)
    cases.change_json(folder / CONFIG, **fields)
    refused(folder, folder / CONFIG, problem)


def test_tensors_that_contradict_each_other(whole, tmp_path):
    name = "model.layers.1.mlp.shared_expert_gate.weight"
    folder = damaged(whole, tmp_path, "qwen2_moe", change=lambda state: state.update({name: torch.zeros(2, 32)}))
    refused(folder, folder / SINGLE, r"expected shared_expert\.gate\.weight \(1, 32\) .*, got \(2, 32\)")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100000])
def test_a_config_that_is_none(whole, tmp_path, content):
    folder = damaged(whole, tmp_path)
    (folder / CONFIG).write_bytes(content)
    refused(folder, folder / CONFIG, "expected a JSON object, got")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_file_cut_off(whole, tmp_path, length):
    folder = damaged(whole, tmp_path)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:length])
    assert HF.fits([folder])  # its config says so
    refused(folder, folder / SINGLE, "expected a safetensors file, got: ")


def sharded(tmp_path):
    cases.tiny("mixtral").save_pretrained(tmp_path / "model", max_shard_size="30KB")
    return tmp_path / "model", sorted((tmp_path / "model").glob("*.safetensors"))


def test_a_missing_shard(tmp_path):
    folder, files = sharded(tmp_path)
    files[1].unlink()
    refused(folder, folder, f"expected {files[1].name}, which {INDEX} names, got no such file", FileNotFoundError)


def test_an_index_of_tensors_that_are_not_there(tmp_path):
    folder, files = sharded(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["other.weight"] = files[0].name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, files[0], f"expected other.weight, as {INDEX} says, got no such tensor")
    index["weight_map"]["other.weight"] = "../model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, folder / INDEX, "expected names of safetensors files in the same folder")


class Executed:
    def __reduce__(self):
        return os.system, ("touch executed",)


def pickled(whole, tmp_path):
    folder = damaged(whole, tmp_path)
    state = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    return folder, state


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_names_a_function(whole, tmp_path, monkeypatch, new):
    monkeypatch.chdir(tmp_path)
    folder, state = pickled(whole, tmp_path)
    torch.save({**state, "evil": Executed()}, folder / BIN, _use_new_zipfile_serialization=new)
    refused(folder, folder / BIN, r"got (posix|os)\.system: nothing of the file was executed")
    assert not (tmp_path / "executed").exists()


def test_pickles_of_something_else(whole, tmp_path):
    folder, state = pickled(whole, tmp_path)
    torch.save({"model": state}, folder / BIN)
    refused(folder, folder / BIN, "expected a state dict of tensors alone, got 'model' beside them")
    torch.save([1], folder / BIN)
    refused(folder, folder / BIN, "expected a state dict of tensors alone, got list")
    (folder / BIN).write_bytes(b"PK" + bytes(100))
    refused(folder, folder / BIN, "expected a whole file of torch.save, got")


@pytest.mark.parametrize(
    ("weight_map", "problem", "kind"),
    [
        (None, "expected a weight_map", ValueError),
        ({"a": "../x.bin"}, "expected names of .bin files in the same folder, got '../x.bin'", ValueError),
        ({"a": 3}, "expected names of .bin files in the same folder, got 3", ValueError),
        ({"a": "part.bin"}, "expected this file, which .* names, got none", FileNotFoundError),
        ({"a": "other.bin"}, "expected a, as .* says, got no such tensor", ValueError),
    ],
)
def test_indices_of_pickles(whole, tmp_path, weight_map, problem, kind):
    folder, state = pickled(whole, tmp_path)
    torch.save(state, folder / "other.bin")
    (folder / BIN_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    at_file = (weight_map or {}).get("a") in ("part.bin", "other.bin")
    refused(folder, folder / (weight_map["a"] if at_file else BIN_INDEX), problem, kind)


def test_what_is_no_folder_of_a_model(tmp_path):
    (tmp_path / CONFIG).write_text('{"model_type": "mixtral"}')
    assert not HF.fits([tmp_path])
    refused(tmp_path, tmp_path, f"expected a folder with {SINGLE} or .*, got none of them", FileNotFoundError)
    refused(tmp_path / "x", tmp_path / "x", "got no such folder", FileNotFoundError)
    save_file({"weight": torch.zeros(3)}, tmp_path / SINGLE)
    (tmp_path / CONFIG).write_text('{"model_type": "llama", "architectures": "LlamaForCausalLM"}')
    assert not HF.fits([tmp_path])
    refused(tmp_path, tmp_path / SINGLE, "got others, and model_type 'llama' in " + re.escape(str(tmp_path / CONFIG)))
    with pytest.raises(ValueError, match="expected one folder, got 2 sources"):
        HF.read([tmp_path, tmp_path], Options())


def test_a_failure_leaves_nothing(whole, tmp_path):
    folder = damaged(whole, tmp_path)
    model = HF.read([folder], Options())
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: len(content) // 2])  # somebody is faster
    with pytest.raises(ValueError, match="the file is cut off"):
        HF.write(model, tmp_path / "ours", Options())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
