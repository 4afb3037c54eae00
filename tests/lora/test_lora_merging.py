"""Adapters merged into weights: once rounded, exactly undone where a copy is kept, no large memory, clear refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from big_allocations import BigAllocations
from lora_cases import dense_parameters, randomise

import dmoe

FIELDS = {"hidden_size": 12, "ffn_hidden_size": 9, "num_experts": 6, "top_k": 2, "load_balancing_coefficient": 0.0}


def made(dtype=torch.float64, targets=("*",), **fields):
    torch.manual_seed(0)
    layer = dmoe.MoE(**FIELDS, **fields, dtype=dtype)
    trained = dmoe.lora.add(layer, rank=2, alpha=1.5, targets=targets)
    randomise(trained.values())
    return layer, torch.randn(15, 12, dtype=dtype), trained


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"gated": False, "shared_ffn_hidden_size": 4, "bias": "expert"}], ids=str)
def test_weights_have_the_product_rounded_once(dtype, fields):
    layer, x, trained = made(dtype, **fields)
    y = layer(x)
    wide = copy.deepcopy(layer).double()
    exact = dense_parameters(wide, {key: wide.get_parameter(key) for key in trained}, 0.75)
    base = {key: value.clone() for key, value in layer.named_parameters()}
    dmoe.lora.merge(layer)
    for name, value in exact.items():
        mine = layer.get_parameter(name)
        if dtype == torch.float64:
            torch.testing.assert_close(mine, value)
        else:
            # float32 sums of bfloat16 numbers, then one rounding: half a unit in the last place, and a little.
            half_ulp = torch.finfo(dtype).eps * 0.5 * value.abs() + 1e-6
            assert ((mine.double() - value).abs() <= half_ulp).all(), name
    if dtype == torch.float64:
        torch.testing.assert_close(layer(x), y)
    assert "merged=['default']" in repr(layer)
    assert all(torch.equal(layer.get_parameter(key), base[key]) for key in trained)
    before = {key: value.clone() for key, value in layer.named_parameters()}
    dmoe.lora.unmerge(layer)
    for name, value in base.items():
        ulp = torch.finfo(dtype).eps * torch.maximum(value.abs(), before[name].abs()) + 1e-12
        assert ((layer.get_parameter(name) - value).abs() <= ulp).all(), name
    torch.testing.assert_close(layer(x), y, **({} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.2}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_kept_base_comes_back_bit_by_bit(dtype):
    layer, _, trained = made(dtype)
    dmoe.lora.add(layer, rank=1, name="more")
    randomise((p for name, p in layer.named_parameters() if ".more." in name), seed=3)
    base = {key: value.clone() for key, value in layer.named_parameters()}
    dmoe.lora.merge(layer, "default", keep_base=True)
    dmoe.lora.merge(layer, ["more"])
    assert not torch.equal(layer.experts.down_proj, base["experts.down_proj"])
    dmoe.lora.unmerge(layer)
    assert all(torch.equal(value, base[key]) for key, value in layer.named_parameters())
    assert not layer.experts.lora.base
    assert len(trained) == 6


def test_copies_are_kept_of_what_each_merge_changes():
    layer, _, _ = made(torch.bfloat16, targets=("experts.up",))
    dmoe.lora.add(layer, rank=2, targets=("experts.down",), name="down")
    randomise((p for name, p in layer.named_parameters() if ".down." in name), seed=3)
    base = {key: value.clone() for key, value in layer.named_parameters()}
    for second in (True, False):
        dmoe.lora.merge(layer, "default", keep_base=True)
        dmoe.lora.merge(layer, "down", keep_base=second)
        dmoe.lora.unmerge(layer)
        for key, value in layer.named_parameters():
            if second or key != "experts.down_proj":
                assert torch.equal(value, base[key]), key
        torch.testing.assert_close(layer.experts.down_proj, base["experts.down_proj"], rtol=0.02, atol=0.02)
    dmoe.lora.add(layer, rank=1, targets=("experts.up",), name="more")
    dmoe.lora.merge(layer, "default")
    with pytest.raises(ValueError, match=r"keep_base: experts: expected weights without adapters .*gate_up_proj"):
        dmoe.lora.merge(layer, "more", keep_base=True)
    with pytest.raises(ValueError, match=r"expected each adapter once, got \['more', 'more'\]"):
        dmoe.lora.merge(layer, ["more", "more"])


def test_what_is_loaded_over_merged_weights_is_refused():
    layer, _, _ = made()
    state = copy.deepcopy(layer.state_dict())
    dmoe.lora.merge(layer)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"experts.lora: expected adapters beside the weights, got .*unmerge"):
            layer.load_state_dict(state, strict=strict)


def test_removing_another_leaves_the_kept_copy():
    layer, _, _ = made(torch.bfloat16)
    dmoe.lora.add(layer, rank=1, name="more")
    base = {key: value.clone() for key, value in layer.named_parameters() if ".more." not in key}
    dmoe.lora.merge(layer, "default", keep_base=True)
    dmoe.lora.remove(layer, "more")
    dmoe.lora.unmerge(layer)
    assert all(torch.equal(value, base[key]) for key, value in layer.named_parameters())


def test_no_product_of_all_experts_is_made():
    layer, _, _ = made(targets=("experts",))
    one = layer.experts.down_proj[0].numel() * 8
    with BigAllocations(2 * one + 1, *layer.parameters()) as big:  # gate and up of one expert
        dmoe.lora.merge(layer)
        dmoe.lora.unmerge(layer)
    assert big.found == []
    with BigAllocations(2 * one, *layer.parameters()) as big:
        dmoe.lora.merge(layer)
    assert big.found  # so it would have been seen


def test_a_merged_adapter_is_out_of_the_way_and_stays_when_it_is_removed():
    layer, x, trained = made()
    y = layer(x)
    dmoe.lora.merge(layer)
    assert layer.experts.lora.value() == (None, None)
    layer(x.requires_grad_()).sum().backward()
    assert all(p.grad is None for p in trained.values())
    dmoe.lora.remove(layer)
    assert [name for name, _ in layer.named_parameters() if "lora" in name] == []
    torch.testing.assert_close(layer(x), y)


def test_what_cannot_be_merged_is_said_and_changes_nothing():
    layer, x, _ = made()
    with pytest.raises(ValueError, match=r"dmoe\.lora\.merge: expected names of .*\['default'\], got \['french'\]"):
        dmoe.lora.merge(layer, ["default", "french"])
    y = layer(x)
    dmoe.lora.merge(layer)
    merged = {key: value.clone() for key, value in layer.named_parameters()}
    with pytest.raises(ValueError, match=r"merge: router: expected adapters that are not merged, got \['default'\]"):
        dmoe.lora.merge(layer)
    with pytest.raises(ValueError, match=r"dmoe\.lora\.disable: router: .* \['default'\] merged .*unmerge\(model\) f"):
        dmoe.lora.disable(layer)
    with pytest.raises(ValueError, match=r"dmoe\.lora\.use: router: .*got \['default'\] merged"):
        dmoe.lora.use(layer, torch.zeros(15, dtype=torch.int64)).__enter__()
    with pytest.raises(ValueError, match=r"load_state_dict: router: .*'default', which is merged .*unmerge\(model\) f"):
        dmoe.lora.load_state_dict(layer, dmoe.lora.state_dict(layer))
    assert all(torch.equal(value, merged[key]) for key, value in layer.named_parameters())
    torch.testing.assert_close(layer(x), y)
    dmoe.lora.add(layer, rank=1, name="more")  # over a base with the first in it
    torch.testing.assert_close(layer(x), y)
    plain = dmoe.MoE(**FIELDS)
    with pytest.raises(ValueError, match=r"dmoe\.lora\.merge: expected at least one adapter of \[\], got none"):
        dmoe.lora.merge(plain)


def test_codes_take_no_sum():
    layer, x, _ = made(torch.float32, targets=("experts",))
    dmoe.quant.quantize(layer, "int8")
    before = layer(x)
    with pytest.raises(
        ValueError, match=r"experts\.gate_up_proj: .* got codes \(int8\).*dmoe\.quant\.dequantize\(model\)"
    ):
        dmoe.lora.merge(layer)
    assert torch.equal(layer(x), before)
    dmoe.quant.dequantize(layer)
    dmoe.lora.merge(layer)
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_adapters_stand_beside_codes(dtype):
    torch.manual_seed(0)
    layer, x = dmoe.MoE(**FIELDS, dtype=torch.bfloat16), torch.randn(15, 12, dtype=torch.bfloat16)
    dmoe.quant.quantize(layer, "int8")
    trained = dmoe.lora.add(layer, rank=2, dtype=dtype)
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}  # unless given, the router's
    randomise(trained.values())
    y = layer(x)
    y.float().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in trained.values())
    dmoe.quant.dequantize(layer)
    torch.testing.assert_close(layer(x), y, rtol=0.05, atol=0.2)
