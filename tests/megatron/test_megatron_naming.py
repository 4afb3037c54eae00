"""What dmoe says about a field of its config is told about the flag that set it."""

from __future__ import annotations

import re
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")

from dmoe.integrations.megatron import moe_config
from dmoe.integrations.megatron.translate import FLAGS
from dmoe.integrations.naming import by_flags
from dmoe.parallel.overlap import chunk_of

MEGATRON = "dmoe.integrations.megatron: "


def _transformer_config():
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "num_moe_experts": 8}
    return TransformerConfig(**sizes, moe_ffn_hidden_size=8, moe_token_dispatcher_type="alltoall")


@pytest.mark.parametrize(
    ("fields", "options", "told"),
    [
        ({}, {"overlap_degree": 0}, "--moe-dmoe-overlap-degree (overlap_degree): expected at least 1, got 0"),
        ({"moe_router_topk": 9}, {}, "--moe-router-topk (top_k): expected at most --num-experts = 8, got 9"),
        (
            {},
            {"backend": "block_sparse"},
            "--moe-ffn-hidden-size (ffn_hidden_size): expected multiples of 16 with --moe-dmoe-backend='block_sparse', "
            "got 8",
        ),
        (
            {"overlap_moe_expert_parallel_comm": True},
            {},
            "--overlap-moe-expert-parallel-comm (overlap_moe_expert_parallel_comm=True): it works on the insides of "
            "Megatron's own MoE layer, which is not there; use --moe-dmoe-overlap-degree instead",
        ),
    ],
    ids=["option", "megatron", "both", "refusal"],
)
def test_fields_are_named_by_their_flags(fields, options, told):
    config = _transformer_config()
    for name, value in fields.items():  # past Megatron's own checks
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"^{re.escape(MEGATRON + told)}$"):
        moe_config(config, options)


def test_what_is_found_when_ranks_share_experts_is_named_too():
    told = "--moe-dmoe-overlap-degree (overlap_degree): expected a divisor of the 4 experts of each rank, got 3"
    with pytest.raises(ValueError, match=f"^{re.escape(MEGATRON + told)}$"), by_flags(FLAGS, MEGATRON):
        chunk_of(4, 3, 0)


def test_other_errors_are_left_alone():
    with pytest.raises(KeyError), by_flags(FLAGS, MEGATRON):
        raise KeyError("overlap_degree: expected")
    with pytest.raises(ValueError, match=r"^x: expected two dimensions, got one of top_k$"), by_flags(FLAGS, MEGATRON):
        raise ValueError("x: expected two dimensions, got one of top_k")
