"""Sizes that ``layer_gpu.py`` measures, what others published for them, and the least time the chip allows.

Symbols: T tokens, H hidden, F expert width, E experts, K experts per token, R = T * K rows; gated SiLU experts, bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BF16 = 2  # bytes


@dataclass(frozen=True)
class Rates:
    """What a chip does at best: dense bf16 products in FLOP/s, copies in bytes/s (read plus written)."""

    flops: float
    bytes: float


# Measured on an H200 through PyTorch: an 8192^3 bf16 product, and a large copy on the device.
H200 = Rates(flops=790e12, bytes=4.3e12)


@dataclass(frozen=True)
class Kernel:
    """Work of one kernel: operations, and the bytes that it must move with every operand touched once."""

    name: str
    flops: int
    bytes: int

    def seconds(self, rates: Rates) -> float:
        """The larger of its two times."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


@dataclass(frozen=True)
class Shape:
    """One size of the experts."""

    name: str
    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    #: TFLOP/s, forward and backward, that SonicMoE's authors report on an H100 (read off a plot, within 5)
    sonic_h100: tuple[float, float] | None = None

    @property
    def dims(self) -> tuple[int, int, int, int, int]:
        """T, H, F, E, K."""
        return self.tokens, self.hidden, self.ffn, self.experts, self.top_k

    @property
    def label(self) -> str:
        """Model and dims; what ``--shapes`` looks into."""
        return f"{self.name} T={self.tokens} H={self.hidden} F={self.ffn} E={self.experts} K={self.top_k}"

    @property
    def rows(self) -> int:
        """R."""
        return self.tokens * self.top_k

    @property
    def flops(self) -> tuple[int, int]:
        """Of the products: forward 6 R H F, backward twice that."""
        forward = 6 * self.rows * self.hidden * self.ffn
        return forward, 2 * forward

    @property
    def weight_bytes(self) -> int:
        """Of all experts: gate, up and down."""
        return BF16 * 3 * self.experts * self.ffn * self.hidden

    @property
    def least_saved(self) -> int:
        """Bytes that backward needs beside x and the indices: the pre-activation."""
        return BF16 * 2 * self.rows * self.ffn


def _kernel(name: str, flops: int, elements: int) -> Kernel:
    return Kernel(name, flops, BF16 * elements)


def forward_kernels(shape: Shape) -> list[Kernel]:
    """What a good implementation launches: x is gathered inside the up projection, the activation is its epilogue."""
    T, H, F, E, _ = shape.dims
    R = shape.rows
    return [
        _kernel("up", 4 * R * F * H, T * H + 2 * E * F * H + 2 * R * F + R * F),
        _kernel("down", 2 * R * F * H, R * F + E * F * H + R * H),
        _kernel("combine", 0, R * H + T * H),
    ]


def backward_kernels(shape: Shape) -> list[Kernel]:
    """The same for backward: dy is gathered where it is used; the activation is recomputed in the first kernel."""
    T, H, F, E, _ = shape.dims
    R = shape.rows
    return [
        _kernel("down, activations", 2 * R * F * H, T * H + E * F * H + 2 * R * F + 2 * R * F + R * F),
        _kernel("down, weights", 2 * R * F * H, T * H + R * F + E * F * H),
        _kernel("up, activations", 4 * R * F * H, 2 * R * F + 2 * E * F * H + R * H),
        _kernel("up, weights", 4 * R * F * H, T * H + 2 * R * F + 2 * E * F * H),
        _kernel("combine", 0, R * H + T * H),
    ]


def floor(shape: Shape, rates: Rates) -> tuple[float, float]:
    """Seconds of forward and backward: the sum over their kernels of the larger of arithmetic and memory time."""
    passes: tuple[Callable[[Shape], list[Kernel]], ...] = (forward_kernels, backward_kernels)
    forward, backward = (sum(kernel.seconds(rates) for kernel in kernels(shape)) for kernels in passes)
    return forward, backward


def decode_floor(shape: Shape, experts_used: int, rates: Rates) -> float:
    """Seconds of an inference forward that reads ``experts_used`` experts' weights once, and x, rows and y."""
    T, H, F, _, _ = shape.dims
    elements = 3 * experts_used * F * H + 2 * T * H + 2 * shape.rows * F + 2 * shape.rows * H
    return max(shape.flops[0] / rates.flops, BF16 * elements / rates.bytes)


MODELS = (
    Shape("1.4B", 40960, 768, 256, 128, 8, (336, 364)),
    Shape("1.4B", 40960, 768, 1024, 32, 2, (405, 435)),
    Shape("7B", 24576, 1536, 256, 128, 8, (364, 405)),
    Shape("7B", 24576, 1536, 1024, 32, 2, (465, 467)),
    Shape("30B", 32768, 4096, 256, 256, 16, (428, 460)),
    Shape("30B", 32768, 4096, 1024, 64, 4, (552, 554)),
    Shape("120B", 32768, 4096, 512, 256, 16, (518, 526)),
    Shape("120B", 32768, 4096, 2048, 64, 4, (595, 586)),
    Shape("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8),
    Shape("OLMoE", 32768, 2048, 1024, 64, 8),
    Shape("Mixtral", 32768, 4096, 14336, 8, 2),
)
# When time is short, the first of these say most: small and large F, few and many experts.
ORDER = (8, 2, 5, 0, 9, 3, 6, 10, 1, 4, 7)
SKEWED = ("Qwen3-30B-A3B", "OLMoE", "Mixtral")  # these are also run with a Zipf-like load
DECODE = tuple(Shape("Qwen3-30B-A3B decode", tokens, 2048, 768, 128, 8) for tokens in (1, 8, 64, 256)) + tuple(
    Shape("Mixtral decode", tokens, 4096, 14336, 8, 2) for tokens in (1, 16, 256)
)
TINY = (Shape("tiny", 96, 64, 32, 8, 2), Shape("tiny", 40, 32, 48, 16, 4))
