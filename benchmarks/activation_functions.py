"""What does an activation cost that is a Python function, beside one that the kernels know?

    python benchmarks/activation_functions.py [--rounds 9]

Forward and backward of the experts, a new routing in each round, the contestants in turns; the least of each, in
milliseconds. The function computes silu, so that both must give the same, and nothing is printed otherwise.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from dmoe import ExpertWeights, plan_token_choice
from dmoe.functional import run_experts

TOKENS, HIDDEN, FFN, EXPERTS, TOP_K = 2048, 512, 256, 16, 4


def slow_silu(x: Tensor) -> Tensor:
    """silu to the last digits of float32, but not of float64: it is not taken for it."""
    return x * torch.sigmoid(x * (1 + 1e-8))


def measure(dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Milliseconds of each contestant."""
    x = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    up = (torch.randn(EXPERTS, 2, FFN, HIDDEN) * HIDDEN**-0.5).to(dtype).requires_grad_()
    down = (torch.randn(EXPERTS, HIDDEN, FFN) * FFN**-0.5).to(dtype).requires_grad_()
    gates, grad = torch.rand(TOKENS, TOP_K).requires_grad_(), torch.randn(TOKENS, HIDDEN).to(dtype)
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        plan = plan_token_choice(torch.rand(TOKENS, EXPERTS).argsort(-1)[:, :TOP_K].contiguous(), EXPERTS)
        results = []
        for name, activation in (("by name", "silu"), ("a function", slow_silu)):
            begin = time.perf_counter()
            y = run_experts(x, plan, gates, ExpertWeights(up, down), activation=activation)  # type: ignore[arg-type]
            grads = torch.autograd.grad(y, [x, gates, up, down], grad)
            found.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))
            results.append((y, *grads))
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
        for one, other in zip(*results, strict=True):
            if (one - other).norm() > tolerance * one.norm():
                raise SystemExit("the function and the name do not compute the same: no figures")
    return {name: min(times[1:]) for name, times in found.items()}


def main() -> None:
    """Print a line for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = max(parser.parse_args().rounds, 2)
    for dtype in (torch.bfloat16, torch.float32):
        times = measure(dtype, rounds)
        ratio = times["a function"] / times["by name"]
        print(f"{dtype}: {times['by name']:.1f} ms by name, {times['a function']:.1f} as a function: {ratio:.1f} times")


if __name__ == "__main__":
    main()
