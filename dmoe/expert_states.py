"""What of a state dict is experts of another layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def weights_for_codes(state_dict: Mapping[str, Any], prefix: str, coded: Iterable[str]) -> str | None:
    """A sentence, where a state dict has weights of projections that the module holds as codes; else None."""
    plain = [name for name in coded if prefix + name in state_dict]
    if not plain:
        return None
    return (
        f"{prefix.removesuffix('.') or 'Experts'}: expected codes ({plain[0]}.codes, ...), got weights "
        f"({', '.join(plain)}): load them before dmoe.quant.quantize"
    )


def other_layout(state_dict: Mapping[str, Any], prefix: str, names: Iterable[str], needed: Iterable[str]) -> str | None:
    """A sentence, where a state dict has experts under other names than the module's; else None.

    ``load_state_dict(strict=False)`` would skip both what is missing and what it does not know, and leave such experts
    as they were made: training would go on from random ones. Experts that are left out altogether, or in part, are
    what ``strict=False`` is for.

    Args:
        state_dict: of any model.
        prefix: of the experts' names.
        names: of all parameters of the module.
        needed: of those without which it has no experts.
    """
    missing = [name for name in needed if prefix + name not in state_dict]
    others = [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in set(names)]
    if not missing or not others:
        return None
    if any(key.endswith("proj.codes") for key in others):
        return (
            f"{prefix.removesuffix('.') or 'Experts'}: expected weights ({', '.join(missing)}), got codes: call "
            "dmoe.quant.quantize as it was called on the model that was saved (it may be on meta), and load then"
        )
    found = ", ".join(key[len(prefix) :] for key in others[:3]) + (", ..." if len(others) > 3 else "")
    return (
        f"{prefix.removesuffix('.') or 'Experts'}: expected {', '.join(needed)}, got experts of another layout "
        f"({found}), of which none would be loaded. Bring them into these shapes and names before, as "
        "dmoe.ExpertWeights describes them"
    )
