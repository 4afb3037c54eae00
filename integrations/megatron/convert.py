"""Plain state dicts of Megatron's own MoE layers, and of MegaBlocks' fork, in dmoe's names and shapes, and back.

Only experts and MegaBlocks' router change their names; whatever else a model's state dict holds passes through, below
any prefix. A file of an expert-parallel rank holds that rank's experts under local numbers in every layout, so ranks
are converted one by one, and :func:`convert_ranks` also brings them to another number of ranks, by global numbers.

Layouts, for E experts of a rank, with X = F, or 2 F where experts are gated (gate, then up):

=============  ====================================================================================================
``dmoe``       ``experts.up_proj (E, F, H)`` or ``experts.gate_up_proj (E, 2, F, H)``, ``experts.down_proj (E, H, F)``
``sequential``  ``experts.local_experts.{i}.linear_fc1.weight (X, H)``, ``.linear_fc2.weight (H, F)`` (SequentialMLP)
``te``         ``experts.linear_fc1.weight{i} (X, H)``, ``experts.linear_fc2.weight{i} (H, F)`` (TEGroupedMLP)
``grouped``    ``experts.weight1 (H, E X)``, whose memory is (E, H, X); ``experts.weight2 (E F, H)`` (GroupedMLP)
``megablocks``  ``experts.mlp.w1``, ``v1``, ``w2 (E F, H)``, ``experts.bias (H)``, ``router.layer.weight``; only read
=============  ====================================================================================================

Tensors that a process of Transformer Engine keeps beside its weights (``_extra_state``) have no counterpart and are left
out of dmoe's; Transformer Engine makes them anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmoe.checkpoint import merge_states, split_state

Layout = Literal["dmoe", "sequential", "te", "grouped"]
LAYOUTS: tuple[Layout, ...] = ("dmoe", "sequential", "te", "grouped")

_KEY = re.compile(r"(?P<layer>(?:.*\.)?)experts\.(?P<name>.+)")
_NAMES: dict[str, re.Pattern[str]] = {
    "dmoe": re.compile(r"gate_up_proj|up_proj|down_proj|gate_up_bias|up_bias|down_bias"),
    "sequential": re.compile(r"local_experts\.(?P<expert>\d+)\.linear_fc(?P<fc>[12])\.(?P<kind>weight|bias)"),
    "te": re.compile(r"linear_fc(?P<fc>[12])\.(?P<kind>weight|bias)(?P<expert>\d+)"),
    "grouped": re.compile(r"weight[12]"),
    "megablocks": re.compile(r"mlp\.(w1|v1|w2)|bias"),
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
        if not fits:
            raise ValueError(f"{where}: expected projections (E, F or 2 F, H) and (E, H, F), got {up} and {down}")
        return self


@torch.no_grad()
def convert_state(
    state: Mapping[str, Any], to: Layout, *, expert_parallel_size: int = 1, num_experts: int | None = None
) -> dict[str, Any]:
    """A model's state dict with the experts of every MoE layer in another layout.

    Args:
        state: ``model.state_dict()`` of one rank, with experts in any layout, found by their names.
        to: ``dmoe``, ``sequential``, ``te`` or ``grouped``.
        expert_parallel_size: ranks that the experts of each layer are spread over. ``grouped`` and ``megablocks`` keep
            no dimension for experts, so their number here is that of the router's rows over this.
        num_experts: of a layer on all ranks together, for states without routers.

    Returns:
        A new dict in the order of the old one. Experts have memory of their own; other values are the given ones.

    Raises:
        ValueError: a layer whose experts are in no known layout or incomplete, or a state without any.
    """
    if to not in LAYOUTS:
        raise ValueError(f"convert: to: expected one of {', '.join(LAYOUTS)}, got {to!r}")
    layers = _find(state)
    if not layers:
        raise ValueError("convert: expected experts of Megatron, MegaBlocks or dmoe in the state dict, found none")
    converted: dict[str, Any] = {}
    done: set[str] = set()
    for key, value in state.items():
        found = _KEY.fullmatch(key)
        if found is None or found["layer"] not in layers:
            converted[_router_key(key, layers)] = value
        elif found["layer"] not in done:
            done.add(found["layer"])
            prefix = found["layer"]
            count = _experts_here(state, prefix, expert_parallel_size, num_experts)
            bank = _READ[layers[prefix].layout](layers[prefix], count).check(f"convert: {prefix}experts")
            for name, tensor in _WRITE[to](bank).items():  # a file would hold a view's whole memory
                converted[f"{prefix}experts.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
    return converted


def convert_ranks(
    states: Sequence[Mapping[str, Any]], to: Layout, *, ranks: int | None = None, num_experts: int | None = None
) -> list[dict[str, Any]]:
    """The state dicts of all expert-parallel ranks, in another layout and for another number of ranks.

    Rank r of W holds experts ``r E / W`` to ``(r + 1) E / W - 1`` in order; what is not an expert must be alike on all.

    Args:
        states: of each rank, in order.
        to: see :func:`convert_state`.
        ranks: how many states to make; None for as many as were given.
        num_experts: see :func:`convert_state`.

    Raises:
        ValueError: see :func:`convert_state` and :func:`dmoe.checkpoint.merge_states`.
    """
    given = len(states)
    parts = [convert_state(state, "dmoe", expert_parallel_size=given, num_experts=num_experts) for state in states]
    if ranks is not None and ranks != given:
        whole = merge_states(parts) if given > 1 else parts[0]
        parts = split_state(whole, ranks) if ranks > 1 else [whole]
    return parts if to == "dmoe" else [convert_state(part, to) for part in parts]


# -------------------------------------------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class _Layer:
    """A layer's expert tensors under their names behind ``experts.``."""

    prefix: str
    layout: str
    tensors: dict[str, Tensor]

    def numbered(self, fc: str, kind: str) -> Tensor | None:
        """One kind of tensor of all local experts, stacked; None where they have none."""
        mine: dict[int, Tensor] = {}
        for name, tensor in self.tensors.items():
            found = _NAMES[self.layout].fullmatch(name)
            if found is not None and (found["fc"], found["kind"]) == (fc, kind):
                mine[int(found["expert"])] = tensor
        if not mine:
            return None
        if sorted(mine) != list(range(len(mine))):
            raise ValueError(
                f"convert: {self.prefix}experts: expected linear_fc{fc}.{kind} of local experts 0 to {max(mine)}, got "
                f"{sorted(mine)}"
            )
        shapes = {tuple(tensor.shape) for tensor in mine.values()}
        if len(shapes) > 1:
            raise ValueError(f"convert: {self.prefix}experts: expected experts of one shape, got {sorted(shapes)}")
        return torch.stack([mine[expert] for expert in range(len(mine))])

    def need(self, name: str) -> Tensor:
        """A tensor that the layout has."""
        if name not in self.tensors:
            raise ValueError(f"convert: {self.prefix}experts: expected {name} beside {', '.join(self.tensors)}")
        return self.tensors[name]


def _find(state: Mapping[str, Any]) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    for key, value in state.items():
        found = _KEY.fullmatch(key) if isinstance(key, str) else None
        if found is None or found["name"].rpartition(".")[2] == "_extra_state":
            continue
        prefix, name = found["layer"], found["name"]
        layout = next((layout for layout, names in _NAMES.items() if names.fullmatch(name)), None)
        known = layers[prefix].layout if prefix in layers else layout
        if layout is None or layout != known or not isinstance(value, Tensor):
            raise ValueError(
                f"convert: {key}: expected a tensor of a known layout of experts, got {type(value).__name__}"
            )
        layers.setdefault(prefix, _Layer(prefix, layout, {})).tensors[name] = value
    return layers


def _router_key(key: str, layers: Mapping[str, _Layer]) -> str:
    """MegaBlocks' router has its matrix one level down."""
    prefix, found, _ = key.partition("router.layer.weight")
    ours = found and prefix in layers and layers[prefix].layout == "megablocks"
    return f"{prefix}router.weight" if ours else key


def _experts_here(state: Mapping[str, Any], prefix: str, ranks: int, num_experts: int | None) -> int | None:
    """How many experts of a layer this state holds; None if nothing tells."""
    if num_experts is None:
        names = (f"{prefix}router.weight", f"{prefix}router.layer.weight")
        router = next((state[name] for name in names if name in state), None)
        if router is None:
            return None
        num_experts = len(router)
    if num_experts % ranks:
        raise ValueError(f"convert: {prefix}experts: expected a multiple of {ranks} ranks, got {num_experts} experts")
    return num_experts // ranks


# ------------------------------------------------------------------------------------------------------------- reading


def _from_dmoe(layer: _Layer, count: int | None) -> Bank:
    ups = [name for name in ("gate_up_proj", "up_proj") if name in layer.tensors]
    up = layer.need(ups[0] if ups else "up_proj")
    biases = layer.tensors.get(("gate_up" if "gate_up_proj" in layer.tensors else "up") + "_bias")
    if up.dim() != (4 if "gate_up_proj" in layer.tensors else 3):
        raise ValueError(f"convert: {layer.prefix}experts: expected experts of one width, got {tuple(up.shape)}")
    down_bias = layer.tensors.get("down_bias")
    return Bank(up.flatten(1, -2), layer.need("down_proj"), None if biases is None else biases.flatten(1), down_bias)


def _from_numbered(layer: _Layer, count: int | None) -> Bank:
    up, down = layer.numbered("1", "weight"), layer.numbered("2", "weight")
    if up is None or down is None:
        raise ValueError(
            f"convert: {layer.prefix}experts: expected linear_fc1 and linear_fc2, got {list(layer.tensors)}"
        )
    return Bank(up, down, layer.numbered("1", "bias"), layer.numbered("2", "bias"))


def _from_grouped(layer: _Layer, count: int | None) -> Bank:
    experts = _counted(layer, count)
    weight1, weight2 = layer.need("weight1").contiguous(), layer.need("weight2").contiguous()
    hidden = len(weight1)
    up = weight1.view(experts, hidden, -1).transpose(1, 2)
    return Bank(up, weight2.view(experts, -1, hidden).transpose(1, 2))


def _from_megablocks(layer: _Layer, count: int | None) -> Bank:
    experts = _counted(layer, count)
    w1, v1, w2 = layer.need("mlp.w1"), layer.tensors.get("mlp.v1"), layer.need("mlp.w2")
    if w1.dim() == 3:  # MoE with a capacity keeps w1 as (E, H, F)
        w1 = w1.transpose(1, 2)
    hidden = w1.shape[-1]
    w1, w2 = w1.reshape(experts, -1, hidden), w2.reshape(experts, -1, hidden)
    up = w1 if v1 is None else torch.cat([w1, v1.reshape(experts, -1, hidden)], 1)
    return Bank(up, w2.transpose(1, 2), output_bias=layer.tensors.get("bias"))


def _counted(layer: _Layer, count: int | None) -> int:
    sizes = [tensor.numel() for name, tensor in layer.tensors.items() if name != "bias"]
    if count is None or any(size % count for size in sizes):
        raise ValueError(
            f"convert: {layer.prefix}experts: the layout {layer.layout} does not tell how many experts it holds: expected "
            f"a router beside it, or num_experts, and the right number of ranks, got {count} experts for sizes {sizes}"
        )
    return count


_READ: dict[str, Callable[[_Layer, int | None], Bank]] = {
    "dmoe": _from_dmoe,
    "sequential": _from_numbered,
    "te": _from_numbered,
    "grouped": _from_grouped,
    "megablocks": _from_megablocks,
}


# ------------------------------------------------------------------------------------------------------------- writing
def _to_dmoe(bank: Bank) -> dict[str, Tensor]:
    halves = (lambda tensor: tensor.unflatten(1, (2, -1))) if bank.gated else (lambda tensor: tensor)
    name = "gate_up" if bank.gated else "up"
    tensors = {f"{name}_proj": halves(bank.up), "down_proj": bank.down}
    if bank.up_bias is not None and bank.down_bias is not None:
        tensors |= {f"{name}_bias": halves(bank.up_bias), "down_bias": bank.down_bias}
    return tensors


def _to_numbered(bank: Bank, name: str) -> dict[str, Tensor]:
    kinds = {
        ("1", "weight"): bank.up,
        ("2", "weight"): bank.down,
        ("1", "bias"): bank.up_bias,
        ("2", "bias"): bank.down_bias,
    }
    tensors = {}
    for expert in range(len(bank.up)):
        for (fc, kind), stacked in kinds.items():
            if stacked is not None:
                tensors[name.format(expert=expert, fc=fc, kind=kind)] = stacked[expert]
    return tensors


def _to_grouped(bank: Bank) -> dict[str, Tensor]:
    if bank.up_bias is not None or bank.down_bias is not None:
        raise ValueError("convert: to: GroupedMLP has no biases, and these experts have; choose sequential or te")
    hidden = bank.up.shape[2]
    weight1 = bank.up.transpose(1, 2).contiguous().view(hidden, -1)
    return {"weight1": weight1, "weight2": bank.down.transpose(1, 2).reshape(-1, hidden)}


_WRITE: dict[str, Callable[[Bank], dict[str, Tensor]]] = {
    "dmoe": _to_dmoe,
    "sequential": lambda bank: _to_numbered(bank, "local_experts.{expert}.linear_fc{fc}.{kind}"),
    "te": lambda bank: _to_numbered(bank, "linear_fc{fc}.{kind}{expert}"),
    "grouped": _to_grouped,
}
