"""The names of ``grouped_gemm`` on dmoe's operations: ``gmm``, and what its fork adds."""

from dmoe.compat.grouped_gemm import backend, ops

__all__ = ["backend", "ops"]
