"""Where adapters go: the weights of a model's layers that patterns name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from dmoe.expert_slice import local_part
from dmoe.experts import Experts
from dmoe.layer import MoE
from dmoe.lora.factors import ProjectionShape
from dmoe.model_tools import moe_layers
from dmoe.parallel import AllToAllDispatcher
from dmoe.routing import LinearRouter

TARGETS = ("experts.up", "experts.down", "router", "shared_expert.up", "shared_expert.down")


@dataclass(frozen=True)
class Target:
    """A module that adapters stand beside, and what of it they adapt.

    Attributes:
        path: the module's qualified name in the model.
        module: :class:`dmoe.experts.Experts` or a router.
        layer: that it belongs to.
        projections: of experts, by parameter name; empty for a router.
    """

    path: str
    module: Any
    layer: MoE
    projections: dict[str, ProjectionShape]

    @property
    def is_router(self) -> bool:
        """Whether it is one."""
        return not isinstance(self.module, Experts)


def find_targets(model: nn.Module, targets: Sequence[str], layers: str | Iterable[str]) -> list[Target]:
    """Modules of a model's MoE layers that adapters can stand beside, in the model's order.

    Args:
        model: any module.
        targets: patterns of :data:`TARGETS`; ``experts`` and ``shared_expert`` name both of their projections.
        layers: patterns of layers' qualified names.

    Raises:
        ValueError: a pattern that matches nothing, or weights that cannot have adapters.
    """
    patterns = [layers] if isinstance(layers, str) else list(layers)
    everything = moe_layers(model)
    found = {name: layer for name, layer in everything.items() if any(fnmatchcase(name, p) for p in patterns)}
    if not found:
        raise ValueError(
            f"dmoe.lora.add: layers: expected patterns of the names of dmoe.MoE layers {sorted(everything)}, got "
            f"{patterns}"
        )
    wanted = {name: _matches(name, targets) for name in TARGETS}
    for pattern in targets:
        if not any(_matches(name, [pattern]) for name in TARGETS):
            raise ValueError(f"LoRA: targets: expected patterns of {', '.join(TARGETS)}, got {pattern!r}")
    modules: list[Target] = []
    for name, layer in found.items():
        _check_layer(name, layer)
        front = f"{name}." if name else ""
        for part, module in (("experts", layer.experts), ("shared_expert", getattr(layer.shared_expert, "mlp", None))):
            path = front + ("experts" if part == "experts" else "shared_expert.mlp")
            halves = [half for half in ("up", "down") if wanted[f"{part}.{half}"]]
            if halves and module is not None:
                modules.append(Target(path, module, layer, _projections(path, module, halves)))
        if wanted["router"]:
            _check_router(f"{front}router", layer)
            modules.append(Target(f"{front}router", layer.router, layer, {}))
    if not modules:
        raise ValueError(f"LoRA: targets: expected parts that the layers {sorted(found)} have, got {list(targets)}")
    return modules


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """By qualified name, the modules of a model that have adapters: each has a child ``lora``."""
    from dmoe.lora.adapters import AdapterSet

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "_modules", {}).get("lora"), AdapterSet)
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """A pattern names a part, or all that lies inside one."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for pattern in patterns)


def _check_layer(name: str, layer: MoE) -> None:
    if isinstance(layer.dispatcher, AllToAllDispatcher) and layer.config.overlap_degree > 1:
        raise ValueError(
            f"dmoe.lora.add: {name or 'MoE'}: overlap_degree: expected 1 for experts that have adapters, got "
            f"{layer.config.overlap_degree}"
        )


def _check_router(path: str, layer: MoE) -> None:
    router: Any = layer.router
    plain = isinstance(router, LinearRouter) and type(router).logits is LinearRouter.logits
    if not plain:
        raise ValueError(
            f"dmoe.lora.add: {path}: expected a router whose logits are a linear of its weight (E, H), got "
            f"{type(router).__name__}; leave 'router' out of targets"
        )
    _check_plain(f"{path}.weight", router.weight, None)


def _projections(path: str, experts: Any, halves: Sequence[str]) -> dict[str, ProjectionShape]:
    if not isinstance(experts, Experts):
        raise ValueError(f"dmoe.lora.add: {path}: expected dmoe's experts, got {type(experts).__name__} in their place")
    if experts.owned.num_shards > 1:
        raise ValueError(
            f"dmoe.lora.add: {path}: expected whole experts on each rank, got 1 of {experts.owned.num_shards} parts of "
            "their F: the factors that all parts share would get other gradients on each of their ranks"
        )
    widths = () if isinstance(experts.config.ffn_hidden_size, int) else experts.ffn_sizes
    found = {}
    for half, name in (("up", experts.up_name), ("down", "down_proj")):
        if half in halves:
            held = getattr(experts, name)
            if isinstance(held, Tensor):
                _check_plain(f"{path}.{name}", held, experts.owned.mesh)
                held = local_part(held)
            else:
                held = held.value()
            found[name] = ProjectionShape(half == "up", tuple(held.shape), tuple(widths))
    return found


def _check_plain(path: str, weight: Any, mesh: Any) -> None:
    if hasattr(weight, "to_local") and weight.device_mesh != mesh:
        raise ValueError(
            f"dmoe.lora.add: {path}: expected a weight that only expert parallelism spreads over ranks, got a DTensor "
            f"on {weight.device_mesh}: add adapters before fully_shard"
        )
