"""What ``python -m dmoe.certify`` looks at: the operations over dtypes, layouts and options, in a few sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.activations import ClampedSwiGLU, SoftcappedSwiGLU
from dmoe.ops._moe_mlp_call import Call
from dmoe.ops._trust import Subject
from dmoe.ops.weight_formats import FORMATS

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def call(
    hidden: int,
    ffn: int,
    dtype: torch.dtype,
    *,
    gated: bool = True,
    activation: str = "silu",
    bias: bool = False,
    gate_weight_on: str = "output",
    dropout: float = 0.0,
    residual: bool = False,
    main_grad: bool = False,
    layout: str = "plain",
    top_k: int = 2,
) -> Call:
    """A call of the expert MLP on shapes alone, with 6 experts."""
    experts, halves = 6, (2,) if gated else ()

    def tensor(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def index(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    up, down, gate = tensor(experts, *halves, ffn, hidden), tensor(experts, hidden, ffn), None
    if layout == "apart":
        up, gate, down = tensor(experts, ffn, hidden), tensor(experts, ffn, hidden), tensor(experts, ffn, hidden).mT
    elif layout == "interleaved":
        up = tensor(experts, hidden, 2 * ffn).mT.unflatten(1, (ffn, 2)).transpose(1, 2)
        down = tensor(experts, ffn, hidden).mT
    elif layout == "transposed":
        up = tensor(experts, hidden, 2 * ffn).mT.unflatten(1, (2, ffn)) if gated else tensor(experts, hidden, ffn).mT
        down = tensor(experts, ffn, hidden).mT
    up_bias = tensor(experts, *halves, ffn) if bias else None
    if bias and layout == "interleaved":
        up_bias = tensor(experts, ffn, 2).transpose(1, 2)
    up_buffer, down_buffer = (tensor(*weight.shape, of=torch.float32) if main_grad else None for weight in (up, down))
    return Call(
        tensor(64, hidden), tensor(64, top_k, of=torch.float32), up, down,
        up_bias, tensor(experts, hidden) if bias else None,
        index(experts + 1), index(64 * top_k), index(64 * top_k), index(65), index(64 * top_k),
        torch.tensor(0) if dropout else None, None, activation, gated, gate_weight_on, dropout, dropout,
        tensor(64, hidden) if residual else None, index(1, 2), index(experts), 128, up_buffer, down_buffer, gate,
    )  # fmt: skip


_EXPERTS: dict[str, dict[str, Any]] = {
    "gated": {},
    "plain gelu": {"gated": False, "activation": "gelu"},
    "gelu_tanh, bias": {"activation": "gelu_tanh", "bias": True},
    "relu, weighed activation": {"activation": "relu", "gate_weight_on": "activation"},
    "weighed input": {"gate_weight_on": "input", "bias": True},
    "dropout": {"dropout": 0.25},
    "residual, main_grad": {"residual": True, "main_grad": True},
    "gate apart": {"layout": "apart"},
    "transposed": {"layout": "transposed"},
    "relu_squared": {"gated": False, "activation": "relu_squared"},
    "sigmoid": {"activation": "sigmoid"},
    "GPT-OSS": {"layout": "interleaved", "activation": str(ClampedSwiGLU()), "bias": True},
    "softcapped": {"activation": str(SoftcappedSwiGLU(4.0, 25.0)), "gate_weight_on": "activation"},
}


def standard_subjects() -> dict[str, Subject]:
    """By name."""
    found = {"compiled operations": Subject("compiled", ()), **_routers()}
    for dtype in _DTYPES:
        kind = str(dtype).removeprefix("torch.")
        for size in ((256, 192), (136, 88), (64, 13), (33, 64)):
            for name, options in _EXPERTS.items():
                if size != (256, 192) and name not in ("gated", "plain gelu"):
                    continue
                for tile_rows in (128, 64, 32, 16) if (size, name) == ((256, 192), "gated") else (128,):
                    drawn = call(*size, dtype, **options)
                    label = f"{kind}, {name}, H={size[0]} F={size[1]}, {tile_rows} rows"
                    found[f"moe_mlp {label}"] = Subject("moe_mlp", tuple(drawn), (tile_rows,))
                    back = tuple(drawn._replace(residual=None))
                    found[f"moe_mlp_backward {label}"] = Subject("moe_mlp_backward", back, (tile_rows,))
        a, b = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((64, 136), (4, 40, 136)))
        offsets = torch.zeros(5, dtype=torch.int32)
        found[f"grouped_gemm {kind}"] = Subject("grouped_gemm", (a, b, offsets, True))
        found[f"grouped_gemm {kind}, transposed"] = Subject("grouped_gemm", (a, b.mT.contiguous(), offsets, False))
        thin = tuple(torch.empty(*shape, dtype=dtype, device="meta") for shape in ((64, 24), (4, 40, 24)))
        found[f"grouped_gemm_sum {kind}"] = Subject("grouped_gemm_sum", (a, b, *thin, offsets, True))
        found |= {f"{name}, {kind}": subject for name, subject in _quantized(dtype, offsets).items()}
        found[f"grouped_gemm_weight {kind}"] = Subject("grouped_gemm_weight", (a, a[:, :40].contiguous(), offsets, 4))
    return found


def _quantized(dtype: torch.dtype, offsets: Tensor) -> dict[str, Subject]:
    """Quantised weights (40, 256), and fp8."""
    found = {}
    a, a2, b2 = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((64, 256), (64, 24), (4, 40, 24)))
    for name, form in FORMATS.items():
        for zeros in (None, torch.float32) if name == "int4" else (None,):
            told = form.codes_shape((40, 256)), 256, torch.uint8 if name == "mxfp4" else torch.float32, zeros
            asked = (a, told, name, form.block(256), offsets, True, a2, b2)
            found[f"quantized_gemm {name}{'' if zeros is None else ' with zero points'}"] = Subject(
                "quantized_gemm", asked, (128, "ieee")
            )
        if form.bits == 4:
            back = (a[:, :40].contiguous(), told, name, form.block(256), offsets, False, None, None)
            found[f"quantized_gemm {name}, transposed"] = Subject("quantized_gemm", back, (128, "ieee"))
    weights, token = torch.empty(64, device="meta"), torch.zeros(64, dtype=torch.int32)
    found["fp8_quantize_rows"] = Subject("fp8_quantize_rows", (a, token, weights))
    found["fp8_quantize_blocks"] = Subject("fp8_quantize_blocks", (torch.stack([a, a]), True))
    found["fp8_gemm"] = Subject("fp8_gemm", ((136, 272), offsets, True, dtype), (128,))
    return found


def _routers() -> dict[str, Subject]:
    found = {
        f"tile_table {rows}": Subject("tile_table", (torch.zeros(4, dtype=torch.int32), 9, rows)) for rows in (16, 128)
    }
    x, wide = torch.empty(64, 256, dtype=torch.bfloat16, device="meta"), torch.empty(64, 128, device="meta")
    for experts, dtype in ((8, torch.float32), (128, torch.float32), (128, torch.bfloat16)):
        weight, grad = torch.empty(experts, 256, dtype=dtype, device="meta"), torch.empty(64, experts, device="meta")
        name = f"bfloat16, {experts} experts, weight {dtype}"
        found[f"router_logits {name}"] = Subject("router_logits", (x, weight, None, torch.float32, 0.0, None))
        found[f"router_logits_backward {name}"] = Subject("router_logits_backward", (grad, x, weight, 0.0, None))
    indices = torch.zeros(64, 8, dtype=torch.int64)
    for score in ("softmax", "sigmoid"):
        rule = (8, score, 8, 4, "top2_sum", 1.0, 2.5) if score == "sigmoid" else (8, score, 1, 1, "top2_sum", 1.0, 1.0)
        asked = (wide, wide[0] if score == "sigmoid" else None, None, None, True, True, *rule)
        found[f"router_top_k {score}"] = Subject("router_top_k", asked)
        back = (wide, wide[:, 0], wide[:, :8], wide, wide if score == "sigmoid" else None, indices, score, 1.0, 2.5)
        found[f"router_top_k_backward {score}"] = Subject("router_top_k_backward", back)
    return found
