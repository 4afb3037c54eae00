"""Runs every CUDA kernel once or twice on small awkward sizes, for a memory or race checker to watch.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python benchmarks/sanitize.py --only moe_mlp

Without that variable PyTorch hands out pieces of large blocks, and a step over the end of a tensor is inside a block.
Run it once on its own before: Triton's kernels are then compiled already, which is slow under a checker. It only asks
that results are finite; whether they are right is for the tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dmoe
from dmoe.ops.fp8 import fp8_gemm, quantize_blocks, quantize_rows
from dmoe.ops.grouped_gemm_sum import grouped_gemm_sum
from dmoe.ops.quantized_gemm import quantized_gemm
from dmoe.ops.weight_formats import FORMATS, WeightFormat, scales_shape

CASES: dict[str, Callable[[torch.device], object]] = {}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]  # --dtypes leaves some


def case(run: Callable[[torch.device], object]) -> Callable[[torch.device], object]:
    """Register a case under its function's name."""
    CASES[run.__name__] = run
    return run


def finite(*results: Tensor | None) -> None:
    """Refuse NaN and infinity; on ``meta`` there are no numbers to look at."""
    for tensor in results:
        if tensor is None or tensor.is_meta or not tensor.is_floating_point():
            continue
        if not torch.isfinite(tensor).all():
            raise RuntimeError(f"a result of shape {tuple(tensor.shape)} is not finite")


def indices(tokens: int, experts: int, top_k: int, device: torch.device) -> Tensor:
    """Distinct experts for each token; the middle one is hot, the last often empty."""
    scores = torch.rand(tokens, experts, device=device)
    scores[:, experts // 2] += 0.7
    scores[:, -1] -= 0.7
    return scores.argsort(1, descending=True)[:, :top_k]


@case
def routing(device: torch.device) -> None:
    """Plans of every layout; counting, sorting, summing."""
    ops = dmoe.ops
    for tokens, experts, top_k in ((0, 3, 2), (1, 1, 1), (37, 5, 2), (700, 127, 8), (40, 512, 4)):
        chosen = indices(tokens, experts, top_k, device)
        chosen = torch.where(torch.rand_like(chosen, dtype=torch.float32) < 0.1, experts, chosen)
        layouts: list[dict[str, Any]] = [{}, {"block_size": 16}, {"capacity": 3}, {"capacity": 4, "binned": True}]
        for layout in layouts:
            for choice_major in (False, True):
                ops.routing_plan(chosen, experts, choice_major=choice_major, **layout)
        ids = chosen.flatten()
        ops.sort(ids, 10)
        ops.histogram(ids, experts + 1)
        ops.inclusive_cumsum(ids, 0)
        ops.exclusive_cumsum(chosen, 1)
    for length in (1, 33, 4097, 70_001):
        keys = torch.randint(0, 500, (length,), device=device, dtype=torch.int32)
        ops.sort(keys, 9)
        ops.histogram(keys, 500)
        ops.inclusive_cumsum(keys, 0)
    for experts, top_k in ((1, 1), (5, 3), (33, 8), (512, 16)):
        ops.topk_indices(torch.randn(67, experts, device=device), top_k)


@case
def movement(device: torch.device) -> None:
    """permute, unpermute, replicate, topology, with their gradients."""
    ops = dmoe.ops
    for dtype in DTYPES:
        for tokens, width in ((37, 1), (37, 33), (5, 264), (0, 8)):
            chosen = indices(tokens, 6, 2, device)
            plan = dmoe.plan_token_choice(chosen, 6, block_size=4)
            x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
            gates = torch.rand(tokens, 2, device=device, requires_grad=True)
            rows = ops.permute(x, plan.row_to_token, plan.token_offsets, plan.token_rows)
            for weights in (gates, None):
                y = ops.unpermute(
                    rows, weights, plan.row_to_token, plan.row_to_slot, plan.token_offsets, plan.token_rows
                )
                finite(y, *torch.autograd.grad(y.float().square().sum(), (x,), retain_graph=True))
        bins = torch.tensor([0, 3, 3, 40], device=device, dtype=torch.int32)
        values = torch.randn(3, 4, device=device, dtype=dtype, requires_grad=True)
        spread = ops.replicate(values, bins, 45)
        finite(spread, *torch.autograd.grad(spread.float().sum(), (values,)))
    offsets = torch.tensor([0, 256, 256, 384], device=device, dtype=torch.int32)
    ops.topology(offsets, 128, 3, 5)


@case
def products(device: torch.device) -> None:
    """grouped_gemm in both orientations, and its weight gradient."""
    for dtype in DTYPES:
        for inner, columns in ((16, 32), (33, 17), (136, 40)):
            offsets = torch.tensor([0, 0, 130, 131, 195], device=device, dtype=torch.int32)
            a = torch.randn(201, inner, device=device, dtype=dtype, requires_grad=True)
            for trans_b in (True, False):
                shape = (4, columns, inner) if trans_b else (4, inner, columns)
                b = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
                out = dmoe.ops.grouped_gemm(a, b, offsets, trans_b=trans_b)
                finite(out, *torch.autograd.grad(out.float().sum(), (a, b)))


@case
def quantized(device: torch.device) -> None:
    """Products with quantised weights, both ways and with a thin one beside; rows and weights in fp8, their product."""
    offsets = torch.tensor([0, 0, 130, 131, 195], device=device, dtype=torch.int32)

    def codes_of(form: WeightFormat, rows: int, columns: int) -> Tensor:
        codes = torch.randint(0, 127, (4, rows, columns * form.bits // 8), device=device, dtype=torch.uint8)
        return codes.view(form.codes)

    for dtype in DTYPES:
        for name, form in FORMATS.items():
            for rows, columns in ((33, 128), (136, 256)) if form.bits == 4 else ((33, 17), (136, 256)):
                block = form.block(columns)
                shape = scales_shape((4, rows, columns), block)
                scales = torch.rand(shape, device=device)
                if name == "mxfp4":
                    scales = torch.randint(110, 120, shape, device=device, dtype=torch.uint8)
                zeros = scales if name == "int4" else None
                weight = codes_of(form, rows, columns), scales, zeros, name, list(block)
                a2 = torch.randn(201, 5, device=device, dtype=dtype)
                for trans_b, inner, thin in ((True, columns, (rows, 5)), (False, rows, (5, columns))):
                    a, b2 = torch.randn(201, inner, device=device), torch.randn(4, *thin, device=device)
                    finite(quantized_gemm(a.to(dtype), *weight, offsets, trans_b, a2, b2.to(dtype)))
        for inner, columns in ((16, 32), (33, 17), (272, 136)):
            a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((201, inner), (4, columns, inner)))
            factors = [torch.randn(shape, device=device, dtype=dtype) for shape in ((201, 5), (4, columns, 5))]
            finite(grouped_gemm_sum(a, b, *factors, offsets, True))
            token = torch.randint(-1, 201, (201,), device=device, dtype=torch.int32)
            codes, scales = quantize_rows(a, token, torch.rand(201, device=device))
            w_codes, w_scales, turned = quantize_blocks(b, with_transposed=True)
            finite(fp8_gemm(codes, scales, w_codes, w_scales, offsets))
            assert turned is not None
            finite(fp8_gemm(codes, scales, turned, w_scales.mT, offsets, trans_b=False))


@case
def moe_mlp(device: torch.device) -> None:
    """The expert computation, forward, backward and inference, over its options."""
    for dtype in DTYPES:
        for T, H, width, E, K in ((70, 40, 24, 5, 2), (33, 17, 13, 4, 3), (1, 64, 64, 1, 1), (0, 16, 16, 3, 1)):
            for gated, activation, bias, gate_on, dropout in (
                (True, "silu", False, "output", 0.0),
                (True, "gelu_tanh", True, "activation", 0.3),
                (False, "gelu", True, "input", 0.0),
            ):
                halves = (2,) if gated else ()

                def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                    return torch.randn(shape, device=device).div(6).to(dtype).requires_grad_()

                weights = dmoe.ExpertWeights(
                    leaf(E, *halves, width, H),
                    leaf(E, H, width),
                    leaf(E, *halves, width) if bias else None,
                    leaf(E, H) if bias else None,
                    gated=gated,
                )
                x, gates = leaf(T, H), leaf(T, K, dtype=torch.float32)
                chosen = indices(T, E, K, device)
                leaves = [x, gates, weights.up_proj, weights.down_proj, weights.up_bias, weights.down_bias]
                options: dict[str, Any] = {"activation": activation, "gate_weight_on": gate_on}
                options["activation_dropout"] = dropout
                y = dmoe.functional.moe_mlp(x, chosen, gates, weights, **options)
                finite(y, *torch.autograd.grad(y.float().square().sum(), [t for t in leaves if t is not None]))
                with torch.no_grad():
                    finite(dmoe.functional.moe_mlp(x, chosen, gates, weights, **options))


@case
def options(device: torch.device) -> None:
    """A residual, main gradients, recomputation, and block-sparse experts of different widths."""
    for dtype in DTYPES:
        weights = dmoe.ExpertWeights(
            torch.randn(3, 2, 32, 40, device=device).div(6).to(dtype).requires_grad_(),
            torch.randn(3, 40, 32, device=device).div(6).to(dtype).requires_grad_(),
        )
        x = torch.randn(53, 40, device=device).to(dtype).requires_grad_()
        gates, chosen = torch.rand(53, 2, device=device), indices(53, 3, 2, device)
        buffers = tuple(torch.zeros_like(w, dtype=torch.float32) for w in (weights.up_proj, weights.down_proj))
        for extra in ({"residual": x}, {"main_grads": buffers}, {"recompute": True}, {"backend": "block_sparse"}):
            given: dict[str, Any] = extra
            y = dmoe.functional.moe_mlp(x, chosen, gates, weights, **given)
            (grad,) = torch.autograd.grad(y.float().square().sum(), (x,))
            finite(y, grad, *buffers)
        mixed = dmoe.MoE(
            hidden_size=40,
            ffn_hidden_size=[16, 48, 32],
            num_experts=3,
            backend="block_sparse",
            device=device,
            dtype=dtype,
        )
        y = mixed(x)
        assert isinstance(y, Tensor)
        y.float().square().mean().backward()
        finite(*(parameter.grad for parameter in mixed.parameters()))


@case
def layer(device: torch.device) -> None:
    """The whole layer with its routers, losses and a shared expert."""
    for fields in (
        {},
        {"score_function": "sigmoid", "selection_bias": True, "num_groups": 2, "top_k_groups": 1},
        {"capacity_factor": 1.0, "drop_order": "gate_weight", "router_z_loss_coefficient": 0.1, "input_jitter": 0.1},
        {"router": "expert_choice", "causal": False, "shared_ffn_hidden_size": 24, "expert_dropout": 0.2},
    ):
        options: dict[str, Any] = {"hidden_size": 40, "ffn_hidden_size": 24, "num_experts": 6, "top_k": 2, **fields}
        module = dmoe.MoE(**options, device=device, dtype=torch.bfloat16)
        x = torch.randn(3, 23, 40, device=device, dtype=torch.bfloat16, requires_grad=True)
        y = module(x)
        assert isinstance(y, Tensor)
        (y.float().square().mean() + dmoe.aux_loss(module)).backward()
        finite(x.grad, *(parameter.grad for parameter in module.parameters()))
        module.update_selection_bias()


def choose_dtypes(parser: argparse.ArgumentParser, names: str) -> None:
    """Leave only these, separated by commas; all when none is named."""
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    wanted = [name for name in names.split(",") if name] or list(known)
    if not set(wanted) <= set(known):
        parser.error(f"--dtypes: expected some of {', '.join(known)}, got {names}")
    DTYPES[:] = [known[name] for name in wanted]


def main() -> int:
    """Run the cases; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"cases, separated by commas; of {', '.join(CASES)}")
    parser.add_argument("--device", default="cuda", help="cpu rehearses")
    parser.add_argument("--dtypes", default="", help="of bfloat16, float16 and float32, separated by commas; all")
    args = parser.parse_args()
    choose_dtypes(parser, args.dtypes)
    wanted = [name for name in args.only.split(",") if name] or list(CASES)
    unknown = set(wanted) - set(CASES)
    if unknown:
        parser.error(f"--only: expected some of {list(CASES)}, got {sorted(unknown)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: PyTorch {torch.__version__} finds no CUDA device")
    device, failed = torch.device(args.device), 0
    torch.manual_seed(0)
    for name in wanted:
        try:
            CASES[name](device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # an error of this case is told in its line
            print(f"{name}: ran", flush=True)
        except Exception as error:
            failed = 1
            print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
