"""Layers from files: nothing typed again, whatever their options are; and what the files say that cannot be."""

from __future__ import annotations

import json

import pytest
import torch

import dmoe
from dmoe.checkpoint import Model, Options, load_layers, read_model
from dmoe.checkpoint.__main__ import main
from dmoe.checkpoint.formats.dmoe_files import DMOE
from dmoe.checkpoint.stored import held

SIZES = {"hidden_size": 16, "ffn_hidden_size": 8, "num_experts": 16}
WAYS = ("model", "model.pt", "part{rank}.pt", "model.safetensors")


def config_of(name):
    return dmoe.presets.get(name, **SIZES)


def saved(layer, target, ranks=None):
    """A model of one such layer, and something else, in dmoe's own files."""
    tensors = {f"blocks.0.ffn.{name}": held(value) for name, value in layer.state_dict().items()}
    tensors["head.weight"] = held(torch.ones(3))
    DMOE.write(Model(tensors, {"blocks.0.ffn.": layer.config}), target, Options(ranks=ranks))
    return target


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", dmoe.presets.NAMES)
def test_a_layer_comes_back_with_its_config(tmp_path, name, way):
    torch.manual_seed(0)
    layer = dmoe.MoE(config_of(name)).eval()
    target = saved(layer, tmp_path / way, ranks=2 if "{rank}" in way else None)
    found = load_layers(target)
    assert list(found) == ["blocks.0.ffn"]
    again = found["blocks.0.ffn"]
    assert again.config == layer.config
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))
    x = torch.randn(4, 8, 16)
    ids = {"token_ids": torch.randint(100, (4, 8))} if "hash" in name else {}
    outputs = []
    for each in (layer, again):
        torch.manual_seed(1)  # some drop at random, in evaluation too
        with torch.no_grad():
            outputs.append(each(x, **ids))
    assert torch.equal(*outputs)
    loss = again.train()(x, **ids).square().sum() + dmoe.aux_loss(again)
    loss.backward()
    assert again.experts.down_proj.grad.abs().sum() > 0


def test_a_dtype_of_ones_own_leaves_the_router_alone(tmp_path):
    folder = saved(dmoe.MoE(config_of("deepseek_v3")), tmp_path / "model")
    layer = load_layers(folder, dtype=torch.bfloat16)["blocks.0.ffn"]
    assert layer.experts.down_proj.dtype == layer.shared_expert.mlp.down_proj.dtype == torch.bfloat16
    assert layer.router.weight.dtype == layer.router.selection_bias.dtype == torch.float32
    assert layer(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def told(capsys, *arguments):
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def changed(folder, **fields):
    """The folder, with other fields in its layer's config."""
    file = folder / "dmoe.json"
    content = json.loads(file.read_text())
    content["layers"]["blocks.0.ffn."] |= fields
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 8}, "num_experts: expected 16, as its tensors have it, got 8"),
        ({"gated": False}, "gated: expected True, as its tensors have it, got False"),
        ({"router": "os.system"}, "router: expected one of "),
        ({"top_k": 99}, "top_k: expected "),
        ({"nothing": 1}, "expected fields of MoEConfig, got nothing"),
    ],
)
def test_a_config_that_is_not_the_tensors(tmp_path, capsys, fields, message):
    folder = saved(dmoe.MoE(config_of("mixtral")), tmp_path / "model")
    changed(folder, **fields)
    assert message in told(capsys, "inspect", folder)


def test_other_formats_and_layers_that_are_not_there(tmp_path, capsys):
    folder = saved(dmoe.MoE(config_of("mixtral")), tmp_path / "model")
    file = folder / "dmoe.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"format": "dmoe checkpoint 9"}))
    assert f"{file}: expected the format 'dmoe checkpoint 1', got 'dmoe checkpoint 9'" in told(
        capsys, "inspect", folder
    )
    file.write_text(json.dumps(content | {"layers": {"blocks.1.ffn.": content["layers"]["blocks.0.ffn."]}}))
    assert "expected tensors of the layer blocks.1.ffn, got none" in told(capsys, "inspect", folder)
    file.write_text("{")
    assert f"{file}: expected a JSON object" in told(capsys, "inspect", folder)
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_layers(folder)


def test_what_the_user_says_and_the_tensors_do_not_have(tmp_path):
    torch.save(dmoe.MoE(config_of("mixtral")).state_dict(), tmp_path / "layer.pt")
    assert load_layers(tmp_path / "layer.pt", top_k=3)[""].config.top_k == 3
    with pytest.raises(ValueError, match="the layer: num_experts: expected 16, which its tensors have, got 8"):
        load_layers(tmp_path / "layer.pt", num_experts=8)
    with pytest.raises(ValueError, match="the layer: MoEConfig: top_k: expected "):
        load_layers(tmp_path / "layer.pt", top_k=99)
    model = read_model(tmp_path / "layer.pt")
    model.tensors["experts.more"] = held(torch.ones(1))
    with pytest.raises(ValueError, match="expected none, got"):
        dmoe.checkpoint.build_layer(model, "")


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "gmoe"])
def test_a_config_that_stands_beside_a_state_dict(tmp_path, name):
    layer = dmoe.MoE(config_of(name)).eval()
    torch.save({"model": layer.state_dict(), "config": layer.config}, tmp_path / "file.pt")
    dmoe.checkpoint.convert(tmp_path / "file.pt", tmp_path / "folder", "dmoe")
    dmoe.checkpoint.convert(tmp_path / "folder", tmp_path / "again.pt", "dmoe")
    found = load_layers(tmp_path / "again.pt")[""]
    assert found.config == load_layers(tmp_path / "file.pt")[""].config == layer.config
    x = torch.randn(5, 16)
    assert torch.equal(found(x), layer(x))
