"""How one MoE layer lies in a plain state dict: dmoe's two ways in Megatron, beside Megatron's own and MegaBlocks'.

Names stand behind the layer's own prefix, as ``decoder.layers.0.mlp.``. Shapes for the E experts of a rank:

================  =================================================================================================
``dmoe``          ``moe.experts.up_proj (E, F, H)`` or ``moe.experts.gate_up_proj (E, 2, F, H)``,
                  ``moe.experts.down_proj (E, H, F)``; ``moe.router.selection_bias``, or ``qb_beta``
``dmoe_experts``  the same as ``experts.experts.up_proj`` and so on, beside Megatron's router
================  =================================================================================================

``sequential``, ``te`` and ``grouped`` are in :mod:`dmoe.checkpoint.formats.megatron`, ``megablocks`` in
:mod:`dmoe.checkpoint.formats.megablocks`. What a layer has besides router and experts, as shared experts, is Megatron's
own in all of them.
"""

from __future__ import annotations

from typing import Literal

from dmoe.checkpoint.formats.dmoe_layers import expert_rows
from dmoe.checkpoint.formats.megablocks import DROPLESS, WITH_CAPACITY
from dmoe.checkpoint.formats.megatron import EXPERTS, LEFT_OUT, ROUTER
from dmoe.checkpoint.layers import Layout, Row

LayoutName = Literal["dmoe", "dmoe_experts", "sequential", "te", "grouped"]
LAYOUTS: tuple[LayoutName, ...] = ("dmoe", "dmoe_experts", "sequential", "te", "grouped")


_OURS = ("weight", "bias", "selection_bias", "qb_beta")
TABLES: dict[str, Layout] = {
    "dmoe": Layout(
        "dmoe",
        (
            *(Row(f"router.{name}", (f"moe.router.{name}",)) for name in _OURS),
            *expert_rows("moe.experts.", "moe."),
            Row("output_bias", ("moe.output_bias",)),
        ),
        inside=("moe.experts.", "moe.output_bias"),
        left_out=LEFT_OUT,
    ),
    "dmoe_experts": Layout("dmoe_experts", (*ROUTER, *expert_rows("experts.experts.")), left_out=LEFT_OUT),
    **{name: Layout(name, (*ROUTER, *rows), left_out=LEFT_OUT) for name, rows in EXPERTS.items()},
    "megablocks": DROPLESS,
    "megablocks with a capacity": WITH_CAPACITY,
}
_ROUTERS = tuple(row.field for row in (*ROUTER, *TABLES["dmoe"].rows) if row.field.startswith("router."))


def classify(key: str) -> tuple[str, str] | None:
    """Layer and layout of a state dict's key; None where it names no expert's tensor."""
    for name, table in TABLES.items():
        for row in table.rows:
            if row.field in _ROUTERS or row.field.startswith("shared"):
                continue
            for pattern in row.patterns:
                if found := pattern.fullmatch(key):
                    return found["layer"], name
    return None
