"""Layers that were no model of Hugging Face's get the names of one of its families, or a sentence why not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import dmoe
from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.formats.hf import HF
from dmoe.checkpoint.formats.hf_files import SINGLE
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import held


def other_model(**fields):
    sizes = {"hidden_size": 8, "ffn_hidden_size": 6, "num_experts": 3, "top_k": 2}
    config = dmoe.MoEConfig(**{**sizes, **fields})
    state = dmoe.MoE(config).state_dict()
    tensors = {"norm.weight": held(torch.ones(8))} | {f"blocks.1.ffn.{k}": held(v) for k, v in state.items()}
    return Model(tensors, {"blocks.1.ffn.": config}, origin={"layout": "other"}), state


def test_a_model_of_another_layout_gets_a_familys_names(tmp_path):
    model, state = other_model()
    with pytest.raises(ValueError, match="expected a family to name layers by"):
        HF.write(model, tmp_path / "ours", Options())
    HF.write(model, tmp_path / "ours", Options(family="mixtral", dtype=torch.float16))
    assert [path.name for path in (tmp_path / "ours").iterdir()] == [SINGLE]
    found = load_file(tmp_path / "ours" / SINGLE)
    assert found["norm.weight"].dtype == torch.float16
    assert torch.equal(found["blocks.1.ffn.experts.2.w3.weight"], state["experts.gate_up_proj"][2, 1].half())
    assert torch.equal(found["blocks.1.ffn.gate.weight"], state["router.weight"].half())
    with pytest.raises(FileExistsError):
        HF.write(model, tmp_path / "ours", Options(family="mixtral"))
    HF.write(model, tmp_path / "ours", Options(family="dbrx", overwrite=True))
    found = load_file(tmp_path / "ours" / SINGLE)
    assert torch.equal(found["blocks.1.ffn.experts.mlp.v1"].view(3, 6, 8), state["experts.gate_up_proj"][:, 1])


@pytest.mark.parametrize(
    ("family", "fields", "problem"),
    [
        ("mixtral", {"gated": False}, "has no place for up"),
        ("switch_transformers", {}, "has no place for up of gated experts"),
        ("mixtral", {"shared_ffn_hidden_size": 4}, "has no place for shared_up"),
        ("qwen2_moe", {}, "expected shared_expert.gate_proj.weight and .* in a layer of qwen2_moe"),
        ("nllb_moe", {"gated": False}, "expected experts.expert_{e}.fc1.bias in a layer of nllb_moe"),
    ],
)
def test_a_layer_that_a_family_does_not_have(tmp_path, family, fields, problem):
    with pytest.raises(ValueError, match=problem):
        HF.write(other_model(**fields)[0], tmp_path / "ours", Options(family=family))
    assert not list(tmp_path.iterdir())
