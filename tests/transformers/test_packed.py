"""Experts that stay in their files' codes: GPT-OSS's MXFP4 and DeepSeek's fp8 blocks, alone and with adapters."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import dmoe
from dmoe.integrations.transformers import fp8, load_packed, register
from dmoe.quant import from_mxfp4

IDS = torch.arange(40).view(2, 20) * 7 % 64


def packed(experts, rows, columns, low=1, high=255, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(low, high, (experts, rows, columns // 32), generator=generator)
    return blocks, scales.to(torch.uint8)


def test_every_code_under_every_scale_is_what_transformers_reads():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    blocks, scales = blocks[:, 1:255], scales[:, 1:255]  # without 2^-127 and NaN, which no file has
    expected = convert_moe_packed_tensors(blocks, scales).mT
    assert torch.equal(from_mxfp4(blocks, scales).dequantize(torch.bfloat16), expected)


def test_rows_take_turns_and_memory_is_the_files():
    blocks, scales = packed(3, 12, 64)
    value = from_mxfp4(blocks, scales, gated=True)
    assert value.shape == (3, 2, 6, 64)
    assert value.interleaved
    assert value.codes.data_ptr() == blocks.data_ptr()
    whole = from_mxfp4(blocks, scales).dequantize()
    assert torch.equal(value.dequantize(), torch.stack([whole[:, ::2], whole[:, 1::2]], 1))
    halves = from_mxfp4(blocks, scales, gated=True, interleaved=False).dequantize()
    assert torch.equal(halves, torch.stack([whole[:, :6], whole[:, 6:]], 1))


@pytest.mark.parametrize(
    ("blocks", "scales", "gated", "error", "message"),
    [
        (
            torch.zeros(1, 2, 3, 16),
            torch.zeros(1, 2, 3, dtype=torch.uint8),
            False,
            TypeError,
            "blocks: expected a uint8",
        ),
        (torch.zeros(1, 2, 3, 16, dtype=torch.uint8), None, False, TypeError, "scales: expected a uint8 tensor"),
        (*packed(1, 2, 96)[::-1], False, ValueError, r"expected blocks \(E, N, G, 16\)"),
        (*packed(1, 3, 64), True, ValueError, "expected an even number of rows"),
    ],
)
def test_other_tensors_are_refused(blocks, scales, gated, error, message):
    with pytest.raises(error, match=message):
        from_mxfp4(blocks, scales, gated=gated)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as GPT-OSS is published, and the model that Transformers makes of it without a GPU: dequantised."""
    path = tmp_path_factory.mktemp("gpt_oss")
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    files = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        torch.nn.init.normal_(parameter, std=0.2)
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = packed(4, parameter.shape[2], parameter.shape[1], 121, 125, number)
            files |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            parameter.data = convert_moe_packed_tensors(blocks, scales).float()
        else:
            files[name] = parameter.detach().bfloat16()
            parameter.data = files[name].float()
    save_file(files, path / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["GptOssForCausalLM"]
    config.save_pretrained(path)
    said = json.loads((path / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(said))
    return path, model


def test_a_published_folder_stays_packed(folder):
    path, model = folder
    ours = load_packed(path, dtype=torch.float32)
    with torch.no_grad():
        expected, found = model(IDS).logits, ours(IDS).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    held = {name: module for name, module in ours.named_modules() if isinstance(module, dmoe.quant.QuantizedProjection)}
    assert len(held) == 4
    codes = sum(module.value().nbytes for module in held.values())
    of_files = sum(
        t.nbytes for n, t in load_file(path / "model.safetensors").items() if n.endswith(("blocks", "scales"))
    )
    assert codes == of_files
    assert not any("gate_up_proj" in name and "bias" not in name for name, _ in ours.named_parameters())
    factors = dmoe.lora.add(ours, rank=4)
    torch.manual_seed(1)
    for parameter in factors.values():
        torch.nn.init.normal_(parameter, std=0.2)
    ours(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.any() for parameter in factors.values())
    with torch.no_grad():
        adapted = ours(IDS).logits
    assert (adapted - expected).abs().max() > 0.1 * expected.abs().max()
    dmoe.quant.dequantize(ours)
    with torch.no_grad():
        assert (ours(IDS).logits - adapted).abs().max() <= 1e-5 * adapted.abs().max()


def test_transformers_neither_computes_nor_saves_them(folder, tmp_path):
    path, _ = folder
    ours = load_packed(path)
    expected = ours(IDS).logits
    ours.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"GptOssExperts: expected .*codes of dmoe.quant"):
        ours(IDS)
    ours.set_experts_implementation("dmoe")
    assert torch.equal(ours(IDS).logits, expected)
    with pytest.raises(ValueError, match=r"save_pretrained: model.layers.0.mlp.experts.gate_up_proj: .*codes of dmoe"):
        ours.save_pretrained(tmp_path / "saved")


def test_in_bfloat16(folder):
    path, model = folder
    ours = load_packed(path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        difference = ours(IDS).logits.float() - model(IDS).logits
    assert difference.norm() <= 0.1 * model(IDS).logits.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("model.norm.weight"), "expected a tensor model.norm.weight, got none of that name"),
        (lambda files: files.update(other=torch.ones(1)), "expected tensors of GptOssForCausalLM, got other too"),
        (
            lambda files: files.update({"lm_head.weight": torch.ones(3, 64)}),
            r"lm_head.weight: expected shape \(64, 64\)",
        ),
        (
            lambda files: [files.pop(name) for name in list(files) if name.endswith(("_blocks", "_scales"))],
            "expected experts in MXFP4",
        ),
    ],
)
def test_damaged_folders_are_refused(folder, change, message, tmp_path):
    path, _ = folder
    files = load_file(path / "model.safetensors")
    change(files)
    save_file(files, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        load_packed(tmp_path)


E, H, F = 4, 160, 192


def fp8_experts(scales=torch.float32, block=(128, 128)):
    """Random weights in DeepSeek's blocks, of which the last are cut."""
    register()
    kind = use_experts_implementation(type("Fp8", (FP8Experts,), {}), experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    config = types.SimpleNamespace(
        hidden_size=H, num_experts=E, moe_intermediate_size=F, hidden_act="silu", _experts_implementation="dmoe"
    )
    module = kind(config, block_size=block)
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if name.endswith("scale_inv"):
            parameter.data = torch.exp2(torch.randint(-4, 1, parameter.shape).float()).to(scales)
        else:
            parameter.data = (torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5).to(torch.float8_e4m3fn)
    return module.requires_grad_(False)


def whole(module, name):
    """A weight in float32, block by block."""
    weight, scale = getattr(module, name).float(), getattr(module, f"{name}_scale_inv").float()
    for r in range(math.ceil(weight.shape[1] / 128)):
        for c in range(math.ceil(weight.shape[2] / 128)):
            weight[:, 128 * r : 128 * r + 128, 128 * c : 128 * c + 128] *= scale[:, r, c, None, None]
    return weight


def expected_of(module, x, index, gates, adapters=None):
    up, down, y = whole(module, "gate_up_proj"), whole(module, "down_proj"), torch.zeros_like(x)
    if adapters is not None:
        factors = adapters.gate_up_proj, adapters.down_proj
        up = up + 2 * factors[0].b.flatten(1, 2) @ factors[0].a
        down = down + 2 * factors[1].b @ factors[1].a
    for t in range(x.shape[0]):
        for k, e in enumerate(index[t].tolist()):
            gate, rest = (up[e] @ x[t]).chunk(2)
            y[t] = y[t] + gates[t, k] * (down[e] @ (torch.nn.functional.silu(gate) * rest))
    return y


@pytest.mark.parametrize("scales", [torch.float32, torch.float8_e8m0fnu])
@pytest.mark.parametrize("adapted", [False, True])
def test_fp8_blocks_are_decoded_inside_the_products(scales, adapted, monkeypatch):
    module = fp8_experts(scales)
    monkeypatch.setattr(fp8, "dequantised", None)  # which is not asked
    adapters = None
    if adapted:
        factors = dmoe.lora.add(torch.nn.ModuleDict({"experts": module}), rank=3, alpha=6)
        for parameter in factors.values():
            torch.nn.init.normal_(parameter, std=0.1)
        adapters = module.lora.default
    torch.manual_seed(1)
    index = torch.rand(9, E).argsort(1)[:, :2]
    x, gates = torch.randn(9, H, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    trained = [x, gates, *(adapters.parameters() if adapted else ())]
    results = []
    for compute in (module, lambda *given: expected_of(module, *given, adapters)):
        y = compute(x, index, gates)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), trained)])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_fp8_in_other_blocks_has_no_adapters():
    module = fp8_experts(block=(64, 64))
    with pytest.raises(ValueError, match=r"expected patterns of the names"):
        dmoe.lora.add(torch.nn.ModuleDict({"experts": module}), rank=3)
