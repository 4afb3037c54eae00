"""What the tests of MegaBlocks' names share: small arguments, layers, and the experts as a loop over rows."""

from __future__ import annotations

import torch

from dmoe.compat import megablocks

KINDS = ["MoE", "dMoE grouped", "dMoE sparse", "dMoE glu"]


def arguments(**options):
    base = {"hidden_size": 6, "ffn_hidden_size": 10, "moe_num_experts": 4, "moe_top_k": 2, "fp16": False}
    return megablocks.Arguments(**{**base, "device": "cpu", **options})


def layer_of(kind, **options):
    """One of ``KINDS`` in float64, with its arguments."""
    args = options_of(kind, **options)
    return (megablocks.MoE if kind == "MoE" else megablocks.dMoE)(args).double(), args


def options_of(kind, **options):
    kinds = {
        "MoE": {},
        "dMoE grouped": {"mlp_impl": "grouped"},
        "dMoE sparse": {"mlp_impl": "sparse", "ffn_hidden_size": 128},  # MegaBlocks' blocks
        "dMoE glu": {"mlp_type": "glu"},
    }
    spread = {"init_method": torch.nn.init.normal_, "output_layer_init_method": torch.nn.init.normal_}
    return arguments(**{"bias": False, **spread, **kinds[kind], **options})


def names_of(kind):
    return ["w1", "w2", "v1"] if kind.endswith("glu") else ["w1", "w2"]


def expert(mlp, e, token):
    """One token (H,) through expert e, from the parameters as MegaBlocks holds them."""
    args, width = mlp.args, mlp.args.ffn_hidden_size
    if mlp.w1.dim() == 3:  # MoE: (E, H, F) and (E, F, H)
        return args.activation_fn(token @ mlp.w1[e]) @ mlp.w2[e]
    rows = slice(e * width, (e + 1) * width)
    hidden = args.activation_fn(mlp.w1[rows] @ token)
    if hasattr(mlp, "v1"):
        hidden = hidden * (mlp.v1[rows] @ token)
    return hidden @ mlp.w2[rows]
