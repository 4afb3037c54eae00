"""Low-rank adapters of a model's experts (LoRA, Hu et al. 2021), computed beside the weights and never multiplied out.

::

    trained = dmoe.lora.add(model, rank=16)  # beside every expert's projections; everything else is frozen
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    ...
    torch.save(dmoe.lora.state_dict(model), "adapter.pt")  # the adapter alone

    dmoe.lora.save_peft(model, "adapter")  # the same as PEFT, vLLM and SGLang read it

``python -m dmoe.lora merge|convert`` does as much to files.

:class:`dmoe.Adapters` are the values under it, which :func:`dmoe.functional.moe_mlp` takes beside weights.
"""

from __future__ import annotations

from dmoe.lora.adapters import AdapterSet, ExpertAdapter, ExpertAdapters
from dmoe.lora.config import LoRA
from dmoe.lora.factors import LoRAFactors, ProjectionShape
from dmoe.lora.merging import merge, unmerge
from dmoe.lora.model import add, disable, enable, remove, set_active, use
from dmoe.lora.peft_model import load_peft, save_peft
from dmoe.lora.router import RouterAdapter, RouterAdapters
from dmoe.lora.states import load_state_dict, state_dict
from dmoe.lora.targets import TARGETS, adapted_modules

__all__ = [
    "TARGETS",
    "AdapterSet",
    "ExpertAdapter",
    "ExpertAdapters",
    "LoRA",
    "LoRAFactors",
    "ProjectionShape",
    "RouterAdapter",
    "RouterAdapters",
    "adapted_modules",
    "add",
    "disable",
    "enable",
    "load_peft",
    "load_state_dict",
    "merge",
    "remove",
    "save_peft",
    "set_active",
    "state_dict",
    "unmerge",
    "use",
]
