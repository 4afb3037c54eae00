"""The names of ``grouped_gemm`` on dmoe's grouped products: ``ops.gmm`` and ``backend.gmm``."""

from dmoe.compat.grouped_gemm import backend, ops

__all__ = ["backend", "ops"]
