"""The branch's parameter names at the border: dmoe keeps a rank's experts in one tensor, checkpoints name each of them.

======================================  ==========================================
in a checkpoint                         in the module
======================================  ==========================================
``gate.wg.weight``                      ``moe.router.weight``
``experts.{i}.fc1.weight``, ``.bias``   ``moe.experts.up_proj[i]``, ``up_bias[i]``
``experts.{i}.fc2.weight``, ``.bias``   ``moe.experts.down_proj[i]``, ``down_bias[i]``
======================================  ==========================================

``i`` counts the experts of a rank. Saving makes views, no copies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dmoe.checkpoint.formats.fairseq import EXPERTS, GATE

if TYPE_CHECKING:
    from dmoe.integrations.fairseq_moe.layer import MoELayer

_GATE = (GATE, "moe.router.weight")
OF_EXPERTS = {name: f"moe.experts.{ours}" for name, ours in EXPERTS.items()}
_NEEDED = ("fc1.weight", "fc2.weight")  # there are no experts without
_EXPERT = re.compile(rf"experts\.(\d+)\.({'|'.join(map(re.escape, OF_EXPERTS))})")


def speak_as_the_branch(layer: MoELayer) -> None:
    """Make a layer's ``state_dict`` and ``load_state_dict`` use the names of the left column."""
    layer.register_state_dict_post_hook(_rename)
    layer.register_load_state_dict_pre_hook(_gather)


def _rename(layer: Any, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    theirs, ours = _GATE
    state_dict[prefix + theirs] = state_dict.pop(prefix + ours)
    stacked = {name: state_dict.pop(prefix + ours) for name, ours in OF_EXPERTS.items()}
    for expert in range(len(stacked["fc1.weight"])):
        for name, tensor in stacked.items():
            state_dict[f"{prefix}experts.{expert}.{name}"] = tensor[expert]


def _gather(
    layer: Any,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    theirs, ours = _GATE
    if prefix + theirs in state_dict:
        state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
    found: dict[str, dict[int, torch.Tensor]] = {name: {} for name in OF_EXPERTS}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        of_expert = _EXPERT.fullmatch(key[len(prefix) :])
        if of_expert:
            found[of_expert[2]][int(of_expert[1])] = state_dict.pop(key)
    here, total = len(layer.moe.experts.owned.experts), layer.flags.moe_expert_count
    for name, ours in OF_EXPERTS.items():
        tensors = found[name]
        if not tensors:
            continue  # dmoe's own names, or what load_state_dict calls missing
        if sorted(tensors) not in (list(range(here)), list(range(total))):
            errors.append(
                f"{prefix}experts: expected {total} experts, or the {here} of this rank, in the checkpoint, got "
                f"{len(tensors)}"
            )
            return
        state_dict[prefix + ours] = torch.stack([tensors[expert] for expert in range(len(tensors))])
    wrong = _of_another_layout(state_dict, prefix)
    if wrong is not None:
        errors.append(wrong)  # raised with strict=False, too


def _of_another_layout(state_dict: Mapping[str, Any], prefix: str) -> str | None:
    """A sentence, where experts have other names than these; else None.

    ``strict=False`` would skip both what is missing and those, and leave the experts as they were made. It is for those
    that are left out altogether, or in part.
    """
    missing = [name for name in _NEEDED if prefix + OF_EXPERTS[name] not in state_dict]
    others = [key[len(prefix) :] for key in state_dict if key.startswith(prefix + "experts.")]
    if not missing or not others:
        return None
    needed = ", ".join(f"experts.N.{name}" for name in _NEEDED)
    got = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    return (
        f"{prefix}experts: expected {needed}, got experts of another layout ({got}), which would not be loaded. Rename "
        "them before; N counts the experts of a rank, or all of them"
    )
