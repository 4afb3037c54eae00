"""Tiny models of every family that Transformers routes through its experts interface, made from its own configs.

A config's fields are told by their names: widths, counts of layers, heads and experts become small, everything else
stays what the release has. The first model class that then builds, runs on token ids and holds experts stands for its
family.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import warnings
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from dmoe.integrations.transformers.versions import on_interface

HIDDEN, EXPERTS, VOCAB = 32, 4, 96
# Field -> small value: the first pattern that matches the whole name.
_SMALL = [
    (r"vocab_size|unpadded_vocab_size|mel_vocab_size|codebook_size|vocab_size_per_layer_input", VOCAB),
    (r"ngram_vocab_size_base", 64),
    (r"make_ngram_vocab_size_divisible_by|split_ngram_parts", 1),
    (r"(im|tts|codec|audio|video|image|vision|system|user|assistant|bo\w|eo\w|pad|sep)\w*_(id|index)", 1),
    (r"hidden_size|d_model|out_hidden_size|text_hidden_size|thinker_hidden_size|output_dim|moe_hidden_size", HIDDEN),
    (r"\w*intermediate_size|\w*ffn_dim|\w*ffn_hidden_size|mlp_dim", 24),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts", 2),
    (r"(moe_)?(n|num)_shared_experts", 1),
    (r"n_group|num_expert_group|topk_group|n_groups|mamba_n_groups|o_groups", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_hidden_layers|n_layers|depth|encoder_layers", 2),
    (r"(\w*_)?num_attention_heads|num_heads|encoder_attention_heads|index_n_heads|linear_num_(value_)?heads", 4),
    (r"(\w*_)?num_key_value_heads|linear_num_key_heads", 4),
    (r"qk_head_dim", 16),
    (r"(\w*_)?head_dim|qk_(nope|rope)_head_dim|v_head_dim|rotary_dim|mamba_d_head|linear_(key|value)_head_dim", 8),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|router_hidden_size|gated_norm_rank|loop_gate_rank|hc_lowrank", 16),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_state|ssm_state_size|mamba_dt_rank|d_rel|rel_extent", 8),
    (r"ple_embed_dim|hidden_size_per_layer_input|embedding_size", 16),
    (r"max_position_embeddings|model_max_length|canvas_length", 64),
    (r"sliding_window|sliding_window_size|chunk_size|mamba_chunk_size|block_size", 16),
    (r"index_kpool", 4),
    (r"index_topk|index_topk_blocks|index_block_size", 8),
    (r"num_kv_shared_layers|num_nextn_predict_layers", 0),
]
# Some releases leave these to be None, whose meaning is none that runs.
_NEVER_NONE = (
    r"head_dim|\w*num_experts|n_(routed|shared)_experts|num_experts_per_tok|top_k_experts|moe_intermediate_size"
)
# Of two layers the second has experts, whatever else the family does.
_LISTS = {"mlp_layer_types": ["dense", "sparse"], "mlp_only_layers": [0]}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
_DBRX = {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 24}
# What a family demands besides.
_OF_FAMILY = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "n_heads": 4,
        "ffn_config": _DBRX,
    },
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {"layer_types": ["sliding_attention", "full_attention"]},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [16, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
    "hy_v4_vl": {"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"rope_parameters": {**_MROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}},
    "step3p7": {"sliding_window": 16, "swiglu_limits": [None, 0.5]},
    "zaya": {"num_experts_per_tok": 1},
}


MODELS = Path(transformers.__file__).parent / "models"


@functools.cache
def families() -> tuple[str, ...]:
    """Names of the model packages whose modeling file uses the interface, sorted."""
    files = MODELS.glob("*/modeling_*.py")
    return tuple(sorted(f.parent.name for f in files if "@use_experts_implementation" in f.read_text()))


def shrunk(kind, **given):
    """Arguments of a config class: small values for all fields that are known by their names, ``given`` over them."""
    small = {}
    for name, value in vars(kind()).items():
        part = getattr(kind, "sub_configs", {}).get(name)
        if part is not None and value is not None:
            small[name] = shrunk(type(value), **{k: v for k, v in given.items() if k in vars(value)})
        elif name in _LISTS and value is not None:
            small[name] = _LISTS[name]
        elif (type(value) in (int, float) and value) or (value is None and re.fullmatch(_NEVER_NONE, name)):
            small |= dict([(name, size) for pattern, size in _SMALL if re.fullmatch(pattern, name)][:1])
    return small | {name: value for name, value in given.items() if name in vars(kind())}


def _model_classes(family):
    """Models of a family that may take token ids, those of text first."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, PreTrainedModel) and kind.__module__ == module.__name__
    ]
    order = ("ForCausalLM", "TextModel", "ForTokenClassification", "Model", "ForConditionalGeneration")
    return sorted(found, key=lambda kind: next((i for i, end in enumerate(order) if kind.__name__.endswith(end)), 9))


def tiny_model(family, holds=None, **given):
    """A model of a family with random weights, float32, in eval mode, its experts computed by "eager".

    Every parameter is drawn anew, with a spread at which no gate saturates and no output vanishes. ``holds`` says of a
    model whether it has what is looked for: modules behind the interface, unless said otherwise.
    """
    problems, given = [], {**_OF_FAMILY.get(family, {}), **given}
    for kind in _model_classes(family):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                model = kind(kind.config_class(**shrunk(kind.config_class, **given))).eval()
            if not (holds or experts_of)(model):
                problems.append(f"{kind.__name__}: no experts")
                continue
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.7 * parameter.shape[-1] ** -0.5)
            set_implementation(model, "eager")
            run(model)
            return model
        except Exception as error:
            problems.append(f"{kind.__name__}: {type(error).__name__}: {str(error)[:200]}")
    raise AssertionError(f"{family}: no model: " + "; ".join(problems))


def experts_of(model):
    """The modules behind the interface, by name."""
    return {name: module for name, module in model.named_modules() if on_interface(module)}


def set_implementation(model, name):
    """On the configs of the experts themselves: parts of some models cannot be switched on their own."""
    for module in experts_of(model).values():
        module.config._experts_implementation = {"": name}


def token_ids(tokens=12, seed=0):
    return torch.randint(2, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(seed))


def run(model, ids=None):
    """Logits, or hidden states of models without a head, ``(2, tokens, ...)``."""
    ids = token_ids() if ids is None else ids
    return model(input_ids=ids, use_cache=False)[0]
