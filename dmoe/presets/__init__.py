"""Layers as they were published, by name: :data:`NAMES` has all, :func:`table` sets them side by side.

``dmoe.MoE(dmoe.presets.mixtral())`` is one at its published size, ``dmoe.presets.mixtral(512, 1024, num_moe_layers=8)``
a small one: every preset takes its sizes, maybe options of its own, and any field of :class:`dmoe.MoEConfig`. What a
router's family is told goes by a family: ``router=dmoe.routing.TopK(second_expert="all")``. Each docstring names its
sources, and in what the layer still differs from the original. ``python -m dmoe.presets`` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dmoe.config import MoEConfig
from dmoe.presets.deepseek import deepseek_v2, deepseek_v3, deepseek_v4
from dmoe.presets.first import base_layer, expert_choice, gshard, hash_layer, switch
from dmoe.presets.language import gpt_oss, llama4, mixtral, olmoe, qwen3
from dmoe.presets.side_by_side import as_text
from dmoe.presets.systems import deepspeed, megablocks, nllb, pr_moe
from dmoe.presets.vision import gmoe, swin_moe, tutel, vmoe

_ALL: tuple[Callable[..., MoEConfig], ...] = (
    switch,
    gshard,
    base_layer,
    hash_layer,
    expert_choice,
    vmoe,
    gmoe,
    tutel,
    swin_moe,
    deepspeed,
    pr_moe,
    nllb,
    mixtral,
    olmoe,
    qwen3,
    deepseek_v2,
    deepseek_v3,
    deepseek_v4,
    gpt_oss,
    llama4,
    megablocks,
)
NAMES: dict[str, Callable[..., MoEConfig]] = {preset.__name__: preset for preset in _ALL}

__all__ = ["NAMES", "get", "table", *NAMES]


def get(name: str, **overrides: Any) -> MoEConfig:
    """The config of a preset by its name.

    Args:
        name: a key of :data:`NAMES`.
        **overrides: its own arguments, and fields of :class:`dmoe.MoEConfig`.

    Raises:
        ValueError: no such preset, or values that the config refuses.
        TypeError: overrides that are neither.
    """
    if name not in NAMES:
        raise ValueError(f"presets: expected one of {', '.join(NAMES)}, got {name!r}")
    return NAMES[name](**overrides)


def table(*names: str) -> str:
    """Presets side by side, as text of at most 120 columns; no name is all of them.

    As many as fit stand beside each other, a row for each field in which one of them differs from the default; more
    have a paragraph each.

    Raises:
        ValueError: no such preset.
    """
    return as_text({name: get(name) for name in names or NAMES})
