"""Where adapters go: the weights of a model's layers that patterns name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from dmoe.expert_slice import local_part
from dmoe.expert_targets import HALVES, as_patterns, check_patterns, fields_of, matches
from dmoe.expert_targets import PATHS as EXPERTS_PATHS
from dmoe.expert_targets import TARGETS as EXPERTS_TARGETS
from dmoe.experts import Experts
from dmoe.layer import MoE
from dmoe.lora.adapters import AdapterSet
from dmoe.lora.factors import ProjectionShape
from dmoe.model_tools import moe_layers
from dmoe.other_experts import experts_in
from dmoe.parallel import AllToAllDispatcher
from dmoe.routing import LinearRouter

# Adapters stand beside routers too.
TARGETS = (*EXPERTS_TARGETS, "router")
PATHS = {**EXPERTS_PATHS, "router": "router"}


@dataclass(frozen=True)
class Target:
    """A module that adapters stand beside, and what of it they adapt.

    Attributes:
        path: the module's qualified name in the model.
        module: :class:`dmoe.experts.Experts`, a router, or a module of somebody else's that holds experts.
        layer: that it belongs to; None for somebody else's.
        projections: of experts, by parameter name; empty for a router.
    """

    path: str
    module: Any
    layer: MoE | None
    projections: dict[str, ProjectionShape]

    @property
    def is_router(self) -> bool:
        """Whether it is one."""
        return not self.projections


def find_targets(
    model: nn.Module, targets: Sequence[str], layers: str | Iterable[str], operation: str = "dmoe.lora.add"
) -> list[Target]:
    """Modules of a model's MoE layers that adapters can stand beside, in the model's order.

    Args:
        model: any module.
        targets: patterns of :data:`TARGETS`; ``experts`` and ``shared_expert`` name both of their projections.
        layers: patterns of layers' qualified names.
        operation: that errors name.

    Raises:
        ValueError: a pattern that matches nothing, or weights that cannot have adapters.
    """
    patterns = [layers] if isinstance(layers, str) else list(as_patterns(operation, layers, "layers"))
    everything, others = moe_layers(model), _others(model)
    found = {name: layer for name, layer in everything.items() if any(fnmatchcase(name, p) for p in patterns)}
    wanted_others = {
        path: each for path, each in others.items() if any(fnmatchcase(path.rpartition(".")[0], p) for p in patterns)
    }
    if not found and not wanted_others:
        raise ValueError(
            f"{operation}: layers: expected patterns of the names of dmoe.MoE layers "
            f"{sorted([*everything, *(path.rpartition('.')[0] for path in others)])}, got {patterns}"
        )
    check_patterns(operation, targets, TARGETS)
    wanted = {name: matches(name, targets) for name in TARGETS}
    modules: list[Target] = []
    for name, layer in found.items():
        _check_layer(operation, name, layer)
        front = f"{name}." if name else ""
        for part, module in (("experts", layer.experts), ("shared_expert", getattr(layer.shared_expert, "mlp", None))):
            path = front + PATHS[part]
            halves = [half for half in HALVES if wanted[f"{part}.{half}"]]
            if halves and module is not None:
                modules.append(Target(path, module, layer, _projections(operation, path, module, halves)))
        if wanted["router"]:
            path = front + PATHS["router"]
            _check_router(operation, path, layer)
            modules.append(Target(path, layer.router, layer, {}))
    for path, (module, experts) in wanted_others.items():
        halves = [half for half in HALVES if wanted[f"experts.{half}"]]
        if halves:
            projections = _projections_of_others(operation, path, module, experts, halves)
            modules.append(Target(path, module, None, projections))
    if not modules:
        there = sorted([*found, *wanted_others])
        raise ValueError(f"{operation}: targets: expected parts that the layers {there} have, got {list(targets)}")
    return modules


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """By qualified name, the modules of a model that have adapters: each has a child ``lora``."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "_modules", {}).get("lora"), AdapterSet)
    }


def _others(model: nn.Module) -> dict[str, tuple[nn.Module, Any]]:
    """Experts that are not dmoe's modules: by path the module, and what is known of it."""
    return {
        path: (module, experts)
        for path, module in model.named_modules()
        if not isinstance(module, Experts) and (experts := experts_in(module)) is not None
    }


def _projections_of_others(
    operation: str, path: str, module: Any, experts: Any, halves: Sequence[str]
) -> dict[str, ProjectionShape]:
    fields = fields_of(experts)
    for name in fields.values():
        if isinstance(held := getattr(module, name), Tensor):
            _check_plain(operation, f"{path}.{name}", held, None)
    weights = experts.weights()
    of_half = {"up": weights.up_proj, "down": weights.down_proj}
    return {
        fields[half]: ProjectionShape(half == "up", tuple(of_half[half].shape)) for half in HALVES if half in halves
    }


def _check_layer(operation: str, name: str, layer: MoE) -> None:
    if isinstance(layer.dispatcher, AllToAllDispatcher) and layer.config.overlap_degree > 1:
        raise ValueError(
            f"{operation}: {name or 'MoE'}: overlap_degree: expected 1 for experts that have adapters, got "
            f"{layer.config.overlap_degree}"
        )


def _check_router(operation: str, path: str, layer: MoE) -> None:
    router: Any = layer.router
    plain = isinstance(router, LinearRouter) and type(router).logits is LinearRouter.logits
    if not plain:
        raise ValueError(
            f"{operation}: {path}: expected a router whose logits are a linear of its weight (E, H), got "
            f"{type(router).__name__}; leave 'router' out of targets"
        )
    _check_plain(operation, f"{path}.weight", router.weight, None)


def _projections(operation: str, path: str, experts: Any, halves: Sequence[str]) -> dict[str, ProjectionShape]:
    if not isinstance(experts, Experts):
        raise ValueError(f"{operation}: {path}: expected dmoe's experts, got {type(experts).__name__} in their place")
    if experts.owned.num_shards > 1:
        raise ValueError(
            f"{operation}: {path}: expected whole experts on each rank, got 1 of {experts.owned.num_shards} parts of "
            "their F: the factors that all parts share would get other gradients on each of their ranks"
        )
    widths = () if isinstance(experts.config.ffn_hidden_size, int) else experts.ffn_sizes
    found = {}
    for half, name in fields_of(experts).items():
        if half in halves:
            held = getattr(experts, name)
            if isinstance(held, Tensor):
                _check_plain(operation, f"{path}.{name}", held, experts.owned.mesh)
                held = local_part(held)
            else:
                held = held.value()
            found[name] = ProjectionShape(half == "up", tuple(held.shape), tuple(widths))
    return found


def _check_plain(operation: str, path: str, weight: Any, mesh: Any) -> None:
    if hasattr(weight, "to_local") and weight.device_mesh != mesh:
        raise ValueError(
            f"{operation}: {path}: expected a weight that only expert parallelism spreads over ranks, got a DTensor "
            f"on {weight.device_mesh}: add adapters before fully_shard"
        )
