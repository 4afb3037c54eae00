"""Tutel's ``ffn`` and ``llama_ffn`` experts behind its two gates, and Swin-MoE, which is made of them.

With more ranks than experts, neighbours share an expert: slices of F, and slices of H of the second bias. Files of
Tutel's first versions have biases ``(E, 1, F)``, and no count of the experts.
"""

from __future__ import annotations

import math
import re

import torch

from dmoe.checkpoint.formats.rank_files import RankFiles
from dmoe.checkpoint.layers import Layout, Row
from dmoe.checkpoint.maps import PAIR, ROW, SAME, TRANSPOSED, TURNED, Map, Sizes
from dmoe.checkpoint.stored import Stored, held, reshaped
from dmoe.presets import get

_BETWEEN = Map(
    lambda parts, _: reshaped(parts[0], (parts[0].shape[0], parts[0].shape[-1])),
    lambda ours, _: [reshaped(ours, (ours.shape[0], 1, ours.shape[1]))],
)
_GATES = (
    Row("router.weight", ("gates.0.wg.weight",)),
    Row("router.weight", ("gates.0.sim_matrix",), TURNED),
    Row("router.projection", ("gates.0.cosine_projector.weight",)),
    Row("router.projection_bias", ("gates.0.cosine_projector.bias",)),
    Row("router.log_scale", ("gates.0.temperature",), ROW),
)


def _ffn(name: str, biases: Map, dims: int) -> Layout:
    return Layout(
        name,
        (
            *_GATES,
            Row("up", ("experts.batched_fc1_w",), gated=False),
            Row("down", ("experts.batched_fc2_w",), TRANSPOSED),
            Row("up_bias", ("experts.batched_fc1_bias",), biases, dims=dims),
            Row("down_bias", ("experts.batched_fc2_bias",), biases, dims=dims),
        ),
        sliceable=True,
        bias_sliced=True,
    )


FFN = _ffn("ffn", SAME, 2)
FFN_OF_OLD = _ffn("ffn with biases (E, 1, F)", _BETWEEN, 3)


# All numbers of all experts in a row, (E, H, F) and (E, F, H): the router knows H.
def _in_a_row(*, hidden_last: bool) -> Map:
    return TRANSPOSED.after(
        Map(
            lambda parts, sizes: _cut_in_three(parts[0], sizes, hidden_last=hidden_last),
            lambda ours, _: [reshaped(ours, (math.prod(ours.shape),))],
        )
    )


def _cut_in_three(numbers: Stored, sizes: Sizes, *, hidden_last: bool) -> Stored:
    width = numbers.shape[0] // max(1, sizes.experts * sizes.hidden)
    return reshaped(numbers, (sizes.experts, *((width, sizes.hidden) if hidden_last else (sizes.hidden, width))))


_UP_IN_A_ROW, _DOWN_IN_A_ROW = _in_a_row(hidden_last=False), _in_a_row(hidden_last=True)
LLAMA = Layout(
    "llama_ffn",
    (
        *_GATES,
        Row(
            "up",
            ("experts.W_fc1", "experts.W_fc2"),
            PAIR.after(_UP_IN_A_ROW),
            gated=True,
            dims=1,
            counted=True,
        ),
        Row("down", ("experts.W_fc3",), _DOWN_IN_A_ROW, dims=1, counted=True),
    ),
)
_COUNT = {"_num_global_experts": lambda layer: held(torch.tensor(layer["experts.down_proj"].shape[0]))}
TUTEL = RankFiles(
    "tutel",
    "Tutel's moe_layer with ffn or llama_ffn experts",
    (FFN, FFN_OF_OLD, LLAMA),
    lambda beside, **facts: get("tutel", **facts),
    constants=_COUNT,
    one_bias=True,
    not_inner="_moe_layer.",
)
SWIN_MOE = RankFiles(
    "swin-moe",
    "Swin-MoE: X.pth.rank0, X.pth.rank1, ... beside X.pth.master, or X.pth.global",
    (FFN, FFN_OF_OLD),
    lambda beside, **facts: get("swin_moe", **facts),
    constants=_COUNT,
    one_bias=True,
    container="model",
    inner="_moe_layer.",
    shared_file=lambda path: (
        path.with_name(re.sub(r"\.rank\d+$", ".master", path.name)) if re.search(r"\.rank\d+$", path.name) else None
    ),
    rank_file=lambda target, rank: target.with_name(f"{target.name.removesuffix('.global')}.rank{rank}"),
)
