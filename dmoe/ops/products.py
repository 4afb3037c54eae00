"""How this processor multiplies: which kernels its large products take, and what its multiply-add units do at most.

``csrc/product_choice.cpp`` measures once, at the first product of a dtype, and keeps what it found in a file, so that
all processes of a machine compute the same bits; ``DMOE_CPU_PRODUCTS=blocked`` or ``library`` decides without.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dmoe.ops._cache_folder import cache_folder
from dmoe.ops._library import _library, compiled

DTYPES = ("float32", "bfloat16", "float16")
# Of the kernels and of how they are measured: a change of either forgets what older ones were found to be.
_VERSION = 1

_library.define("product_choice(str dtype) -> (str, float, float)")
_library.define("set_product_cache(str folder, str versions) -> ()")
_library.define("multiply_add_limit(str dtype) -> float")


class ProductChoice(NamedTuple):
    """What the large products of a dtype go through.

    Attributes:
        way: ``blocked``, dmoe's own kernels, or ``library``, what PyTorch calls.
        blocked_gflops, library_gflops: what each did in 1e9 operations a second on one thread, in small products; 0
            where ``DMOE_CPU_PRODUCTS`` decided and nobody measured.
    """

    way: str
    blocked_gflops: float
    library_gflops: float


def product_choices() -> dict[str, ProductChoice]:
    """By name of the dtype, measured now if not before; empty without ``csrc/``. float64 is always the library's."""
    if not compiled:
        return {}
    return {dtype: ProductChoice(*torch.ops.dmoe.product_choice(dtype)) for dtype in DTYPES}


def multiply_add_limit(dtype: str) -> float | None:
    """What the multiply-add units of one thread do at most, in GFLOP/s; measured in some milliseconds, not kept.

    Args:
        dtype: ``float32``, or ``bfloat16``, which is in its own instructions where the processor has AVX-512's. Units
            for matrices (AMX), which a library uses, do more.

    Returns:
        None without ``csrc/``.
    """
    return float(torch.ops.dmoe.multiply_add_limit(dtype)) if compiled else None


_folder = cache_folder() if compiled else None
if _folder is not None:
    torch.ops.dmoe.set_product_cache(str(_folder), f"torch {torch.__version__}, kernels {_VERSION}")
