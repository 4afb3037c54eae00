"""What a ``model_type`` says of how a model of Hugging Face keeps its experts, as far as an adapter has to know."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dmoe.checkpoint.formats.hf_files import read_config
from dmoe.checkpoint.hub_folder import local_folder
from dmoe.lora.peft_config import PARAMETERS_AS_STORED_SINCE

# Experts stacked in published files too, so that none has a name of its own; vLLM keeps these so (is_3d_moe_weight).
STACKED = ("gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_5_moe", "qwen3_5_moe_text")
TRANSPOSED = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")  # (E, in, out), as is_transposed says
UNMARKED = ("llama4", "llama4_text")  # (E, in, out) without a word of it
ROUTERS = ("gate", "router")  # how a router's own module is called
# How files that name experts one by one call gate, up and down projections.
LEAVES = ("gate_proj", "up_proj", "down_proj")
SPELLED = {"mixtral": ("w1", "w3", "w2")}  # by model_type, where other than LEAVES
_UNGATED_LEAVES = (("wi", "wo"), ("fc1", "fc2"))
HALF_OF_LEAF = {
    **{
        leaf: half
        for leaves in (LEAVES, *SPELLED.values())
        for half, leaf in zip(("gate", "up", "down"), leaves, strict=True)
    },
    **{leaf: half for leaves in _UNGATED_LEAVES for half, leaf in zip(("up", "down"), leaves, strict=True)},
}
UNGATED = ("nemotron_h", "switch_transformers", "nllb_moe")


def factors_turned(model_type: str | None, version: tuple[int, int]) -> bool:
    """Whether a wrapper's ``A`` is for results, and ``B`` for inputs."""
    if model_type in TRANSPOSED:
        return False
    return (version < PARAMETERS_AS_STORED_SINCE) is (model_type not in UNMARKED)


def model_type_of(config: Mapping[str, Any], base: str | os.PathLike[str] | None) -> str | None:
    """``model_type`` of the model that an adapter belongs to; None where nobody says.

    Args:
        config: the adapter's, whose ``base_model_name_or_path`` is looked up here and in the hub's cache.
        base: the model's folder, or its id in the hub's cache, of which ``config.json`` is read; None for the config's.

    Raises:
        OSError, ValueError: ``base`` is not there, or has no config.
    """
    if base is None:
        named = config.get("base_model_name_or_path")
        try:
            said = read_config(local_folder(str(named))) if named else None
        except (OSError, ValueError, ImportError):
            return None
    elif (said := read_config(local_folder(base))) is None:
        raise FileNotFoundError(f"{base}: expected a model's folder, with config.json, got none")
    return None if said is None else str(said.get("model_type"))
