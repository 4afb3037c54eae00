"""The larger and the smaller of two lengths that may be symbolic, while a compiler or an exporter traces."""

from __future__ import annotations

import torch

# Outside of the compiler max and min would ask a symbol which is larger, and tie the program to the answer; inside it
# they do not, while PyTorch 2.11's cannot trace these two on numbers that it knows.


def larger(a: int, b: int) -> int:
    """The larger of two lengths."""
    return max(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_max(a, b)


def smaller(a: int, b: int) -> int:
    """The smaller of two lengths."""
    return min(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_min(a, b)
