"""torchao's and bitsandbytes' tensors: of the packages where they are installed, else of objects with their attributes.

The stand-ins follow torchao 0.18 and bitsandbytes 0.50.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import quantized_cases as cases
import torch

from dmoe.quant import from_bitsandbytes, from_torchao

E, N, K = 3, 6, 128


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nibbles(*shape, seed=0):
    return torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def named(name, **attributes):
    """An object of a class of this name."""
    return type(name, (SimpleNamespace,), {})(**attributes)


# ------------------------------------------------------------------------------------------------------------- torchao


@pytest.mark.parametrize("form", ["stack", "list"])
def test_int8_tensors(form):
    codes, scales = (random(E, N, K) * 40).round().clamp(-128, 127).to(torch.int8), random(E, N, 1).abs().bfloat16()
    if form == "stack":
        given = named("Int8Tensor", qdata=codes, scale=scales, zero_point=None, block_size=[1, 1, K])
    else:
        given = [
            named("Int8Tensor", qdata=c, scale=s, zero_point=None, block_size=[1, K])
            for c, s in zip(codes, scales, strict=True)
        ]
    value = from_torchao(given)
    assert (value.format, value.shape, value.block) == ("int8", (E, N, K), (1, K))
    assert torch.equal(value.dequantize(), codes.float() * scales.float())
    one = named("Int8Tensor", qdata=codes[0], scale=torch.tensor([0.5]), zero_point=None, block_size=[N, K])
    assert torch.equal(from_torchao([one]).dequantize()[0], codes[0] * 0.5)
    shifted = named("Int8Tensor", qdata=codes, scale=scales, zero_point=torch.ones(E, N, 1), block_size=[1, 1, K])
    with pytest.raises(ValueError, match="Int8Tensor: expected no zero points in 8 bits"):
        from_torchao(shifted)


@pytest.mark.parametrize("group", [32, 64])
def test_unpacked_tensors_of_four_bits(group):
    codes, scales = nibbles(E, N, K).to(torch.int8) - 8, random(E, N, K // group).abs()
    zeros = (nibbles(E, N, K // group, seed=1).to(torch.int8)) - 8
    given = named(
        "IntxUnpackedToInt8Tensor",
        qdata=codes,
        scale=scales,
        zero_point=zeros,
        block_size=(1, 1, group),
        target_dtype=torch.int4,
    )
    value = from_torchao(given, gated=True)
    assert (value.format, value.shape) == ("int4", (E, 2, N // 2, K))
    spread = lambda t: t.float().repeat_interleave(group, 2)  # noqa: E731
    expected = (codes.float() - spread(zeros)) * spread(scales)
    assert torch.equal(value.dequantize().view(E, N, K), expected)


def test_int4_tensors():
    """``q * scale + zero_point`` with q from -8 to 7, of groups that are the rows of scales."""
    q, scales, shift = nibbles(E, N, K).to(torch.int8) - 8, random(E, 2, N).abs() + 0.1, random(E, 2, N, seed=1)
    packed = (q[..., ::2] & 15) | (q[..., 1::2] << 4)
    given = named("Int4Tensor", qdata=packed, scale=scales, zero_point=shift, block_size=[1, 1, 64], act_pre_scale=None)
    value = from_torchao(given)
    spread = lambda t: t.mT.repeat_interleave(64, 2)  # noqa: E731
    torch.testing.assert_close(value.dequantize(), q * spread(scales) + spread(shift), rtol=1e-5, atol=1e-5)
    given.act_pre_scale = torch.ones(K)
    with pytest.raises(ValueError, match="act_pre_scale: expected None"):
        from_torchao(given)


def nf4_of(codes, scales):
    return torch.tensor(cases.NF4)[codes.int()] * scales.repeat_interleave(64, -1)


def test_nf4_tensors():
    codes = nibbles(N, K)
    scalers = torch.randint(-128, 128, (N * 2,), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    factors = random(3, seed=2).abs() + 50
    given = named(
        "NF4Tensor",
        shape=torch.Size((N, K)),
        block_size=64,
        scaler_block_size=4,
        quantized_scalers=scalers,
        quantization_factor=factors,
        scaler_mean=torch.tensor(3.0),
        quantized_data=(codes[:, ::2] << 4 | codes[:, 1::2]).flatten(),
    )
    scales = (scalers.float().view(3, 4) / factors[:, None] + 3).view(N, 2)
    torch.testing.assert_close(from_torchao([given, given]).dequantize()[1], nf4_of(codes, scales))
    with pytest.raises(ValueError, match="NF4Tensor: expected blocks of 64"):
        from_torchao([named("NF4Tensor", shape=(N, K), block_size=32)])


def test_float8_tensors():
    codes, scales = random(2, 130, 140).to(torch.float8_e4m3fn), random(2, 2, 2).abs()
    value = from_torchao(named("Float8Tensor", qdata=codes, scale=scales, block_size=[1, 128, 128]))
    assert value.format == "fp8"
    assert torch.equal(value.dequantize(), cases.decoded(codes, scales, None, "fp8", (128, 128), torch.float32))
    one = from_torchao([named("Float8Tensor", qdata=codes[0], scale=torch.tensor(0.5), block_size=[130, 140])])
    assert torch.equal(one.dequantize()[0], codes[0].float() * 0.5)
    with pytest.raises(ValueError, match="Float8Tensor: expected a scale for each 128 by 128 numbers"):
        from_torchao(named("Float8Tensor", qdata=codes, scale=scales.view(2, 4, 1), block_size=[1, 1, 140]))


def test_other_tensors():
    for given in (random(2, 3), [], SimpleNamespace()):
        with pytest.raises(TypeError, match="from_torchao: tensors: expected one of Int8Tensor"):
            from_torchao(given)
    codes = random(2, 3, 8).to(torch.int8)
    given = named("Int8Tensor", qdata=codes, scale=random(2, 3, 1), block_size=[1, 1, 8])
    with pytest.raises(ValueError, match="gated: expected an even number of rows"):
        from_torchao(given, gated=True)
    with pytest.raises(ValueError, match="interleaved: expected False without a gate"):
        from_torchao(given, interleaved=True)
    other = named("Int8Tensor", qdata=codes[:, :2], scale=random(2, 2, 1), block_size=[1, 1, 8])
    with pytest.raises(ValueError, match="tensors: expected experts of one format and size"):
        from_torchao([given, other])


def test_torchaos_own_tensors():
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_
    from torchao.quantization.quant_api import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup  # isort: skip
    from torchao.quantization import NF4Tensor

    for config in (Int8WeightOnlyConfig(), IntxWeightOnlyConfig(torch.int4, PerGroup(32))):
        linear = torch.nn.Linear(256, 64, bias=False)
        quantize_(linear, config)
        expected = linear.weight.dequantize()
        torch.testing.assert_close(from_torchao([linear.weight.data]).dequantize()[0], expected, rtol=1e-5, atol=1e-6)
    own = NF4Tensor.from_tensor(random(64, 256), 64, 64)
    expected = own.get_original_weight()
    got = from_torchao([own]).dequantize()[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


# -------------------------------------------------------------------------------------------------------- bitsandbytes


def state_of(shape, absmax, **fields):
    fields = {"quant_type": "nf4", "blocksize": 64, "nested": False, "state2": None, "offset": None} | fields
    return SimpleNamespace(shape=torch.Size(shape), absmax=absmax, **fields)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["stack", "list"])
def test_parameters_of_four_bits(nested, form):
    codes, absmax = nibbles(E, N, K), random(E, N, 2).abs()
    packed = (codes[..., ::2] << 4 | codes[..., 1::2]).view(E, -1, 1)  # the even column in the high half

    def state(part, shape):
        flat = part.flatten()
        if not nested:
            return state_of(shape, flat)
        table = torch.linspace(-1, 1, 256)
        inner = SimpleNamespace(code=table, blocksize=4, absmax=random(-(-flat.numel() // 4), seed=2).abs())
        kept = torch.from_numpy(np.arange(flat.numel()) * 37 % 256).to(torch.uint8)
        part.copy_((table[kept.int()] * inner.absmax.repeat_interleave(4)[: flat.numel()] + 3).view_as(part))
        return state_of(shape, kept, nested=True, state2=inner, offset=torch.tensor(3.0))

    if form == "stack":
        given = torch.nn.Parameter(packed.view(-1, 1), requires_grad=False)
        given.quant_state = state(absmax, (E, N, K))
        value = from_bitsandbytes(given, gated=True, interleaved=True)
        assert value.interleaved
        assert value.shape == (E, 2, N // 2, K)
    else:
        states = [state(absmax[e], (N, K)) for e in range(E)]
        value = from_bitsandbytes(list(packed), states)
        assert value.shape == (E, N, K)
    expected = nf4_of(codes, absmax)
    got = value.dequantize()
    if form == "stack":
        expected = torch.stack([expected[:, ::2], expected[:, 1::2]], 1)
    torch.testing.assert_close(got, expected)


def test_parameters_of_eight_bits():
    codes, largest = (random(E, N, K) * 40).round().clamp(-127, 127).to(torch.int8), random(E, N).abs()
    each = []
    for e in range(E):
        parameter = torch.nn.Parameter(codes[e], requires_grad=False)
        parameter.SCB = largest[e]
        each.append(parameter)
    torch.testing.assert_close(from_bitsandbytes(each).dequantize(), codes * largest.unsqueeze(2) / 127)


def test_other_parameters():
    codes = torch.zeros(N * K // 2, 1, dtype=torch.uint8)
    for state, message in (
        (state_of((N, K), random(N * 2), quant_type="fp4"), "quant_type: expected nf4, got fp4"),
        (
            state_of((N, K), random(N), blocksize=128),
            "expected blocks of 64 in rows of a multiple of 64, got blocks of 128",
        ),
        (state_of((N, 96), random(9)), r"got blocks of 64 in a weight of shape \(6, 96\)"),
    ):
        with pytest.raises(ValueError, match=f"from_bitsandbytes: .*{message}"):
            from_bitsandbytes(codes, state)
    with pytest.raises(TypeError, match=r"expected Params4bit or Int8Params that are quantised.*got Parameter"):
        from_bitsandbytes(torch.nn.Parameter(random(2, 3)))
    with pytest.raises(ValueError, match="quant_state: expected 2, one for each tensor, got 1"):
        from_bitsandbytes([codes, codes], [state_of((N, K), random(N * 2))])


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_own_parameters(nested):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes import functional
    from bitsandbytes.nn import Params4bit

    weight = random(E, 64, 256)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=nested)
    expected = functional.dequantize_4bit(codes, state).view(E, 64, 256)
    torch.testing.assert_close(from_bitsandbytes(codes, state).dequantize(), expected, rtol=1e-5, atol=1e-6)
    each = [Params4bit(part, quant_type="nf4", compress_statistics=nested).to("cpu") for part in weight]
    expected = torch.stack([functional.dequantize_4bit(each[e].data, each[e].quant_state) for e in range(E)])
    torch.testing.assert_close(from_bitsandbytes(each).dequantize(), expected, rtol=1e-5, atol=1e-6)
