"""What differs between the supported releases of transformers, and nothing else: every other file is free of versions.

========  ============================================================================================================
from      what came
========  ============================================================================================================
5.7       names of implementations are no fixed list any more: anybody may register one; experts say ``is_concatenated``
5.18      ``_is_expert_parallel``, which asks for what dmoe always does: ids of ``num_experts`` take no expert
5.20      ``has_post_expert_norm``
========  ============================================================================================================
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

OLDEST = (5, 7)
INSTALL = "pip install 'transformers>=5.7'"


def check_version() -> tuple[int, int]:
    """The installed release of transformers, as ``(5, 24)``; a newer one than was tried is taken as the newest.

    Raises:
        ImportError: none is installed, or one before 5.7, where names of implementations are a fixed list.
    """
    wanted = f"dmoe.integrations.transformers: expected transformers {OLDEST[0]}.{OLDEST[1]} or newer"
    try:
        from transformers import __version__
    except ModuleNotFoundError as missing:
        if missing.name != "transformers":
            raise
        raise ImportError(f"{wanted}, found none; install it with: {INSTALL}") from missing
    release = release_of(__version__)
    if release < OLDEST:
        raise ImportError(f"{wanted}, found {__version__}; install it with: {INSTALL}")
    return release


def release_of(version: str) -> tuple[int, int]:
    """The first two numbers of a version: ``(5, 24)`` of ``5.24.0`` and of ``5.24.0.dev0``."""
    numbers = version.split(".")
    return int(numbers[0]), int(numbers[1])


class Registries(NamedTuple):
    """Where Transformers looks up what computes the experts: of weights as they are, and of fp8 weights."""

    plain: Any
    fp8: Any


def registries() -> Registries:
    """Both; importing them imports transformers."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return Registries(ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS)


class Layout(NamedTuple):
    """How an experts module keeps its weights, and what it does besides.

    Attributes:
        gated: ``gate_up_proj`` instead of ``up_proj``.
        biased: each projection has a ``*_bias``.
        transposed: ``(E, in, out)`` instead of ``(E, out, in)``.
        interleaved: columns are gate0, up0, gate1, up1 instead of all gates, then all ups.
        post_norm: ``post_expert_norm`` is applied to each expert's output.
    """

    gated: bool
    biased: bool
    transposed: bool
    interleaved: bool
    post_norm: bool


def layout_of(experts: nn.Module) -> Layout:
    """What a module says of itself, or the common case where it says nothing."""
    return Layout(
        gated=getattr(experts, "has_gate", True),
        biased=getattr(experts, "has_bias", False),
        transposed=getattr(experts, "is_transposed", False),
        interleaved=not getattr(experts, "is_concatenated", True),
        post_norm=getattr(experts, "has_post_expert_norm", False),
    )


def on_interface(module: nn.Module) -> bool:
    """Whether a module's forward is looked up by name in a registry."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated", "config"))
