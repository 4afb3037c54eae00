"""Models of make_deepspeed_ckpt.py as MoEGPT has them, and a plain loop that continues a text without a cache."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import make_deepspeed_ckpt
import torch

from dmoe import MoEConfig
from dmoe.checkpoint.model import Model
from dmoe.models import MoEGPT, MoEGPTConfig, build

FORWARD = json.loads(Path(__file__).with_name("ft_forward.json").read_text())["cases"]
ROTARY = {"positions": "rotary", "norm": "rms", "norm_eps": None, "qk_norm": True, "bias": False, "tied_head": False}
GATED = {"gated": True, "activation": "silu"}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

PROMPTS = [[3, 17, 8, 8, 21, 4, 9], [5], [11, 2, 29, 0]]  # of a small model


def options_of(make):
    return make_deepspeed_ckpt.parser().parse_args(["unused", *make])


def config_of(o, moe_layers):
    ffn = o.ffn or 4 * o.hidden
    layer = MoEConfig(
        hidden_size=o.hidden,
        ffn_hidden_size=ffn,
        num_experts=max(1, o.experts),
        top_k=1,
        gated=False,
        activation="gelu_tanh",
        bias="expert",
        load_balancing_coefficient=0.0,
    )
    return MoEGPTConfig(
        vocab_size=o.vocab,
        hidden_size=o.hidden,
        num_layers=o.layers,
        num_heads=o.heads,
        ffn_hidden_size=ffn,
        max_positions=o.positions,
        norm_eps=o.eps,
        moe=dict.fromkeys(moe_layers, layer),
    )


def state_of(full, moe_layers, o):
    """Global names and numpy arrays of Megatron's whole model to those of MoEGPT."""
    as_stored = DTYPES[o.dtype]
    t = {
        name: torch.from_numpy(value).to(torch.float32 if "gate.wg" in name else as_stored)
        for name, value in full.items()
    }
    heads, D = o.heads, o.hidden // o.heads
    state = {
        "embedding.weight": t["word_embeddings.weight"],
        "positions.weight": t["position_embeddings.weight"],
        "norm.weight": t["final_layernorm.weight"],
        "norm.bias": t["final_layernorm.bias"],
    }
    for n in range(o.layers):
        theirs, ours = f"layers.{n}.", f"blocks.{n}."
        for kind in ("weight", "bias"):
            state[f"{ours}attention_norm.{kind}"] = t[f"{theirs}input_layernorm.{kind}"]
            state[f"{ours}ffn_norm.{kind}"] = t[f"{theirs}post_attention_layernorm.{kind}"]
            qkv = t[f"{theirs}self_attention.query_key_value.{kind}"]
            state[f"{ours}attention.qkv.{kind}"] = qkv.unflatten(0, (heads, 3, D)).transpose(0, 1).flatten(0, 2)
            state[f"{ours}attention.out.{kind}"] = t[f"{theirs}self_attention.dense.{kind}"]
            if n not in moe_layers:
                state[f"{ours}ffn.up_proj.{kind}"] = t[f"{theirs}mlp.dense_h_to_4h.{kind}"]
                state[f"{ours}ffn.down_proj.{kind}"] = t[f"{theirs}mlp.dense_4h_to_h.{kind}"]
                continue
            for side, name in (("up", "dense_h_to_4h"), ("down", "dense_4h_to_h")):
                experts = [t[f"{theirs}mlp.experts.{e}.{name}.{kind}"] for e in range(o.experts)]
                state[f"{ours}ffn.experts.{side}_{'proj' if kind == 'weight' else 'bias'}"] = torch.stack(experts)
        if n in moe_layers:
            state[f"{ours}ffn.router.weight"] = t[f"{theirs}mlp.gate.wg.weight"]
    return state


def reference_model(case, dtype=torch.float64) -> MoEGPT:
    o = options_of(case["make"])
    full, moe_layers = make_deepspeed_ckpt.full_model(o)
    return build(config_of(o, moe_layers), state_of(full, moe_layers, o), dtype=dtype)


def small_config(**changes) -> MoEGPTConfig:
    """A few numbers of everything: dense, MoE, PR-MoE."""
    H = changes.get("hidden_size", 16)
    fields = {
        "vocab_size": 30,
        "hidden_size": H,
        "num_layers": 3,
        "num_heads": 2,
        "ffn_hidden_size": 24,
        "max_positions": 20,
        "moe": {
            1: MoEConfig(hidden_size=H, ffn_hidden_size=12, num_experts=4, top_k=2, bias="expert"),
            2: MoEConfig(hidden_size=H, ffn_hidden_size=12, num_experts=3, top_k=1, gated=False, activation="gelu"),
        },
        "residual": {2: 10},
    }
    return MoEGPTConfig(**{**fields, **changes})


def small_model(seed=0, dtype=torch.float64, **changes) -> MoEGPT:
    """Weights so large that what is read decides what follows."""
    torch.manual_seed(seed)
    model = MoEGPT(small_config(**changes), dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def continued(model, prompt, *, output_len, end_id=-1, pick=None, **how):
    """One prompt, all of it again for every token, penalties in Python: ids, and each step's adjusted logits."""
    o = SimpleNamespace(temperature=1.0, repetition_penalty=1.0, presence_penalty=0.0, min_length=0)
    vars(o).update(how)
    ids, logits_of_steps = list(prompt), []
    for step in range(output_len):
        with torch.no_grad():
            row = model(torch.tensor([ids]))[0, -1].double().tolist()
        for token, z in enumerate(row):
            z = z / (o.temperature + 1e-6) if o.temperature != 1 else z
            if token in ids:
                z = z * o.repetition_penalty if z < 0 else z / o.repetition_penalty
                z -= o.presence_penalty
            row[token] = float("-inf") if token == end_id and step < o.min_length else z
        logits_of_steps.append(row)
        ids.append(row.index(max(row)) if pick is None else pick(row, step))
        if ids[-1] == end_id:
            break
    return ids, logits_of_steps


def found_in_files(model, extras=None, tensors=None):
    """What reading a checkpoint of a model gives; ``extras`` are its end id and its tokenizer's files."""
    files = dict(extras or {})
    origin = {"end_id": files.pop("end_id")} if "end_id" in files else {}
    given = dict(model.state_dict()) if tensors is None else tensors
    return Model(given, {}, gpt=model.config.to_json(), origin=origin, files=files)
