"""Codes survive copies, files, casts and moves, and are refused where they do not fit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from dmoe import MoE
from dmoe.ops.weight_formats import FORMATS
from dmoe.quant import quantize

SIZES = {"hidden_size": 128, "ffn_hidden_size": 64, "num_experts": 4, "top_k": 2, "load_balancing_coefficient": 0.0}


def quantized(format="nf4", seed=0, **options):
    torch.manual_seed(seed)
    layer = MoE(**SIZES, **options)
    quantize(layer, format, zero_points=format == "int4")
    return layer


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def by_torch_save(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_dict(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = quantized(_format_of(layer), seed=1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def by_assigning_to_meta(layer):
    fresh = MoE(**SIZES, device="meta")
    format = _format_of(layer)
    quantize(fresh, format, zero_points=format == "int4")
    fresh.load_state_dict(layer.state_dict(), assign=True)
    return fresh


def by_to_empty(layer):
    fresh = MoE(**SIZES, device="meta")
    format = _format_of(layer)
    quantize(fresh, format, zero_points=format == "int4")
    fresh.to_empty(device="cpu").load_state_dict(layer.state_dict())
    return fresh


def _format_of(layer):
    return layer.experts.down_proj.format_name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), by_torch_save, by_state_dict,
     by_assigning_to_meta, by_to_empty],
    ids=["deepcopy", "pickle", "torch.save", "state dict", "assign to meta", "to_empty"],
)  # fmt: skip
def test_copies_and_files(format, way):
    layer = quantized(format)
    twin, x = way(layer), torch.randn(6, 128)
    assert torch.equal(twin(x), layer(x))
    ours, theirs = layer.state_dict(), twin.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in ours)
    twin.experts.down_proj.scales.zero_()
    assert not torch.equal(twin(x), layer(x)) or way is by_assigning_to_meta  # memory of its own


def test_names():
    experts = [name for name in quantized("int4").state_dict() if name.startswith("experts")]
    parts = ("codes", "scales", "zeros", "format")
    assert experts == [f"experts.{field}.{part}" for field in ("gate_up_proj", "down_proj") for part in parts]
    assert not list(quantized().experts.parameters())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to", "to and back"])
def test_casts_leave_codes_and_scales_alone(format, cast):
    layer = quantized(format)
    before = {name: tensor.clone() for name, tensor in layer.experts.state_dict().items()}
    if cast == "to and back":
        layer.to(torch.float16).to(torch.float32)
    elif cast == "to":
        layer.to("cpu", torch.bfloat16)
    else:
        getattr(layer, cast)()
    assert all(same(tensor, before[name]) for name, tensor in layer.experts.state_dict().items())
    dtype = layer.router.weight.dtype
    assert layer(torch.randn(3, 128, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("format", FORMATS)
def test_moves(format):
    layer = quantized(format)
    kinds = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    there = copy.deepcopy(layer).to("meta", torch.bfloat16)
    assert all(tensor.is_meta for tensor in there.state_dict().values())
    assert {n: t.dtype for n, t in there.state_dict().items() if "proj" in n} == {
        name: dtype for name, dtype in kinds.items() if "proj" in name
    }


def test_printing_says_the_format():
    assert "QuantizedProjection(nf4 1x64, shape=(4, 2, 64, 128), 4.25 bits a weight)" in str(quantized())
    assert "int4 1x64, shape=(4, 128, 64), with zero points, 4.5 bits a weight" in str(quantized("int4"))


def test_states_that_do_not_fit():
    layer, plain = quantized("nf4"), MoE(**SIZES)
    for strict in (True, False):
        with pytest.raises(
            RuntimeError, match=r"experts: expected codes .*got weights .*: load them before dmoe.quant"
        ):
            layer.load_state_dict(plain.state_dict(), strict=strict)
        with pytest.raises(RuntimeError, match=r"experts: expected weights .*got codes: call dmoe.quant.quantize"):
            plain.load_state_dict(layer.state_dict(), strict=strict)
        symmetric = MoE(**SIZES)
        quantize(symmetric, "int4")
        with pytest.raises(RuntimeError, match=r"experts.gate_up_proj: expected codes of int4 1x64, got nf4 1x64"):
            symmetric.load_state_dict(layer.state_dict(), strict=strict)
        with pytest.raises(RuntimeError, match=r"codes: expected torch.int8 for int8 1x128, got torch.uint8"):
            quantized("int8").load_state_dict(layer.state_dict(), strict=strict)
    without = {name: tensor for name, tensor in layer.state_dict().items() if not name.endswith("format")}
    x, fresh = torch.randn(4, 128), quantized("nf4", seed=1)
    fresh.load_state_dict(without)
    assert torch.equal(fresh(x), layer(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.down_proj.scales"):
        fresh.load_state_dict({name: t for name, t in without.items() if name != "experts.down_proj.scales"})


def test_compiled_and_checkpointed():
    layer, x = quantized(), torch.randn(5, 128, requires_grad=True)
    plain = layer(x)
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plain)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(again, plain)
    again.sum().backward()
