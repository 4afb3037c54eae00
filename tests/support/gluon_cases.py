"""What :mod:`gluon_table` compiles: the expert MLP, whose products the Gluon kernels take."""

from __future__ import annotations

import functools

import torch
from kernel_cases import expert_mlp

CASES = {
    "30B": functools.partial(expert_mlp, tokens=32768, hidden=4096, ffn=1024, experts=64, top_k=4),
    "30B, other numbers of tokens and experts": functools.partial(
        expert_mlp, tokens=1111, hidden=4096, ffn=1024, experts=7, top_k=1
    ),
    "7B": functools.partial(expert_mlp, tokens=24576, hidden=1536, ffn=256, experts=128, top_k=8),
    "nothing divides": functools.partial(expert_mlp, tokens=4096, hidden=1048, ffn=776, experts=16, top_k=4),
    "nothing divides, plain, bias, main_grad, float16": functools.partial(
        expert_mlp, hidden=1048, ffn=776, gated=False, bias=True, main_grad=True, dtype=torch.float16, activation="relu"
    ),
    "narrow": functools.partial(expert_mlp, hidden=128, ffn=96),
    "narrow, plain": functools.partial(expert_mlp, hidden=96, ffn=128, gated=False, activation="relu"),
    "gelu_tanh, bias": functools.partial(expert_mlp, bias=True, activation="gelu_tanh"),
}
