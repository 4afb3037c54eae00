"""The router's linear for bfloat16 tokens, to float32 accuracy, on tensor cores.

Plain float32 products would first write x a second time, at twice the size, and then run without tensor cores. Here x
is read once as it is. A float32 number is the sum of three bfloat16 numbers, 8 bits each, and a product of two bfloat16
numbers is exact in float32. So a weight (or a gradient) in float32 is cut into three pieces that are multiplied one
after the other into the same float32 sum: nothing is rounded but that sum, as in a float32 product. A weight in
bfloat16 is its own only piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe.kernels._launch import launch, multiprocessors

_MOST_PARTS = 32  # partial sums of the weight's gradient


@triton.jit
def cut_kernel(weight, pieces, count, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """``pieces (PIECES, count)``: each takes what the ones before it left of the weight."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    rest = tl.load(weight + at, mask=real, other=0.0).to(tl.float32)
    for i in tl.static_range(PIECES):
        piece = rest.to(pieces.dtype.element_ty)
        tl.store(pieces + i * tl.cast(count, tl.int64) + at, piece, mask=real)
        rest -= piece.to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def logits_kernel(
    x,
    pieces,
    bias,
    logits,
    num_tokens,
    num_experts,
    hidden,
    BIASED: tl.constexpr,
    PIECES: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Logits (TOKENS, EXPERTS) = x @ weight.T + bias; neighbours in the grid share their tokens."""
    blocks = tl.cdiv(num_experts, EXPERTS)
    token = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(0) % blocks * EXPERTS + tl.arange(0, EXPERTS)
    row = tl.minimum(token, num_tokens - 1)
    column = tl.minimum(expert, num_experts - 1)
    piece_size = tl.cast(num_experts, tl.int64) * hidden

    total = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for start in range(0, hidden, HIDDEN):
        h = start + tl.arange(0, HIDDEN)
        inside = h < hidden
        tokens = tl.load(x + row[:, None] * hidden + h[None, :], mask=inside[None, :], other=0.0)
        at = pieces + column[None, :].to(tl.int64) * hidden + h[:, None]
        for i in tl.static_range(PIECES):
            piece = tl.load(at + i * piece_size, mask=inside[:, None], other=0.0)
            total = tl.dot(tokens, piece, total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias + column).to(tl.float32)[None, :]
    where = logits + token[:, None] * num_experts + expert[None, :]
    tl.store(where, total, mask=(token < num_tokens)[:, None] & (expert < num_experts)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def grad_x_kernel(
    grad,
    pieces,
    grad_x,
    num_tokens,
    num_experts,
    hidden,
    PIECES: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """grad_x (TOKENS, HIDDEN) = grad @ weight. The result has 8 bits: of each factor its two first pieces will do."""
    blocks = tl.cdiv(hidden, HIDDEN)
    token = (tl.program_id(0) // blocks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    h = tl.program_id(0) % blocks * HIDDEN + tl.arange(0, HIDDEN)
    row = tl.minimum(token, num_tokens - 1)
    inside = (h < hidden)[None, :]
    piece_size = tl.cast(num_experts, tl.int64) * hidden

    total = tl.zeros((TOKENS, HIDDEN), tl.float32)
    for start in range(0, num_experts, EXPERTS):
        expert = start + tl.arange(0, EXPERTS)
        real = expert < num_experts
        slope = tl.load(grad + row[:, None] * num_experts + expert[None, :], mask=real[None, :], other=0.0)
        first = slope.to(pieces.dtype.element_ty)
        second = (slope - first.to(tl.float32)).to(pieces.dtype.element_ty)
        at = pieces + expert[:, None].to(tl.int64) * hidden + h[None, :]
        piece = tl.load(at, mask=real[:, None] & inside, other=0.0)
        total = tl.dot(first, piece, total, input_precision="ieee")
        total = tl.dot(second, piece, total, input_precision="ieee")
        if PIECES > 1:
            piece = tl.load(at + piece_size, mask=real[:, None] & inside, other=0.0)
            total = tl.dot(first, piece, total, input_precision="ieee")
    where = grad_x + token[:, None] * hidden + h[None, :]
    tl.store(where, total.to(grad_x.dtype.element_ty), mask=(token < num_tokens)[:, None] & inside)


@triton.jit(do_not_specialize=["num_tokens", "share"])
def grad_weight_kernel(
    grad,
    x,
    parts,
    num_tokens,
    num_experts,
    hidden,
    share,
    PIECES: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """parts[p] (EXPERTS, HIDDEN) = grad.T @ x over the p-th ``share`` of the tokens; the caller adds the parts up."""
    blocks = tl.cdiv(hidden, HIDDEN)
    h = tl.program_id(0) % blocks * HIDDEN + tl.arange(0, HIDDEN)
    expert = tl.program_id(0) // blocks * EXPERTS + tl.arange(0, EXPERTS)
    inside, real = (h < hidden)[None, :], (expert < num_experts)[:, None]
    part = tl.program_id(1)
    begin = part * share
    end = tl.minimum(begin + share, num_tokens)

    total = tl.zeros((EXPERTS, HIDDEN), tl.float32)
    for start in range(begin, end, TOKENS):
        token = (start + tl.arange(0, TOKENS)).to(tl.int64)
        here = token < end
        rest = tl.load(grad + token[None, :] * num_experts + expert[:, None], mask=real & here[None, :], other=0.0)
        tokens = tl.load(x + token[:, None] * hidden + h[None, :], mask=here[:, None] & inside, other=0.0)
        for _ in tl.static_range(PIECES):
            piece = rest.to(x.dtype.element_ty)
            total = tl.dot(piece, tokens, total, input_precision="ieee")
            rest -= piece.to(tl.float32)
    where = parts + part.to(tl.int64) * num_experts * hidden + expert[:, None].to(tl.int64) * hidden + h[None, :]
    tl.store(where, total, mask=real & inside)


def _block(size: int, most: int) -> int:
    """Tensor cores take 16 at least."""
    return max(16, min(most, triton.next_power_of_2(size)))


def launch_cut(weight: Tensor, pieces: Tensor) -> None:
    """Cut ``weight (E, H)`` into ``pieces (P, E, H)`` whose sum it is; both contiguous."""
    count = weight.numel()
    launch(
        cut_kernel,
        (triton.cdiv(count, 1024),),
        weight,
        pieces,
        count,
        PIECES=pieces.shape[0],
        BLOCK=1024,
        num_warps=4,
        num_stages=1,
    )


def launch_logits(x: Tensor, pieces: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """Fill ``logits (T, E)`` float32 from ``x (T, H)`` and the weight's ``pieces (P, E, H)``; all contiguous."""
    (num_tokens, hidden), num_experts = x.shape, logits.shape[1]
    experts = _block(num_experts, 128)
    tokens = 128 if num_tokens > 4096 else 64  # few tokens: more programs
    launch(
        logits_kernel,
        (triton.cdiv(num_tokens, tokens) * triton.cdiv(num_experts, experts),),
        x,
        pieces,
        bias,
        logits,
        num_tokens,
        num_experts,
        hidden,
        BIASED=bias is not None,
        PIECES=pieces.shape[0],
        TOKENS=tokens,
        EXPERTS=experts,
        HIDDEN=32,
        num_warps=8 if tokens * experts > 64 * 64 else 4,
        num_stages=4,
    )


def launch_grad_x(grad: Tensor, pieces: Tensor, grad_x: Tensor) -> None:
    """Fill ``grad_x (T, H)`` from ``grad (T, E)`` float32 and the weight's ``pieces (P, E, H)``; all contiguous."""
    (num_tokens, hidden), num_experts = grad_x.shape, grad.shape[1]
    launch(
        grad_x_kernel,
        (triton.cdiv(num_tokens, 128) * triton.cdiv(hidden, 128),),
        grad,
        pieces,
        grad_x,
        num_tokens,
        num_experts,
        hidden,
        PIECES=pieces.shape[0],
        TOKENS=128,
        EXPERTS=_block(num_experts, 32),
        HIDDEN=128,
        num_warps=8,
        num_stages=3,
    )


def grad_weight_parts(num_tokens: int, hidden: int, num_experts: int, device: torch.device) -> int:
    """How many partial sums keep the device busy, 512 tokens each at least. The split does not depend on values."""
    blocks = triton.cdiv(num_experts, 128) * triton.cdiv(hidden, 128)
    wanted = triton.cdiv(2 * multiprocessors(device), blocks)
    return max(1, min(wanted, triton.cdiv(num_tokens, 512), _MOST_PARTS))


def launch_grad_weight(grad: Tensor, x: Tensor, parts: Tensor, num_pieces: int) -> None:
    """Fill ``parts (P, E, H)`` float32, partial sums over runs of tokens, from ``grad (T, E)`` and ``x (T, H)``."""
    (num_tokens, hidden), num_experts = x.shape, grad.shape[1]
    experts = _block(num_experts, 128)
    share = triton.cdiv(triton.cdiv(num_tokens, parts.shape[0]), 32) * 32
    launch(
        grad_weight_kernel,
        (triton.cdiv(num_experts, experts) * triton.cdiv(hidden, 128), parts.shape[0]),
        grad,
        x,
        parts,
        num_tokens,
        num_experts,
        hidden,
        share,
        PIECES=num_pieces,
        TOKENS=32,
        EXPERTS=experts,
        HIDDEN=128,
        num_warps=8,
        num_stages=3,
    )
