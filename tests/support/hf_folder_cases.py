"""Tiny models of the families that `dmoe.checkpoint.formats.hf` knows, made by Transformers, and their blocks."""

from __future__ import annotations

import copy
import functools
import json
import warnings

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

_H, _V = 32, 96
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
_TEXT = {"hidden_size": _H, "vocab_size": _V, "num_hidden_layers": 2, "max_position_embeddings": 64, **_HEADS}
_OWN = {"intermediate_size": 20, "moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 3}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_GROUPS = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 2}
_LOCAL = {"intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 3}
_DBRX = {"moe_num_experts": 5, "moe_top_k": 3, "ffn_hidden_size": 24, "hidden_size": _H}
_NLLB = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 28, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_SEQ = {"d_model": _H, "vocab_size": _V, "decoder_layers": 2, "encoder_layers": 2, "num_experts": 4}
_T5 = {"d_model": _H, "d_ff": 24, "d_kv": 8, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
_TWO = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
# Family -> model class, and its config's fields.
CASES = {
    "mixtral": ("MixtralForCausalLM", {**_TEXT, **_LOCAL}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {**_TEXT, **_OWN, "shared_expert_intermediate_size": 28}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_TEXT, **_OWN, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "olmoe": ("OlmoeForCausalLM", {**_TEXT, "intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 3}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**_TEXT, **_LATENT, **_GROUPS, "moe_intermediate_size": 24, "num_experts_per_tok": 3},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", {**_TEXT, **_LOCAL}),
    "switch_transformers": (
        "SwitchTransformersForConditionalGeneration",
        {**_T5, **_TWO, "vocab_size": _V, "num_experts": 4, "expert_capacity": 3},
    ),
    "nllb_moe": (
        "NllbMoeForConditionalGeneration",
        {**_SEQ, **_NLLB, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "moe_eval_capacity_token_fraction": 0.25},
    ),
    "gpt_oss": ("GptOssForCausalLM", {**_TEXT, **_LOCAL, "sliding_window": 16}),
    "llama4": (
        "Llama4ForCausalLM",
        {**_TEXT, **_LOCAL, "intermediate_size_mlp": 20, "moe_layers": [0, 1], "no_rope_layers": [1, 0]},
    ),
    "dbrx": (
        "DbrxForCausalLM",
        {
            "d_model": _H,
            "vocab_size": _V,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
            "ffn_config": _DBRX,
            "attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8.0},
        },
    ),
}
# Blocks that compute their scores in float32 whatever they are given, so that no more than its precision is there.
FLOAT32_SCORES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe", "llama4")
TWO_FORMS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "granitemoe")
ENCODERS = ("switch_transformers", "nllb_moe")


def tiny(family, dtype=torch.float32, **given):
    """A model with random weights, and biases that begin at zero drawn; not to be changed: there is one of each."""
    return _tiny(family, dtype, json.dumps(given))


@functools.cache
def _tiny(family, dtype, given):
    kind, fields = CASES[family]
    kind = getattr(transformers, kind)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind(kind.config_class(**{**fields, **json.loads(given)})).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("correction_bias", "router.bias", "_proj_bias", "fc1.bias", "fc2.bias")):
            tensor.data.normal_(0, 0.3)
        elif tensor.dim() > 1:
            nn.init.normal_(tensor, std=0.7 * tensor.shape[-1] ** -0.5)
    for part in (model.config, getattr(model.config, "ffn_config", model.config)):
        part._experts_implementation = "eager"
    return model.to(dtype)


def saved(family, folder, form="files", dtype=torch.float32, **given):
    """Its folder: as Transformers saves it, or with the names that it has in memory."""
    model = tiny(family, dtype, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    if form == "memory":
        kept = {name for name, _ in load_file(folder / "model.safetensors").items()}
        tied = set(model.state_dict()) - kept if family in ENCODERS else set()
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(family, folder):
    kind = getattr(transformers, CASES[family][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_pretrained(folder).eval()


@torch.no_grad()
def logits(family, model):
    ids = torch.randint(2, _V, (2, 12), generator=torch.Generator().manual_seed(3))
    more = {"decoder_input_ids": ids.flip(1)} if family in ENCODERS else {}
    return model(input_ids=ids, use_cache=False, **more).logits


def block_of(family, model, prefix):
    """A copy in float64 of the block that a layer was read from."""
    path = prefix.removesuffix(".")
    path = path.replace("block_sparse_moe", "mlp") if family == "mixtral" else path
    block = copy.deepcopy(model.get_submodule(path)).double()
    if family in ENCODERS:  # an attribute of its own says in which dtype scores are computed
        block.router.dtype = torch.float64
    return block


@torch.no_grad()
def expected(family, block, x):
    """What a block gives.

    That of NLLB looks at its mask in a way that computes something else (5.24.0), so its router's weights are put
    together with its experts here.
    """
    if family == "nllb_moe":
        tokens = x.flatten(0, 1)
        weights = block.router(tokens)[1]
        outputs = torch.stack([block.experts[f"expert_{e}"](tokens) for e in range(block.num_experts)], 1)
        kept = 1 - block.experts.moe_token_dropout
        return ((outputs * weights.unsqueeze(-1)).sum(1) * kept).view_as(x)
    made = block(x)
    return (made[0] if isinstance(made, tuple) else made).view_as(x)


def contents(folder):
    """All tensors of a folder, whatever files they are in."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(found, wanted):
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
