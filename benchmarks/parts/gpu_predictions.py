"""What dmoe's kernels were expected to do on an H200 before one was at hand, so that a first run can be held to it.

The figures are estimates from the machine code that Triton 3.6.0 made for sm_90 (registers, pipeline depth, bytes of
shared memory that an instruction wants, instructions of an epilogue), read in November 2026; none was measured.
Balanced experts, bfloat16, SiLU-gated. Write what was measured beside them when it is known, and say why it differs.
"""

from __future__ import annotations

from parts.gpu_shapes import H200, Shape

Dims = tuple[int, int, int, int, int]
BIG, SMALL = (32768, 4096, 1024, 64, 4), (24576, 1536, 256, 128, 8)  # 30B and 7B of gpu_shapes.MODELS
# TFLOP/s of a kernel, by T, H, F, E, K.
TERAFLOPS: dict[str, dict[Dims, float]] = {
    "up": {BIG: 575, SMALL: 490},
    "down": {BIG: 545, SMALL: 335},
    "hidden_grad": {BIG: 510, SMALL: 395},
    "row_grad": {BIG: 600, SMALL: 440},
    "weight_grad of down": {BIG: 520, SMALL: 500},
    "weight_grad of up": {BIG: 520, SMALL: 500},
}
COMBINE = 0.8 * H200.bytes  # bytes/s
SECONDS = {"plan": 15e-6, "router logits": 0.125e-3}  # of any size: a launch with two barriers; 0.1 to 0.15 ms


def products(shape: Shape) -> dict[str, int]:
    """FLOPs of each kernel that multiplies."""
    one = 2 * shape.rows * shape.hidden * shape.ffn
    return {
        "up": 2 * one,
        "down": one,
        "hidden_grad": one,
        "row_grad": 2 * one,
        "weight_grad of down": one,
        "weight_grad of up": 2 * one,
    }


def combined_bytes(shape: Shape) -> int:
    """What a sum over each token's rows reads and writes."""
    return 2 * shape.hidden * (shape.rows + shape.tokens)


def predicted_seconds(kernel: str, shape: Shape) -> float | None:
    """What was expected of a kernel, by the name that :func:`parts.gpu_kernels.role` gives it; None where nothing."""
    if kernel.startswith("combine"):
        return combined_bytes(shape) / COMBINE
    if kernel in SECONDS:
        return SECONDS[kernel]
    rate = TERAFLOPS.get(kernel, {}).get(shape.dims)
    return None if rate is None else products(shape)[kernel] / rate / 1e12
