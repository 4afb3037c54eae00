"""How the experts of one MoE layer lie in a plain state dict: Megatron's three ways, MegaBlocks' and dmoe's two.

Names stand behind the layer's own prefix, as ``decoder.layers.0.mlp.``. Shapes for the E experts of a rank, with X = F,
or 2 F where experts are gated (gate, then up):

================  =================================================================================================
``dmoe``          ``moe.experts.up_proj (E, F, H)`` or ``moe.experts.gate_up_proj (E, 2, F, H)``,
                  ``moe.experts.down_proj (E, H, F)``; ``moe.router.selection_bias``, or ``qb_beta``
``dmoe_experts``  the same as ``experts.experts.up_proj`` and so on, beside Megatron's router
``sequential``    ``experts.local_experts.{i}.linear_fc1.weight (X, H)``, ``linear_fc2.weight (H, F)``: SequentialMLP
``te``            ``experts.linear_fc1.weight{i} (X, H)``, ``experts.linear_fc2.weight{i} (H, F)``: TEGroupedMLP
``grouped``       ``experts.weight1 (H, E X)``, whose memory is (E, H, X); ``experts.weight2 (E F, H)``: GroupedMLP
``megablocks``    ``experts.mlp.w1``, ``v1``, ``w2``, each ``(E F, H)``; ``experts.bias (H)``; ``router.layer.weight``
================  =================================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["dmoe", "dmoe_experts", "sequential", "te", "grouped"]
LAYOUTS: tuple[Layout, ...] = ("dmoe", "dmoe_experts", "sequential", "te", "grouped")

_FIELDS = "gate_up_proj|up_proj|down_proj|gate_up_bias|up_bias|down_bias"
_KEYS = {
    layout: re.compile(r"(?P<layer>(?:.*\.)?)" + names)
    for layout, names in {
        "dmoe": rf"moe\.(?:experts\.)?(?P<name>{_FIELDS}|output_bias)",
        "dmoe_experts": rf"experts\.experts\.(?P<name>{_FIELDS})",
        "sequential": r"experts\.local_experts\.(?P<expert>\d+)\.linear_(?P<name>fc[12]\.(?:weight|bias))",
        "te": r"experts\.linear_(?P<name>fc[12]\.(?:weight|bias))(?P<expert>\d+)",
        "grouped": r"experts\.(?P<name>weight[12])",
        "megablocks": r"experts\.(?P<name>mlp\.(?:w1|v1|w2)|bias)",
    }.items()
}
# What else of a layer has other names than in Megatron.
RENAMED: dict[str, dict[str, str]] = {
    "dmoe": {
        "moe.router.weight": "router.weight",
        "moe.router.bias": "router.bias",
        "moe.router.selection_bias": "router.expert_bias",
        "moe.router.qb_beta": "router.qb_beta",
    },
    "megablocks": {"router.layer.weight": "router.weight"},
}


@dataclass(frozen=True)
class Bank:
    """The experts of one layer on one rank.

    Attributes:
        up: ``(E, X, H)``.
        down: ``(E, H, F)``.
        up_bias, down_bias: ``(E, X)`` and ``(E, H)``, or None.
        output_bias: ``(H,)``: MegaBlocks' one bias of a layer, which no gate weight multiplies; or None.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    output_bias: Tensor | None = None

    @property
    def gated(self) -> bool:
        """Whether X is 2 F."""
        return self.up.shape[1] == 2 * self.down.shape[2]

    def check(self, where: str) -> Bank:
        """Itself, if its shapes belong together.

        Raises:
            ValueError: they do not.
        """
        up, down = tuple(self.up.shape), tuple(self.down.shape)
        fits = len(up) == len(down) == 3 and up[0] == down[0] and up[2] == down[1] and up[1] in (down[2], 2 * down[2])
        for bias, size in ((self.up_bias, up[:2]), (self.down_bias, down[:2])):
            fits = fits and (bias is None or tuple(bias.shape) == size)
        if not fits or (self.up_bias is None) != (self.down_bias is None):
            biases = [None if bias is None else tuple(bias.shape) for bias in (self.up_bias, self.down_bias)]
            raise ValueError(
                f"{where}: expected projections (E, F or 2 F, H) and (E, H, F), with two biases or none, got {up}, "
                f"{down} and {biases[0]}, {biases[1]}"
            )
        return self


@dataclass(frozen=True)
class Found:
    """The experts' tensors of one layer.

    Attributes:
        where: the layer, for messages.
        layout: in which they are.
        tensors: by name.
        numbered: by name and local number, in the layouts that have a tensor for each expert.
    """

    where: str
    layout: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbered: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def need(self, name: str) -> Tensor:
        """A tensor that the layout has.

        Raises:
            ValueError: it is missing.
        """
        if name not in self.tensors:
            raise ValueError(
                f"{self.where}: expected {name} beside {', '.join(self.tensors) or 'the others'}, found none"
            )
        return self.tensors[name]

    def stacked(self, name: str) -> Tensor | None:
        """One kind of tensor of all local experts, in order; None where they have none.

        Raises:
            ValueError: one is missing, or has a shape of its own.
        """
        mine = self.numbered.get(name)
        if mine is None:
            return None
        if sorted(mine) != list(range(len(mine))):
            raise ValueError(f"{self.where}: expected linear_{name} of experts 0 to {max(mine)}, found {sorted(mine)}")
        shapes = {tuple(tensor.shape) for tensor in mine.values()}
        if len(shapes) > 1:
            raise ValueError(f"{self.where}: expected linear_{name} of one shape, found {sorted(shapes)}")
        return torch.stack([mine[expert] for expert in range(len(mine))])


def classify(key: str) -> tuple[str, str, str, int | None] | None:
    """Layer, layout, name and local expert of a state dict's key; None where it names no expert's tensor."""
    for layout, pattern in _KEYS.items():
        found = pattern.fullmatch(key)
        if found is not None:
            expert = found.groupdict().get("expert")
            return found["layer"], layout, found["name"], None if expert is None else int(expert)
    return None


def read(found: Found, num_experts: int | None) -> Bank:
    """The experts of a layer from its tensors.

    Args:
        found: the tensors.
        num_experts: E, which ``grouped`` and ``megablocks`` do not tell.

    Raises:
        ValueError: tensors that are missing, or do not fit together.
    """
    return _READ[found.layout](found, num_experts).check(found.where)


def write(bank: Bank, layout: Layout, where: str) -> Mapping[str, Tensor]:
    """The tensors of a layer from its experts, by name behind the layer's prefix.

    Raises:
        ValueError: biases that a layout has no place for.
    """
    tensors = _WRITE[layout](bank, where)
    if bank.output_bias is None:
        return tensors
    if layout != "dmoe":
        raise ValueError(
            f"{where}: {layout}: a bias of the whole layer, as MegaBlocks has it, has no place in Megatron's layer, "
            "where gate weights multiply the experts' biases; only dmoe can hold it"
        )
    return {**tensors, "moe.output_bias": bank.output_bias}


def _read_fields(found: Found, num_experts: int | None) -> Bank:
    up = "gate_up" if "gate_up_proj" in found.tensors else "up"
    proj, bias = found.need(f"{up}_proj"), found.tensors.get(f"{up}_bias")
    if proj.dim() != (4 if up == "gate_up" else 3):
        raise ValueError(f"{found.where}: expected experts of one width, got {up}_proj of {tuple(proj.shape)}")
    flat_bias = None if bias is None else bias.flatten(1)
    biases = flat_bias, found.tensors.get("down_bias"), found.tensors.get("output_bias")
    return Bank(proj.flatten(1, -2), found.need("down_proj"), *biases)


def _read_numbered(found: Found, num_experts: int | None) -> Bank:
    up, down = found.stacked("fc1.weight"), found.stacked("fc2.weight")
    if up is None or down is None:
        missing = "linear_fc1.weight" if up is None else "linear_fc2.weight"
        raise ValueError(f"{found.where}: expected {missing} of every expert, found none")
    return Bank(up, down, found.stacked("fc1.bias"), found.stacked("fc2.bias"))


def _read_grouped(found: Found, num_experts: int | None) -> Bank:
    experts = _counted(found, num_experts)
    weight1, weight2 = found.need("weight1"), found.need("weight2")
    hidden = len(weight1)
    up = weight1.reshape(experts, hidden, -1)  # not its transpose: the shape says (H, E X), the memory (E, H, X)
    return Bank(up.transpose(1, 2), weight2.reshape(experts, -1, hidden).transpose(1, 2))


def _read_megablocks(found: Found, num_experts: int | None) -> Bank:
    experts = _counted(found, num_experts)
    w1, v1, w2 = found.need("mlp.w1"), found.tensors.get("mlp.v1"), found.need("mlp.w2")
    w1 = w1.transpose(1, 2) if w1.dim() == 3 else w1  # its layer with a capacity keeps (E, H, F)
    halves = [half.reshape(experts, -1, w1.shape[-1]) for half in (w1, v1, w2) if half is not None]
    return Bank(torch.cat(halves[:-1], 1), halves[-1].transpose(1, 2), output_bias=found.tensors.get("bias"))


def _counted(found: Found, num_experts: int | None) -> int:
    sizes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items() if name != "bias"}
    elements = [tensor.numel() for name, tensor in found.tensors.items() if name != "bias"]
    if not num_experts or any(count % num_experts for count in elements):
        raise ValueError(
            f"{found.where}: {found.layout} does not tell how many experts it holds: expected a router beside it or "
            f"num_experts, and the right number of ranks, got {num_experts} experts for {sizes}"
        )
    return num_experts


def _write_fields(bank: Bank, prefix: str) -> dict[str, Tensor]:
    up, halves = ("gate_up", (2, -1)) if bank.gated else ("up", (-1,))
    tensors = {f"{up}_proj": bank.up.unflatten(1, halves), "down_proj": bank.down}
    if bank.up_bias is not None and bank.down_bias is not None:
        tensors |= {f"{up}_bias": bank.up_bias.unflatten(1, halves), "down_bias": bank.down_bias}
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _write_numbered(bank: Bank, name: str) -> dict[str, Tensor]:
    kinds = {
        ("1", "weight"): bank.up,
        ("1", "bias"): bank.up_bias,
        ("2", "weight"): bank.down,
        ("2", "bias"): bank.down_bias,
    }
    return {
        name.format(expert=expert, fc=fc, kind=kind): stacked[expert]
        for expert in range(len(bank.up))
        for (fc, kind), stacked in kinds.items()
        if stacked is not None
    }


def _write_grouped(bank: Bank, where: str) -> dict[str, Tensor]:
    if bank.up_bias is not None:
        raise ValueError(f"{where}: grouped: GroupedMLP has no biases, and these experts have; choose sequential or te")
    hidden = bank.up.shape[2]
    weight1 = bank.up.transpose(1, 2).reshape(hidden, -1)  # rows of (E, H, X), counted off anew
    return {"experts.weight1": weight1, "experts.weight2": bank.down.transpose(1, 2).reshape(-1, hidden)}


_READ: dict[str, Callable[[Found, int | None], Bank]] = {
    "dmoe": _read_fields,
    "dmoe_experts": _read_fields,
    "sequential": _read_numbered,
    "te": _read_numbered,
    "grouped": _read_grouped,
    "megablocks": _read_megablocks,
}
_WRITE: dict[str, Callable[[Bank, str], dict[str, Tensor]]] = {
    "dmoe": lambda bank, where: _write_fields(bank, "moe.experts."),
    "dmoe_experts": lambda bank, where: _write_fields(bank, "experts.experts."),
    "sequential": lambda bank, where: _write_numbered(bank, "experts.local_experts.{expert}.linear_fc{fc}.{kind}"),
    "te": lambda bank, where: _write_numbered(bank, "experts.linear_fc{fc}.{kind}{expert}"),
    "grouped": _write_grouped,
}
