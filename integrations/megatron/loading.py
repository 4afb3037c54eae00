"""State dicts whose MoE layers lie in another layout, or have none of their experts, are refused while they load.

Megatron loads what its ``torch`` format saved strictly at first, and whatever goes wrong then once more without: names
that a layer does not know, and parameters that are missing, are skipped there, and training would go on from random
experts, after "successfully loaded". Errors that a module reports itself are raised in both cases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from dmoe.integrations.megatron.expert_layouts import LayoutName, classify


def refuse_other_layouts(
    module: nn.Module, layout: LayoutName, inside: str, needed: Callable[[], Iterable[str]]
) -> None:
    """Let a module's ``load_state_dict`` refuse experts in any layout but its own, under ``strict=False`` as well.

    Args:
        module: a MoE layer, or the experts of one.
        layout: what it can load.
        inside: the module's own name within the layer, as ``experts.``; empty for the layer itself.
        needed: names in a state dict of the module's parameters.
    """

    def check(
        module: Any, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, *found: list[str]
    ) -> None:
        layer = prefix.removesuffix(inside)
        here = _inside(state_dict, layer)
        wrong = _of_another_layout(here, layout) or _missing(here, [prefix[len(layer) :] + name for name in needed()])
        if wrong is not None and (here or inside):  # a state dict without anything of a layer may be one of adapters
            found[-1].append(_sentence(layer, wrong, layout))

    module.register_load_state_dict_pre_hook(check)


def guard_megatrons_own_layer() -> None:
    """Let Megatron's own layers, in this process, refuse experts in any layout but theirs as well, dmoe's first of all.

    ``--moe-impl megatron`` is the way back from dmoe, and would lose the experts on it without a word. Megatron has no
    place to register this for layers to come, so their class gets it.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    load = MoELayer._load_from_state_dict
    if getattr(load, "refuses_other_layouts", False):
        return

    @functools.wraps(load)
    def refusing(layer: Any, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        named = filter(None, (classify(name) for name, _ in layer.named_parameters()))
        layout = next((each[1] for each in named if each[0] == ""), None)
        if layout is not None and (wrong := _of_another_layout(_inside(state_dict, prefix), layout)):
            rest[-1].append(_sentence(prefix, wrong, layout))
        load(layer, state_dict, prefix, *rest)

    refusing.refuses_other_layouts = True  # type: ignore[attr-defined]
    MoELayer._load_from_state_dict = refusing


def _inside(state_dict: Mapping[str, Any], layer: str) -> list[str]:
    """Names in a layer, without its own."""
    return [key[len(layer) :] for key in state_dict if key.startswith(layer)]


def _sentence(layer: str, wrong: str, layout: str) -> str:
    return (
        f"dmoe.integrations.megatron: {layer.removesuffix('.') or 'the layer'}: {wrong}; convert the files of all "
        f"ranks: python -m dmoe.integrations.megatron convert --to {layout} OUT IN..."
    )


def _of_another_layout(names: list[str], layout: str) -> str | None:
    for name in names:
        named = classify(name)
        if named is not None and named[0] == "" and named[1] != layout:
            return f"expected experts in the layout {layout}, got {named[1]} ({name})"
    return None


def _missing(names: list[str], needed: list[str]) -> str | None:
    missing = [name for name in needed if name not in names]
    return f"expected {missing[0]}, got none among {len(names)} values of this layer" if missing else None
