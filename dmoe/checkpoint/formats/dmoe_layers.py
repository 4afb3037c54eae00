"""dmoe's own names in files of ``torch.save`` with nothing beside: of one process, or of ranks with their experts."""

from __future__ import annotations

from dmoe.checkpoint.layers import Layout, Row
from dmoe.checkpoint.maps import ROW, SAME, TWO

ROUTER = ("weight", "bias", "selection_bias", "qb_beta", "projection", "projection_bias", "log_scale")


def expert_rows(*prefixes: str) -> tuple[Row, ...]:
    """The rows of dmoe's experts, written behind the first of some prefixes and found behind any."""
    kinds = (
        ("up", "gate_up_proj", True, 4),
        ("up", "up_proj", False, 3),
        ("up_bias", "gate_up_bias", True, 3),
        ("up_bias", "up_bias", False, 2),
        ("down", "down_proj", None, 3),
        ("down_bias", "down_bias", None, 2),
    )
    return tuple(
        Row(field, (prefix + name,), TWO if gated else SAME, gated=gated, dims=dims)
        for field, name, gated, dims in kinds
        for prefix in prefixes
    )


def shared_rows(prefix: str) -> tuple[Row, ...]:
    """The rows of dmoe's shared expert, behind a prefix."""
    mlp = f"{prefix}mlp."
    return (
        Row("shared_up", (f"{mlp}gate_up_proj",), ROW.after(TWO), gated=True),
        Row("shared_up", (f"{mlp}up_proj",), ROW, gated=False),
        Row("shared_up_bias", (f"{mlp}gate_up_bias",), ROW.after(TWO), gated=True),
        Row("shared_up_bias", (f"{mlp}up_bias",), ROW, gated=False),
        Row("shared_down", (f"{mlp}down_proj",), ROW),
        Row("shared_down_bias", (f"{mlp}down_bias",), ROW),
        Row("shared_gate", (f"{prefix}gate.weight",)),
    )


LAYOUT = Layout(
    "dmoe",
    (
        *(Row(f"router.{name}", (f"router.{name}",)) for name in ROUTER),
        *expert_rows("experts."),
        Row("output_bias", ("output_bias",)),
        *shared_rows("shared_expert."),
    ),
    sliceable=True,
    routerless=True,
)
