"""An adapter alone, as a state dict that says all that is needed to make it again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.expert_targets import half_of
from dmoe.lora.adapters import Adapter, check_name
from dmoe.lora.config import LoRA
from dmoe.lora.model import attach, build
from dmoe.lora.router import RouterAdapter
from dmoe.lora.targets import PATHS, Target, adapted_modules, find_targets
from dmoe.ops._checks import check_tensors


def state_dict(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """An adapter's tensors, and its options.

    Args:
        model: any module.
        name: of the adapter.

    Returns:
        ``{"config": {module: fields of LoRA}, "tensors": {"<module>.<projection>.a": tensor}}``: nothing but what
        ``torch.load`` reads with ``weights_only=True``. Tensors are the parameters' own memory, detached; of experts on
        other ranks they are ``DTensor``, as in a model's state dict.

    Raises:
        ValueError: no adapter of that name.
    """
    everything = adapted_modules(model)
    held = {path: module.lora for path, module in everything.items() if name in module.lora.names}
    if not held:
        known = sorted({each for module in everything.values() for each in module.lora.names})
        raise ValueError(f"dmoe.lora.state_dict: name: expected one of the model's adapters {known}, got {name!r}")
    tensors = {}
    for path, adapters in held.items():
        of_module = adapters.get_submodule(name).state_dict()
        tensors.update({_join(path, key): value for key, value in of_module.items()})
    return {"config": {path: adapters.config_of(name).to_dict() for path, adapters in held.items()}, "tensors": tensors}


def load_state_dict(
    model: nn.Module, state: Mapping[str, Any], name: str = "default", *, dtype: torch.dtype | None = None
) -> None:
    """Values for an adapter, which is added where it is missing (it is the active one then; nothing is frozen).

    Args:
        model: with the layers that the adapter was made for.
        state: as :func:`state_dict` returns it. Under expert parallelism tensors may be those of all experts.
        name: of the adapter in this model.
        dtype: of the parameters of an adapter that is added; see :func:`dmoe.lora.add`.

    Raises:
        TypeError: something that is no such state.
        ValueError: layers, keys, shapes or options that do not fit; all keys are named. Nothing has changed then.
    """
    operation = "dmoe.lora.load_state_dict"
    put_values(model, *_parts_of(operation, state), name, dtype=dtype, operation=operation)


@torch.no_grad()
def put_values(
    model: nn.Module,
    configs: Mapping[str, LoRA],
    values: Mapping[str, Tensor],
    name: str,
    *,
    dtype: torch.dtype | None,
    operation: str,
) -> None:
    """What :func:`load_state_dict` does with a state's two parts; ``operation`` is what an error names."""
    check_name(operation, name)
    held, left = adapted_modules(model), dict(values)
    fresh: list[tuple[Target, Adapter]] = []
    todo: list[tuple[Tensor, Any]] = []
    loaded: list[Any] = []
    wrong: list[str] = []
    for path, config in configs.items():
        existing = held.get(path)
        if existing is not None and name in existing.lora.merged:
            raise ValueError(
                f"{operation}: {path}: expected an adapter beside the weights, got {name!r}, which is "
                "merged into them; dmoe.lora.unmerge(model) first"
            )
        if existing is not None and name in existing.lora.names:
            adapter = existing.lora.get_submodule(name)
            if adapter.config.scale != config.scale:
                wrong.append(f"{path} has a scale of {adapter.config.scale}, not {config.scale}")
        else:
            target = _target_at(operation, model, path, values)
            adapter = build(target, config, dtype, operation)
            fresh.append((target, adapter))
        loaded.append(adapter)
        for key, parameter in adapter.named_parameters():
            whole = _join(path, key)
            if whole not in left:
                wrong.append(f"{whole} is missing")
                continue
            value = _part_of(adapter, left.pop(whole), parameter)
            if value.shape != parameter.shape:
                wrong.append(f"{whole} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
            else:
                todo.append((parameter, value))
    wrong += [f"{key} is in the way" for key in left]
    if wrong:
        raise ValueError(f"{operation}: expected the tensors of the adapter {name!r}, but {'; '.join(wrong)}")
    for parameter, value in todo:
        parameter.copy_(value)
    for each in loaded:
        each.seed = None  # as after load_state_dict
    if fresh:
        attach(model, name, fresh)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _parts_of(operation: str, state: Any) -> tuple[dict[str, LoRA], dict[str, Tensor]]:
    if not isinstance(state, Mapping) or set(state) != {"config", "tensors"}:
        got = sorted(map(str, state))[:5] if isinstance(state, Mapping) else type(state).__name__
        raise TypeError(
            f"{operation}: state: expected a dict of config and tensors, as dmoe.lora.state_dict returns it, got {got}"
        )
    configs, tensors = state["config"], state["tensors"]
    for part, held in (("config", configs), ("tensors", tensors)):
        got = "other keys" if isinstance(held, Mapping) else type(held).__name__
        if not isinstance(held, Mapping) or not all(isinstance(key, str) for key in held):
            raise TypeError(f"{operation}: {part}: expected a dict with names, got {got}")
    if not configs:
        raise TypeError(f"{operation}: config: expected a dict with names, one at least, got an empty one")
    check_tensors(operation, **tensors)
    return {path: LoRA.from_dict(fields) for path, fields in configs.items()}, dict(tensors)


def _target_at(operation: str, model: nn.Module, path: str, keys: Iterable[str]) -> Target:
    """The module of this path, of which the projections that keys name are adapted."""
    for part, ending in PATHS.items():
        if path == ending or path.endswith(f".{ending}"):
            layer = path.removesuffix(ending).removesuffix(".")
            named = {key.removeprefix(f"{path}.").partition(".")[0] for key in keys if key.startswith(f"{path}.")}
            wanted = [part] if part == "router" else sorted({f"{part}.{half_of(each)}" for each in named})
            return find_targets(model, wanted, layer, operation)[0]
    raise ValueError(
        f"{operation}: config: expected names of modules that end in {', '.join(PATHS.values())}, got {path!r}"
    )


def _part_of(adapter: Any, value: Any, parameter: Tensor) -> Any:
    """What lives here of a value, when that is of all experts."""
    if isinstance(adapter, RouterAdapter) or any(each.projection.widths for each in adapter.factors.values()):
        return value
    return adapter.where.part_of(value, parameter, None)
