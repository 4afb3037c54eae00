"""What :mod:`kernel_table` compiles: by name, calls of the operations' CUDA functions on ``meta`` tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

CASES: dict[str, Callable[[], None]] = {}


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Register a case."""

    def register(run: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES, name
        CASES[name] = run
        return run

    return register


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
