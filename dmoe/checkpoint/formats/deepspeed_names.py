"""What the tensors of experts are called in DeepSpeed's files: behind its own prefix as the user's module has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dmoe.checkpoint.formats.dmoe_layers import ROUTER, shared_rows
from dmoe.checkpoint.layers import Layout, Row
from dmoe.checkpoint.maps import PAIR, SAME
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.stored import Stored

GATE = "deepspeed_moe.gate.wg.weight"
KEY = re.compile(
    r"(?P<layer>.*\.)?(?:deepspeed_moe\.experts\.deepspeed_experts\.(?P<e>\d+)\.|experts\.w[123]\.(?P<auto>\d+)$)"
)
OF_EXPERT = re.compile(r"(?:.*\.)?deepspeed_moe\.experts\.deepspeed_experts\.\d+\.(.+)\.weight")
# What the projections of an expert are called: up's (of gated ones the gate's, too, which comes first), and down's.
KNOWN: tuple[tuple[tuple[str, ...], str], ...] = (
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("up_proj",), "down_proj"),
    (("wi",), "wo"),
    (("w1",), "w2"),
    (("linear1",), "linear2"),
    (("lin1",), "lin2"),
    (("up",), "down"),
)
AUTO = "AutoEP"
DMOES = "dmoe"
_START = "deepspeed_moe.experts.deepspeed_experts.{e}."


@dataclass(frozen=True)
class ExpertNames:
    """What the projections of an expert are called."""

    up: tuple[str, ...]
    down: str

    def rows(self, gated: bool | None = None) -> list[Row]:
        """The rows of experts with these names; ``gated``: see :class:`Row`."""
        kinds = [("up", self.up), ("down", (self.down,))]
        return [
            Row(
                field + end,
                tuple(f"{_START}{name}.{kind}" for name in names),
                PAIR if len(names) > 1 else SAME,
                gated=gated,
            )
            for field, names in kinds
            for end, kind in (("", "weight"), ("_bias", "bias"))
        ]

    def layout(self) -> Layout:
        """The table for experts with these names."""
        router = Row("router.weight", (GATE,))
        return Layout("/".join((*self.up, self.down)), (router, *self.rows()), inside=("deepspeed_moe.experts.",))


# dmoe's own layers, where DeepSpeed's engine saves them: gated ones and others side by side, and all they have beside.
DMOES_NAMES = {True: ExpertNames(("w1", "w3"), "w2"), False: ExpertNames(*KNOWN[0])}
DMOES_LAYOUT = Layout(
    DMOES,
    (
        Row("router.weight", (GATE,)),
        *(Row(f"router.{name}", (f"deepspeed_moe.gate.{name}",)) for name in ROUTER if name != "weight"),
        *(row for gated, names in DMOES_NAMES.items() for row in names.rows(gated)),
        *shared_rows("deepspeed_moe.shared."),
    ),
    inside=("deepspeed_moe.experts.",),
    routerless=True,
)
_DMOES = re.compile(rf"(?:.*\.)?deepspeed_moe\.(?:shared\..+|gate\.(?:{'|'.join(ROUTER)}))")
AUTO_EP = Layout(
    AUTO,
    (
        *(Row("router.weight", (name,)) for name in ("router.gate.weight", "gate.weight", "router.weight")),
        Row("up", ("experts.w1.{e}", "experts.w3.{e}"), PAIR, gated=True),
        Row("down", ("experts.w2.{e}",)),
    ),
)


def layout_for(tensors: Mapping[str, Stored], where: str) -> Layout:
    """The table for the experts among tensors.

    Raises:
        ValueError: there are none, or their names and shapes do not tell which projection is which.
    """
    found = dict.fromkeys(m[1] for name, t in tensors.items() if len(t.shape) == 2 and (m := OF_EXPERT.fullmatch(name)))
    names = list(found)
    both = {name for each in DMOES_NAMES.values() for name in (*each.up, each.down)}
    if both.issuperset(names) and (len(names) == len(both) or any(_DMOES.fullmatch(name) for name in tensors)):
        return DMOES_LAYOUT
    for up, down in KNOWN:
        if set(names) == {*up, down}:
            return ExpertNames(up, down).layout()
    if not names and any(KEY.match(name) for name in tensors):
        return AUTO_EP
    if len(names) == 2 and (hidden := _hidden(tensors)):
        wide = [next(t.shape for name, t in tensors.items() if name.endswith(f".{each}.weight")) for each in names]
        for a, b in ((0, 1), (1, 0)):
            if wide[a][1] == hidden == wide[b][0] and wide[a][0] == wide[b][1] != hidden:
                return ExpertNames((names[a],), names[b]).layout()
    known = "; ".join(" and ".join((*up, down)) for up, down in KNOWN)
    raise ValueError(
        f"{where}: expected experts of DeepSpeed whose projections are called {known}, or two whose shapes tell which "
        f"is which, got {', '.join(names) or 'none'}"
    )


def _hidden(tensors: Mapping[str, Stored]) -> int:
    return next((t.shape[1] for name, t in tensors.items() if name.endswith(GATE)), 0)


def remember(model: Model, layout: Layout, about: Mapping[str, Any]) -> Model:
    """Keep with a model what its experts' tensors were called, for the way back."""
    up = next(row for row in layout.rows if row.field == "up")
    down = next(row for row in layout.rows if row.field == "down")
    last = [name.split("{e}.")[-1].removesuffix(".weight") for name in (*up.theirs, *down.theirs)]
    model.origin |= {**about, "experts": layout.name if layout.name in _WHOLE else last}
    return model


def layout_again(origin: Mapping[str, Any]) -> Layout:
    """The table that a model was read by."""
    names: Any = origin["experts"]
    return _WHOLE[names] if isinstance(names, str) else ExpertNames(tuple(names[:-1]), names[-1]).layout()


_WHOLE = {AUTO: AUTO_EP, DMOES: DMOES_LAYOUT}  # tables that need no names beside
