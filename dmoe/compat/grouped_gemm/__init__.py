"""The names of ``grouped_gemm`` on dmoe's operations: ``gmm``, and its fork's ``permute`` and ``unpermute``."""

from dmoe.compat.grouped_gemm import backend, ops

__all__ = ["backend", "ops"]
