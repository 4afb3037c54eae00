"""Names of MegaBlocks and grouped_gemm that dmoe does not offer, each with a sentence: what to use instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_FUSED = (
    "backward keeps the input and the pre-activation in every case, which is what it bought; call the experts' module"
)
_LISTS = "what layers leave is kept in rounds, not in a list; use get_, save_ and clear_load_balancing_loss"
_KERNELS = "Triton kernels with their own launches; use the operations in dmoe.compat.megablocks.ops"
_FORK = "the raw kernels of a fork; use permute and unpermute in dmoe.compat.grouped_gemm.ops, which are differentiable"

# Under the name it has behind dmoe.compat.megablocks, or behind dmoe.compat. The docs list the same sentences.
NOT_OFFERED = {
    "backend": _KERNELS,
    "benchmark_util": "it times MegaBlocks' own benchmarks; dmoe's are in benchmarks/",
    "turbo_util": "dmoe does not quantize what it saves; leave quantize_* and num_bits at -1",
    "layers.weight_parallel": "its operations went in 0.6; dMoE does the same with moe_weight_parallelism",
    "layers.glu.MemoryOptimizedGroupedGLU": _FUSED,
    "layers.glu.memory_optimized_grouped_glu": _FUSED,
    "layers.mlp.MemoryOptimizedGroupedMLP": _FUSED,
    "layers.mlp.MemoryOptimizedMLP": _FUSED,
    "layers.mlp.memory_optimized_grouped_mlp": _FUSED,
    "layers.mlp.memory_optimized_mlp": _FUSED,
    "layers.moe._LOAD_BALANCING_LOSS": _LISTS,
    "layers.router._ROUTER_LOGITS": "logits are kept in rounds; use batched_router_zloss and clear_router_zloss",
    "layers.router._save_router_logits": "routers leave their logits by themselves; call LearnedRouter's forward",
    "grouped_gemm.backend.permute": _FORK,
    "grouped_gemm.backend.unpermute": _FORK,
    "grouped_gemm.backend.unpermute_bwd": _FORK,
}


def not_offered(name: str) -> ImportError:
    """The error of a name; for modules, which raise it when they are imported."""
    return ImportError(f"{name} is not offered: {NOT_OFFERED[name]}")


def attributes_of(module: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that tells names that are not offered from those that nobody knows.

    The error is an ImportError, since of an AttributeError ``from module import name`` would keep nothing.
    """
    path = module.removeprefix("dmoe.compat.").removeprefix("megablocks.")

    def attribute(name: str) -> Any:
        if f"{path}.{name}" in NOT_OFFERED:
            raise not_offered(f"{path}.{name}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return attribute
