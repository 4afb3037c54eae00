"""Where MegaBlocks keeps its grouped products; here they are always available."""

from __future__ import annotations

from dmoe.compat.grouped_gemm import backend, ops

__all__ = ["assert_grouped_gemm_is_available", "backend", "grouped_gemm_is_available", "ops"]


def grouped_gemm_is_available() -> bool:
    """True."""
    return True


def assert_grouped_gemm_is_available() -> None:
    """Nothing can be missing."""
