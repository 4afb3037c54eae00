"""Write a tiny synthetic checkpoint in the layout of Megatron-DeepSpeed MoE (ModelScope's GPT-MoE), always the same.

    python make_deepspeed_ckpt.py OUT --layers 4 --experts 4 --train-tp 2 --dtype fp16 --seed 1

Values depend on nothing but --seed, the sizes and the tensor's global name: SHA-256 of "seed/name" seeds PCG64, whose
raw 64-bit words become 21-bit integers and those, by powers of two, exact floats. No random float code and no torch RNG
take part. A checkpoint with --train-tp 2 holds the same model as one with --train-tp 1.
"""

from __future__ import annotations

import argparse
import enum
import hashlib
import json
import random
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
# name: (path of the dense states, whether it names a pipeline rank, flavour)
PATTERNS = {
    "mp_dir": ("mp_rank_{tp:02}/model_states.pt", False, "deepspeed"),
    "mp_dir_pp": ("mp_rank_{tp:02}_{pp:03}/model_states.pt", True, "deepspeed"),
    "tp_pp_dir": ("tp_rank_{tp:02}_pp_rank_{pp:03}/model_states.pt", True, "deepspeed"),
    "mp_file": ("mp_rank_{tp:02}_model_states.pt", False, "deepspeed"),
    "mp_file_pp": ("mp_rank_{tp:02}_{pp:03}_model_states.pt", True, "deepspeed"),
    "tp_pp_file": ("tp_rank_{tp:02}_pp_rank_{pp:03}_model_states.pt", True, "deepspeed"),
    "rng_dir": ("mp_rank_{tp:02}/model_rng.pt", False, "megatron"),
    "rng_dir_pp": ("mp_rank_{tp:02}_{pp:03}/model_rng.pt", True, "megatron"),
    "rng_tp_pp_dir": ("tp_rank_{tp:02}_pp_rank_{pp:03}/model_rng.pt", True, "megatron"),
}
# fp32 values that rounding to fp16 has to get right: ties, subnormals, the largest that stays finite, signed zeros
EDGES = [1 + 2**-11, 1 + 3 * 2**-11, 2**-24, 2**-25, -(2**-25), 3 * 2**-25, 65519.99609375, -0.0]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--hidden", type=int, default=32)
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--ffn", type=int, default=None, help="[4 * hidden]")
    made.add_argument("--vocab", type=int, default=96, help="padded vocabulary")
    made.add_argument("--positions", type=int, default=24)
    made.add_argument("--experts", type=int, default=4, help="0: a dense model whose args have no num_experts")
    made.add_argument("--expert-interval", type=int, default=2, help="1-based layer numbers divisible by it are MoE")
    made.add_argument("--train-tp", type=int, default=1)
    made.add_argument("--train-pp", type=int, default=1)
    made.add_argument("--pattern", choices=PATTERNS, default="mp_dir")
    made.add_argument("--dtype", choices=DTYPES, default="fp16", help="of everything but the gate, which is fp32")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--key", choices=("module", "model"), default="module")
    made.add_argument("--attention", choices=("self_attention", "attention"), default="self_attention")
    made.add_argument("--eps", type=float, default=1e-5)
    made.add_argument(
        "--zero-expert-bias", action="store_true", help="experts' output biases 0, as DeepSpeed leaves them"
    )
    made.add_argument("--spread-experts", action="store_true", help="expert e in the file of rank e %% train_tp")
    made.add_argument("--no-padded-vocab-arg", action="store_true", help="args without padded_vocab_size")
    made.add_argument("--rng-states", action="store_true", help="states with random's, numpy's and torch's RNG states")
    made.add_argument("--views", action="store_true", help="tensors as non-contiguous views of larger storages")
    made.add_argument(
        "--vocab-files", action="store_true", help="OUT/vocab.json and OUT/merges.txt, end of text = V - 3"
    )
    made.add_argument("--moe-topk", type=int, default=1, help="args.topk")
    made.add_argument(
        "--coefficient", action="store_true", help="PR-MoE: mlp.mlp.* and mlp.coefficient.* in MoE layers"
    )
    return made


def uniform(seed: int, name: str, shape: tuple[int, ...], scale: float, offset: float = 0.0) -> np.ndarray:
    """offset + scale * u, u on a grid of 2**-20 in [-1, 1): exact in float32 while scale is a power of two <= 1."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    raw = np.random.PCG64(key).random_raw(int(np.prod(shape)))
    integers = (raw >> np.uint64(43)).astype(np.int64) - 2**20
    return (offset + scale * (integers.astype(np.float64) * 2.0**-20)).astype(np.float32).reshape(shape)


def full_model(o: argparse.Namespace) -> tuple[dict[str, np.ndarray], list[int]]:
    """Whole float32 tensors by global name, in the order of a Megatron checkpoint; and the MoE layers."""
    h, f = o.hidden, o.ffn or 4 * o.hidden
    moe = [n for n in range(o.layers) if o.experts and (n + 1) % o.expert_interval == 0]
    t: dict[str, np.ndarray] = {}

    def put(name: str, shape: tuple[int, ...], scale: float, offset: float = 0.0) -> None:
        t[name] = uniform(o.seed, name, shape, scale, offset)

    put("word_embeddings.weight", (o.vocab, h), 2**-1)
    put("position_embeddings.weight", (o.positions, h), 2**-2)
    edges = EDGES[:h]
    t["position_embeddings.weight"][-1, : len(edges)] = edges
    for n in range(o.layers):
        p = f"layers.{n}."
        put(p + "input_layernorm.weight", (h,), 2**-2, 1.0)
        put(p + "input_layernorm.bias", (h,), 2**-3)
        put(p + "self_attention.query_key_value.weight", (3 * h, h), 2**-2)  # rows: head, then q, k, v, then dim
        put(p + "self_attention.query_key_value.bias", (3 * h,), 2**-3)
        put(p + "self_attention.dense.weight", (h, h), 2**-2)
        put(p + "self_attention.dense.bias", (h,), 2**-4)
        put(p + "post_attention_layernorm.weight", (h,), 2**-2, 1.0)
        put(p + "post_attention_layernorm.bias", (h,), 2**-3)
        if n in moe:
            put(p + "mlp.gate.wg.weight", (o.experts, h), 1.0)
            for e in range(o.experts):
                mlp(put, p + f"mlp.experts.{e}.", h, f)
                if o.zero_expert_bias:
                    t[p + f"mlp.experts.{e}.dense_4h_to_h.bias"][:] = 0
            if o.coefficient:
                mlp(put, p + "mlp.mlp.", h, f)
                put(p + "mlp.coefficient.weight", (2, h), 2**-2)
                put(p + "mlp.coefficient.bias", (2,), 2**-2)
        else:
            mlp(put, p + "mlp.", h, f)
    put("final_layernorm.weight", (h,), 2**-2, 1.0)
    put("final_layernorm.bias", (h,), 2**-3)
    return t, moe


def mlp(put, prefix: str, h: int, f: int) -> None:
    put(prefix + "dense_h_to_4h.weight", (f, h), 2**-2)
    put(prefix + "dense_h_to_4h.bias", (f,), 2**-2)
    put(prefix + "dense_4h_to_h.weight", (h, f), 2**-3)
    put(prefix + "dense_4h_to_h.bias", (h,), 2**-2)


def shard(name: str, value: np.ndarray, rank: int, ranks: int) -> np.ndarray:
    """Megatron's tensor parallelism: rows of column-parallel linears and vocabulary, columns of row-parallel ones."""
    rows = (
        "word_embeddings.weight",
        "query_key_value.weight",
        "query_key_value.bias",
        "h_to_4h.weight",
        "h_to_4h.bias",
    )
    columns = ("dense.weight", "dense_4h_to_h.weight")
    if "dense_4h_to_h" not in name and name.endswith(rows):
        return np.split(value, ranks, axis=0)[rank]
    if name.endswith(columns):
        return np.split(value, ranks, axis=1)[rank]
    return value


def stand_in_modules() -> dict[str, type]:
    """Classes that pickle as Megatron's, of modules a reader does not have."""
    classes = {
        ("megatron.model.enums", "ModelType"): {"encoder_or_decoder": 1, "encoder_and_decoder": 2},
        ("megatron.enums", "PositionEmbeddingType"): {"rotary": 1, "absolute": 2, "alibi": 3},
    }
    made: dict[str, type] = {}
    for (module, name), members in classes.items():
        cls = enum.Enum(name, members, module=module, qualname=name)
        cls.__reduce_ex__ = lambda self, protocol: (type(self), (self.value,))  # what every Python but 3.11 writes
        for depth in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:depth])
            sys.modules.setdefault(part, types.ModuleType(part))
        setattr(sys.modules[module], name, cls)
        made[name] = cls
    return made


def training_args(o: argparse.Namespace) -> argparse.Namespace:
    template = Path(__file__).with_name("args_template.txt").read_text().splitlines()
    values = {}
    for line in template:
        key, text = line.split(":", 1)
        values[key] = read_value(text)
    values |= {
        "num_layers": o.layers,
        "hidden_size": o.hidden,
        "ffn_hidden_size": o.ffn or 4 * o.hidden,
        "num_attention_heads": o.heads,
        "kv_channels": o.hidden // o.heads,
        "max_position_embeddings": o.positions,
        "layernorm_epsilon": o.eps,
        "num_experts": [o.experts],
        "expert_interval": o.expert_interval,
        "topk": o.moe_topk,
        "mlp_type": "residual" if o.coefficient else "standard",
        "tensor_model_parallel_size": o.train_tp,
        "pipeline_model_parallel_size": o.train_pp,
        "padded_vocab_size": o.vocab,
        "fp16": o.dtype == "fp16",
        "bf16": o.dtype == "bf16",
        "params_dtype": DTYPES[o.dtype],
        "data_path": ["/mnt/wudao/wudao_jiebabpe_text_document"],
        "retriever_report_topk_accuracies": [],
        "model_type": stand_in_modules()["ModelType"].encoder_or_decoder,
    }
    if not o.experts:
        del values["num_experts"]
    if o.no_padded_vocab_arg:
        del values["padded_vocab_size"]
    return argparse.Namespace(**values)


def read_value(text: str):
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if str(value) == text:
            return value
    return text


def tensor(value: np.ndarray, dtype: torch.dtype, views: bool) -> torch.Tensor:
    made = torch.from_numpy(np.array(value)).to(dtype)  # round to nearest even
    if not views:
        return made
    if made.dim() == 1:
        large = torch.zeros(2 * len(made) + 3, dtype=dtype)
        view = large[3::2]
    else:
        large = torch.zeros(made.shape[1] + 1, made.shape[0] + 2, dtype=dtype)
        view = large.T[2:, 1:]
    view.copy_(made)
    return view


def main(arguments: list[str] | None = None) -> None:
    o = parser().parse_args(arguments)
    path, names_pp, flavour = PATTERNS[o.pattern]
    if names_pp != (o.train_pp > 1):
        raise SystemExit(f"--pattern {o.pattern} goes with --train-pp {'> 1' if names_pp else '1'}")
    dtype = DTYPES[o.dtype]
    full, moe = full_model(o)
    args = training_args(o)
    o.out.mkdir(parents=True, exist_ok=True)
    moe_name = "deepspeed_moe" if flavour == "deepspeed" else "megatron_moe"
    each = o.layers // o.train_pp
    for tp in range(o.train_tp):
        for pp in range(o.train_pp):
            embedding, encoder = OrderedDict(), OrderedDict()
            for name, value in full.items():
                kind = torch.float32 if "gate.wg" in name else dtype
                made = tensor(shard(name, value, tp, o.train_tp), kind, o.views)
                if "embeddings" in name:
                    if pp == 0:
                        embedding[name.split(".")[0]] = OrderedDict(weight=made)
                elif name.startswith("final_layernorm"):
                    if pp == o.train_pp - 1:
                        encoder[name] = made
                elif ".experts." not in name and int(name.split(".")[1]) // each == pp:
                    parts = name.split(".")
                    parts[1] = str(int(parts[1]) % each)
                    local = ".".join(parts).replace("self_attention", o.attention)
                    encoder[local.replace("mlp.gate.", f"mlp.{moe_name}.gate.")] = made
            language_model = {"embedding": dict(embedding), "encoder": encoder} if pp == 0 else {"encoder": encoder}
            model = {"language_model": language_model}
            if pp == o.train_pp - 1 and pp > 0:
                weight = tensor(
                    shard("word_embeddings.weight", full["word_embeddings.weight"], tp, o.train_tp), dtype, o.views
                )
                model["word_embeddings_for_head"] = OrderedDict(weight=weight)
            state = {
                o.key: model,
                "optimizer": None,
                "lr_scheduler": None,
                "skipped_steps": 0,
                "global_steps": 12,
                "dp_world_size": 8,
                "mp_world_size": o.train_tp,
                "num_experts": [o.experts] * len(moe),
                "args": args,
                "checkpoint_version": 3.0,
                "iteration": 12,
                "tokens": 98304,
            }
            if o.rng_states:
                numpy_state = ("MT19937", np.arange(624, dtype=np.uint32), 5, 0, 0.0)
                state |= {"random_rng_state": random.Random(o.seed).getstate(), "np_rng_state": numpy_state}
                state["torch_rng_state"] = torch.arange(16, dtype=torch.uint8)
            file = o.out / path.format(tp=tp, pp=pp)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, file)
    prefix = "language_model.encoder." if flavour == "deepspeed" else "model.module.language_model.encoder."
    for ordinal, layer in enumerate(moe):
        for e in range(o.experts):
            states = OrderedDict()
            for kind in ("dense_h_to_4h.weight", "dense_h_to_4h.bias", "dense_4h_to_h.weight", "dense_4h_to_h.bias"):
                name = f"layers.{layer}.mlp.{moe_name}.experts.{moe_name.replace('moe', 'experts')}.{e}.{kind}"
                states[prefix + name] = tensor(full[f"layers.{layer}.mlp.experts.{e}.{kind}"], dtype, o.views)
            rank = e % o.train_tp if o.spread_experts else 0
            torch.save(states, o.out / f"layer_{ordinal}_expert_{e}_mp_rank_{rank:02}_model_states.pt")
    if o.vocab_files:
        words = {f"w{n}": n for n in range(o.vocab)}
        words["<|endoftext|>"] = words.pop(f"w{o.vocab - 3}")
        (o.out / "vocab.json").write_text(json.dumps(words))
        (o.out / "merges.txt").write_text("#version: 0.2\nw 1\n")


if __name__ == "__main__":
    main()
