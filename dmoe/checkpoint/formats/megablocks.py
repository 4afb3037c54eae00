"""MegaBlocks' dMoE, and its MoE with a capacity.

All experts stand in one matrix for each projection. With more ranks than experts a rank's experts are those of its
number modulo the blocks of experts, and its slice of F the quotient: the other way round than dmoe's.
"""

from __future__ import annotations

from dmoe.checkpoint.formats.rank_files import RankFiles
from dmoe.checkpoint.layers import Layout, Row
from dmoe.checkpoint.maps import FLAT, FLAT_TRANSPOSED, PAIR_FLAT, PAIR_OF_ONE, TRANSPOSED
from dmoe.presets import get

_ROUTER = Row("router.weight", ("router.layer.weight",))
_BESIDE = (
    Row("output_bias", ("experts.bias",)),
    Row("shared_up", ("shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"), PAIR_OF_ONE, gated=True),
    Row("shared_up", ("shared_expert.up_proj.weight",), gated=False),
    Row("shared_down", ("shared_expert.down_proj.weight",)),
)
DROPLESS = Layout(
    "dMoE",
    (
        _ROUTER,
        Row("up", ("experts.mlp.w1", "experts.mlp.v1"), PAIR_FLAT, gated=True, dims=2, counted=True),
        Row("up", ("experts.mlp.w1",), FLAT, gated=False, dims=2, counted=True),
        Row("down", ("experts.mlp.w2",), FLAT_TRANSPOSED, dims=2, counted=True),
        *_BESIDE,
    ),
    slices_first=False,
    sliceable=True,
)
WITH_CAPACITY = Layout(
    "MoE",
    (
        _ROUTER,
        Row("up", ("experts.mlp.w1",), TRANSPOSED, gated=False, dims=3),
        Row("down", ("experts.mlp.w2",), TRANSPOSED, dims=3),
        *_BESIDE,
    ),
    slices_first=False,
    sliceable=True,
)
MEGABLOCKS = RankFiles(
    "megablocks",
    "MegaBlocks' dMoE and MoE layers",
    (DROPLESS, WITH_CAPACITY),
    lambda beside, **facts: get("megablocks", **facts),
)
