"""What :mod:`kernel_table` compiles: by name, calls of the operations' CUDA functions on ``meta`` tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import kernel_cases_quantized
import torch

from dmoe.ops.router_logits import router_logits_backward_cuda, router_logits_cuda
from dmoe.ops.router_top_k import TopKRule, router_top_k_backward_cuda, router_top_k_cuda
from dmoe.ops.tile_table import tile_table_cuda

CASES: dict[str, Callable[[], None]] = {}


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a case."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES, name
        CASES[name] = run
        return run

    return register


@case("tile_table")
def _() -> None:
    tile_table_cuda(torch.empty(129, dtype=torch.int32, device="meta"), 65536, 128)
    tile_table_cuda(torch.empty(1501, dtype=torch.int32, device="meta"), 65536, 16)


# The expert MLP. Sizes are a small model's; the compiler sees them as constants, and what it makes of the kernels
# depends on them only in whether they divide the tiles.
def expert_mlp(
    *,
    tokens=4096,
    hidden=1024,
    ffn=768,
    experts=16,
    top_k=4,
    dtype=torch.bfloat16,
    gated=True,
    activation="silu",
    bias=False,
    gate_weight_on="output",
    dropout=0.0,
    residual=False,
    main_grad=False,
    backward=True,
    weights="plain",
):
    """Forward and backward of the expert MLP on shapes alone; ``weights`` is how they lie, of MegaBlocks, say."""
    from dmoe.ops.moe_mlp_cuda import moe_mlp_backward_cuda, moe_mlp_cuda

    def tensor(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    rows, halves = tokens * top_k, (2,) if gated else ()

    def index(*shape):
        return tensor(*shape, of=torch.int32)

    up, down, gate = tensor(experts, *halves, ffn, hidden), tensor(experts, hidden, ffn), None
    if weights == "megablocks":
        up, gate = (tensor(experts, ffn, hidden) for _ in range(2))
        down = tensor(experts, ffn, hidden).mT
    elif weights == "transposed":
        up, down = tensor(experts, hidden, 2 * ffn).mT.unflatten(1, (2, ffn)), tensor(experts, ffn, hidden).mT
    elif weights == "interleaved":
        up = tensor(experts, 2 * ffn, hidden).unflatten(1, (ffn, 2)).transpose(1, 2)
    elif weights == "interleaved, transposed":
        up = tensor(experts, hidden, 2 * ffn).mT.unflatten(1, (ffn, 2)).transpose(1, 2)
        down = tensor(experts, ffn, hidden).mT
    up_bias = tensor(*up.shape[:-1]) if bias else None
    if bias and weights.startswith("interleaved"):
        up_bias = tensor(experts, ffn, 2).transpose(1, 2)
    arguments = [
        tensor(tokens, hidden),
        tensor(tokens, top_k, of=torch.float32),
        up,
        down,
        up_bias,
        tensor(experts, hidden) if bias else None,
        index(experts + 1),
        index(rows),
        index(rows),
        index(tokens + 1),
        index(rows),
        tensor(of=torch.int64) if dropout else None,
        [],
        activation,
        gated,
        gate_weight_on,
        dropout,
        dropout,
        tensor(tokens, hidden) if residual else None,
        None,
        None,
        0,
        tensor(*up.shape, of=torch.float32) if main_grad else None,
        tensor(*down.shape, of=torch.float32) if main_grad else None,
        gate,
    ]
    y, pre = moe_mlp_cuda(*arguments)
    if backward:
        moe_mlp_backward_cuda(tensor(*y.shape), pre, True, *arguments)


EXPERT_MLP = {
    "gated": {},
    "plain gelu": {"gated": False, "activation": "gelu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32, "tokens": 512},
    "bias": {"bias": True},
    "weighed activation": {"gate_weight_on": "activation"},
    "weighed input": {"gate_weight_on": "input"},
    "dropout": {"dropout": 0.1},
    "residual, main_grad": {"residual": True, "main_grad": True},
    "odd sizes": {"hidden": 1001, "ffn": 777},
    "narrow experts": {"ffn": 32, "hidden": 48},
    "short sums": {"hidden": 1536, "ffn": 256},
    "odd sizes inside": {"hidden": 64, "ffn": 13},
    "odd sizes outside": {"hidden": 33, "ffn": 64},
    "64 rows": {"tokens": 256},
    "32 rows": {"tokens": 128},
    "decode": {"tokens": 8},
    "gate apart, down transposed": {"weights": "megablocks"},
    "both transposed": {"weights": "transposed"},
    "relu squared": {"gated": False, "activation": "relu_squared"},
    "gated relu squared": {"activation": "relu_squared"},
    "sigmoid": {"activation": "sigmoid"},
    "DeepSeek-V4": {"activation": "clamped_swiglu(10.0,1.0,0.0)", "gate_weight_on": "activation"},
    "Inkling-2": {"activation": "softcapped_swiglu(4.0,25.0)"},
    "interleaved": {"weights": "interleaved"},
    "GPT-OSS": {"weights": "interleaved, transposed", "activation": "clamped_swiglu(7.0,1.702,1.0)", "bias": True},
    "GPT-OSS, dropout": {
        "weights": "interleaved, transposed",
        "activation": "clamped_swiglu(7.0,1.702,1.0)",
        "bias": True,
        "dropout": 0.1,
    },
    "GPT-OSS, float32, odd sizes": {
        "weights": "interleaved, transposed",
        "activation": "clamped_swiglu(7.0,1.702,1.0)",
        "bias": True,
        "dtype": torch.float32,
        "hidden": 1001,
        "ffn": 777,
        "tokens": 512,
    },
}
for _name, _options in EXPERT_MLP.items():
    case(f"expert_mlp: {_name}")(functools.partial(expert_mlp, **_options))
# ------------------------------------------------------------------------------------------------ block-sparse products


def _block_structure(blocks):
    """A structure of ``blocks`` blocks in 16 block rows and 16 block columns."""
    from dmoe.ops.topology import BlockTopology

    lengths = (blocks, blocks, 17, blocks, 17, blocks)
    return BlockTopology(*(torch.empty(length, dtype=torch.int32, device="meta") for length in lengths))


@case("block_sparse_bf16_64")
def _():
    from dmoe.ops.block_sparse import _dds, _dsd, spmm_cuda

    structure = _block_structure(64)
    dense = torch.empty(1024, 512, dtype=torch.bfloat16, device="meta")
    data = torch.empty(64, 64, 64, dtype=torch.bfloat16, device="meta")
    _dsd(spmm_cuda, data, *structure, False, dense)
    _dds(spmm_cuda, dense.t(), data, *structure, False)


def _sdd_and_dsd(dtype, block):
    from dmoe.ops.block_sparse import _dsd, _sdd, sdd_cuda, spmm_cuda

    structure = _block_structure(64)
    dense = torch.empty(16 * block, 512, dtype=dtype, device="meta")
    data = torch.empty(64, block, block, dtype=dtype, device="meta")
    _sdd(sdd_cuda, dense, dense.t(), *structure, block)
    _dsd(spmm_cuda, data, *structure, False, dense)


@case("block_sparse_fp16_32")
def _():
    _sdd_and_dsd(torch.float16, 32)


@case("block_sparse_fp32_128")
def _():
    _sdd_and_dsd(torch.float32, 128)


@case("block_sparse_bf16_128, columns that do not fill their tile")
def _():
    from dmoe.ops.block_sparse import _dsd, spmm_cuda

    structure = _block_structure(64)
    data = torch.empty(64, 128, 128, dtype=torch.bfloat16, device="meta")
    _dsd(spmm_cuda, data, *structure, False, torch.empty(16 * 128, 200, dtype=torch.bfloat16, device="meta"))


def _block_mlp(dtype, sizes, **options):
    """Forward and backward of the layer's operation."""
    from dmoe.ops import block_sparse_mlp as module

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, experts, tokens = 1024, 8, 512
    total = sum(sizes) or 512
    up = meta(2, total, hidden) if sizes else meta(experts, 2, total, hidden)
    down = meta(hidden, total) if sizes else meta(experts, hidden, total)
    bias = options.pop("bias", False)
    biases = (meta(*up.shape[:-1]), meta(experts, hidden)) if bias else (None, None)
    p = options.pop("dropout", 0.0)
    index = {"dtype": torch.int32}
    arguments = (
        meta(tokens, hidden), meta(tokens, 2, dtype=torch.float32), up, down, *biases, meta(experts + 1, **index),
        meta(tokens * 2, **index), meta(tokens * 2, **index), meta(tokens + 1, **index), meta(tokens * 2, **index),
        meta(dtype=torch.int64) if p else None, list(sizes), "silu", True, "output", p, p,
    )  # fmt: skip
    y, pre = module.block_sparse_mlp_cuda(*arguments)
    module.block_sparse_mlp_backward_cuda(torch.empty_like(y), pre, True, *arguments)


@case("block_sparse_mlp")
def _():
    _block_mlp(torch.bfloat16, ())


@case("block_sparse_mlp_widths")
def _():
    _block_mlp(torch.bfloat16, (128, 256, 512, 128, 128, 384, 128, 256), bias=True, dropout=0.1)


def _route(
    num_experts: int, rule: TopKRule, *, biased: bool = False, replayed: bool = False, losses: bool = False
) -> None:
    """Both directions of the router's tail for 4096 tokens."""
    logits, (tokens, top_k) = torch.empty(4096, num_experts, device="meta"), (4096, rule.top_k)
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
    router_top_k_cuda(
        logits,
        torch.empty(num_experts, device="meta") if biased else None,
        torch.empty(tokens, dtype=torch.bool, device="meta") if biased else None,
        indices if replayed else None,
        losses,
        losses,
        *rule,
    )
    router_top_k_backward_cuda(
        logits if losses else None,
        logits[:, 0] if losses else None,
        torch.empty(tokens, top_k, device="meta"),
        logits,
        logits if rule.score_function == "sigmoid" and losses else None,
        indices,
        rule.score_function,
        rule.normalization,
        rule.scale,
    )


@case("router_top_k, softmax, 8 of 128")
def _() -> None:
    _route(128, TopKRule(8, normalization=1.0))


@case("router_top_k, sigmoid in groups, bias, mask, losses, 8 of 256")
def _() -> None:
    rule = TopKRule(8, "sigmoid", num_groups=8, top_k_groups=4, normalization=2.0, scale=2.5)
    _route(256, rule, biased=True, losses=True)


@case("router_top_k, replayed, any norm, 3 of 1000")
def _() -> None:
    _route(1000, TopKRule(3, normalization=1.5), replayed=True, losses=True)


@case("router_top_k, 22 of 4096")
def _() -> None:
    _route(4096, TopKRule(22))


@case("router_logits, float32 weight, 128 experts")
def _() -> None:
    x, weight = torch.empty(8192, 2048, dtype=torch.bfloat16, device="meta"), torch.empty(128, 2048, device="meta")
    router_logits_cuda(x, weight, None, torch.float32, 0.0, None)
    router_logits_backward_cuda(torch.empty(8192, 128, device="meta"), x, weight, 0.0, None)


@case("router_logits, bfloat16 weight and bias, 8 experts")
def _() -> None:
    x, weight = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (8192, 8))
    router_logits_cuda(x, weight, weight[:, 0], torch.float32, 0.0, None)
    router_logits_backward_cuda(torch.empty(8192, 8, device="meta"), x, weight, 0.0, None)


@case("grouped_gemm")
def _() -> None:
    from dmoe.ops.grouped_gemm import grouped_gemm_cuda, grouped_gemm_weight_cuda

    a, b = (torch.empty(16384, width, dtype=torch.bfloat16, device="meta") for width in (1024, 512))
    offsets = torch.empty(33, dtype=torch.int32, device="meta")
    weight = torch.empty(32, 512, 1024, dtype=torch.bfloat16, device="meta")
    grouped_gemm_cuda(a, weight, offsets, True)
    grouped_gemm_cuda(b, weight, offsets, False)
    grouped_gemm_weight_cuda(b, a, offsets, 32)


def _sum(rank: int, dtype: torch.dtype = torch.bfloat16, *, inner: int = 1024, columns: int = 512) -> None:
    """A product with the low-rank one beside it, both ways, of 16384 rows and 32 experts."""
    from dmoe.ops.grouped_gemm_sum import grouped_gemm_sum_cuda

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    offsets, weight = torch.empty(33, dtype=torch.int32, device="meta"), tensor(32, columns, inner)
    thin = tensor(16384, rank)
    grouped_gemm_sum_cuda(tensor(16384, inner), weight, thin, tensor(32, columns, rank), offsets, True)
    grouped_gemm_sum_cuda(tensor(16384, columns), weight, thin, tensor(32, rank, inner), offsets, False)


for _rank in (4, 16, 256):
    case(f"grouped_gemm_sum, rank {_rank}")(functools.partial(_sum, _rank))
case("grouped_gemm_sum, float32, rank 24, odd sizes")(
    functools.partial(_sum, 24, torch.float32, inner=1001, columns=777)
)

for _name, _run in kernel_cases_quantized.CASES.items():
    case(_name)(_run)
