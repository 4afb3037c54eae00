"""The processor's own limit, and how much of it a time comes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

NAMES = {"fp32": "float32", "bf16": "bfloat16"}  # of dtypes, in tables and in the operation


def multiply_add_limits(threads: int) -> dict[str, float]:
    """FLOP/s that multiplying and adding alone reaches on so many cores, by dtype; empty where nothing measures it.

    One thread's limit (``dmoe::multiply_add_limit``, in GFLOP/s; bfloat16 by the dot-product instruction of the
    processors that have one), best of three, times the threads.
    """
    measure = getattr(torch.ops.dmoe, "multiply_add_limit", None)
    if measure is None:
        return {}
    return {dtype: max(measure(name) for _ in range(3)) * 1e9 * threads for dtype, name in NAMES.items()}


def share_of_limit(flops: float, seconds: float, limit: float | None) -> str:
    """Useful FLOPs in this time over the limit, as a cell of a table."""
    return "-" if limit is None else f"{flops / seconds / limit:.2f}"


def describe_limits(env: Mapping[str, Any]) -> str:
    """A sentence or two on ``env["limits"]``, as :func:`multiply_add_limits` gives them."""
    if not env["limits"]:
        return "The processor's limit is not known: this build of dmoe has no operation `dmoe::multiply_add_limit`."
    told = ", ".join(f"{limit / 1e9:.0f} GFLOP/s in {dtype}" for dtype, limit in env["limits"].items())
    text = f"Limit of {env['threads']} thread{'s' * (env['threads'] > 1)}: {told} (multiply-adds on registers alone)."
    if "amx_bf16" in env["instructions"]:
        text += (
            " In bf16 this is too low a limit for a processor with AMX, whose tiles do more than the dot-product "
            "instruction that was measured: shares above 1 are possible there."
        )
    return text
