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
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dmoe.integrations.fairseq_moe.layer import MoELayer

_GATE = ("gate.wg.weight", "moe.router.weight")
OF_EXPERTS = {
    "fc1.weight": "moe.experts.up_proj",
    "fc1.bias": "moe.experts.up_bias",
    "fc2.weight": "moe.experts.down_proj",
    "fc2.bias": "moe.experts.down_bias",
}
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
