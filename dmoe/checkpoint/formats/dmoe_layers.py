"""dmoe's own names in files of ``torch.save`` with nothing beside: of one process, or of ranks with their experts."""

from __future__ import annotations

from dmoe.checkpoint.layers import Layout, Row
from dmoe.checkpoint.maps import ROW, TWO

_ROUTER = ("weight", "bias", "selection_bias", "qb_beta", "projection", "projection_bias", "log_scale")
_SHARED = "shared_expert.mlp."
LAYOUT = Layout(
    "dmoe",
    (
        *(Row(f"router.{name}", (f"router.{name}",)) for name in _ROUTER),
        Row("up", ("experts.gate_up_proj",), TWO, gated=True, dims=4),
        Row("up", ("experts.up_proj",), gated=False, dims=3),
        Row("up_bias", ("experts.gate_up_bias",), TWO, gated=True, dims=3),
        Row("up_bias", ("experts.up_bias",), gated=False, dims=2),
        Row("down", ("experts.down_proj",), dims=3),
        Row("down_bias", ("experts.down_bias",), dims=2),
        Row("output_bias", ("output_bias",)),
        Row("shared_up", (f"{_SHARED}gate_up_proj",), ROW.after(TWO), gated=True),
        Row("shared_up", (f"{_SHARED}up_proj",), ROW, gated=False),
        Row("shared_up_bias", (f"{_SHARED}gate_up_bias",), ROW.after(TWO), gated=True),
        Row("shared_up_bias", (f"{_SHARED}up_bias",), ROW, gated=False),
        Row("shared_down", (f"{_SHARED}down_proj",), ROW),
        Row("shared_down_bias", (f"{_SHARED}down_bias",), ROW),
        Row("shared_gate", ("shared_expert.gate.weight",)),
    ),
    sliceable=True,
    routerless=True,
)
