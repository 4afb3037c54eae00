"""What `ablation.py` compares: the base, and one thing at a time that is otherwise."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from .settings import BALANCE, TOP_K, Settings


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    """In files and on the command line."""
    factor: str
    """What it is about."""
    value: str
    """How it is here."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the base's settings."""
    upcycled: Literal["counted", "free"] | None = None
    """Begins as copies of a dense run, whose FLOPs are ``counted`` among its own, or given (``free``)."""

    def settings(self, base: Settings, seed: int) -> Settings:
        """Those of its run with ``seed``."""
        return dataclasses.replace(base, **self.changes, seed=seed)


BASE = "base"


def variants(base: Settings) -> list[Variant]:
    """All rows, the base first. ``base`` is the demo's setting, maybe with fewer steps."""
    balance = BALANCE if base.balance is None else base.balance
    shared = {"top_k": (base.top_k or TOP_K) - 1, "shared": base.ffn, "gate_normalization": "none"}
    return [
        Variant(BASE, "base", f"gates sum to 1, balance {balance:g}, no z-loss"),
        Variant("raw-gates", "gate weights", "the router's probabilities", {"gate_normalization": "none"}),
        *(
            Variant(f"balance-{value:g}", "balance coefficient", f"{value:g}", {"balance": value})
            for value in (0.0, 0.01, 0.1)
        ),
        Variant("z-0.001", "router z-loss", "0.001", {"z_loss": 1e-3}),
        Variant("shared", "shared expert", "in place of one of the routed", shared),
        *(
            Variant(f"init-{value:g}", "router's initial weights", f"times {value:g}", {"router_init": value})
            for value in (0.1, 0.01)
        ),
        Variant("lr-1", "experts' learning rate", "that of all weights", {"expert_lr_power": 0.0}),
        Variant("lr-root-4", "experts' learning rate", "times (K / E)^¼", {"expert_lr_power": 0.25}),
        Variant("upcycled", "upcycled", "the dense run's FLOPs are its own", upcycled="counted"),
        Variant("upcycled-free", "upcycled", "the dense run is a gift", upcycled="free"),
    ]
