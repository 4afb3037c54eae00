"""Adapters of a whole model: adding, choosing, taking out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.experts import Experts
from dmoe.lora.adapters import Adapter, AdapterSet, ExpertAdapter, ExpertAdapters, TokensChoice, check_name
from dmoe.lora.config import LoRA
from dmoe.lora.router import RouterAdapter, RouterAdapters
from dmoe.lora.targets import Target, adapted_modules, find_targets
from dmoe.model_tools import moe_layers
from dmoe.other_experts import experts_in, slice_of
from dmoe.parallel import AllToAllDispatcher

_BLOCKS = itertools.count(1)  # of use, in this process


def add(
    model: nn.Module,
    config: LoRA | None = None,
    *,
    name: str = "default",
    layers: str | Iterable[str] = "*",
    freeze: bool = True,
    dtype: torch.dtype | None = None,
    **fields: Any,
) -> dict[str, nn.Parameter]:
    """Put a low-rank adapter beside weights of every :class:`dmoe.MoE` layer; it alone is active from then on.

    So it does beside experts of other packages' models that dmoe computes, where an integration knows them: those of
    Hugging Face's MoE models after ``dmoe.integrations.transformers.use(model)``. Their layers are named by what holds
    the experts, and of targets they have ``experts``.

    It changes no output before it is trained. Parameters are ``experts.lora.<name>.<projection>.a`` (and ``.b``),
    ``shared_expert.mlp.lora...`` and ``router.lora.<name>.weight...``, behind the layer's own name, and belong to the
    model's state dict. Experts' are spread over ranks like the experts, and begin with the values of one rank if all
    ranks seed PyTorch's default generator alike.

    Args:
        model: any module.
        config: of the adapter; or leave it out and give fields of :class:`LoRA` as keywords.
        name: of the adapter; ``add`` it again under another one for several over one base.
        layers: shell patterns of the names of layers, ``*.[0-3].*`` say; the others are left alone.
        freeze: freeze all other parameters of the model, but those of other adapters. False leaves them: a base that
            is trained gets its gradients too.
        dtype: of the parameters; None is that of the weights. Beside weights held as codes: that of the experts'
            biases, else of the layer's router, else PyTorch's default. Products are in the weights' dtype in any case.

    Returns:
        The adapter's parameters by qualified name, for an optimizer.

    Raises:
        TypeError, ValueError: options that are none, names that are taken, patterns without a match, or weights that
            cannot have adapters; the model is as before.
    """
    config = config_of(config, fields)
    check_name("dmoe.lora.add", name)
    check_dtype("dmoe.lora.add", dtype)
    targets = find_targets(model, config.targets, layers)
    fresh: list[tuple[Target, Adapter]] = []
    for target in targets:
        held = getattr(target.module, "lora", None)
        if held is not None and name in held.names:
            raise ValueError(f"dmoe.lora.add: name: expected one that {target.path} has no adapter of, got {name!r}")
        fresh.append((target, build(target, config, dtype, "dmoe.lora.add")))
    if freeze:
        others = {id(each) for module in adapted_modules(model).values() for each in module.lora.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in others:
                parameter.requires_grad_(False)
    attach(model, name, fresh)
    added = {}
    for target, adapter in fresh:
        prefix = f"{target.path}.lora.{name}."
        added.update({prefix + each: parameter for each, parameter in adapter.named_parameters()})
    return added


def check_dtype(operation: str, dtype: Any) -> None:
    """One that products are computed in, or None.

    Raises:
        TypeError: another.
    """
    if dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{operation}: dtype: expected a floating-point dtype of 2 bytes or more, or None, got {dtype!r}"
        )


def config_of(config: LoRA | None, fields: dict[str, Any]) -> LoRA:
    """A config, or one of fields.

    Raises:
        TypeError: both, something that is none, or fields that there are not.
    """
    if config is None:
        return LoRA(**fields)
    if not isinstance(config, LoRA):
        raise TypeError(f"dmoe.lora.add: config: expected dmoe.lora.LoRA, got {type(config).__name__}")
    if fields:
        raise TypeError(f"dmoe.lora.add: expected a config or fields of one, got both, with {sorted(fields)}")
    return config


def build(target: Target, config: LoRA, dtype: torch.dtype | None, operation: str) -> Adapter:
    """An adapter that fits a target, nowhere yet; ``operation`` is what an error names.

    Raises:
        ValueError: factors that cannot be shared.
    """
    module, router = target.module, getattr(target.layer, "router", None)
    if target.is_router:
        weight = module.weight
        return RouterAdapter(weight, config, device=weight.device, dtype=dtype or weight.dtype)
    experts = experts_in(module)
    where = slice_of(experts)
    for factor in ("a", "b"):
        if getattr(config, f"share_{factor}") and len(where.experts) < where.num_experts:
            raise ValueError(
                f"{operation}: share_{factor}: expected False where ranks hold {len(where.experts)} of "
                f"{where.num_experts} experts, got True: each rank would train the shared factor by its own experts "
                "alone"
            )
    for projection in target.projections.values():
        projection.check_shared(config, operation)
    weights = experts.weights()
    if dtype is None:
        dtype = weights.dtype or getattr(getattr(router, "weight", None), "dtype", None) or torch.get_default_dtype()
    return ExpertAdapter(target.projections, config, where, device=weights.up_proj.device, dtype=dtype)


def attach(model: nn.Module, name: str, fresh: Sequence[tuple[Target, Adapter]]) -> None:
    """Put adapters of one name beside their weights, and let them alone be active in the model."""
    order = names_of(model)
    for target, adapter in fresh:
        module = target.module
        if getattr(module, "lora", None) is None:
            module.lora = (RouterAdapters() if target.is_router else ExpertAdapters()).train(module.training)
        adapter.number = order.get(name, max(order.values(), default=-1) + 1)
        module.lora.put(name, adapter)
        if isinstance(module, Experts):
            module.mark_parameters()
        if target.layer is not None:
            target.layer.ask_ranks_again()
    enable(model)
    set_active(model, name)


def names_of(model: nn.Module) -> dict[str, int]:
    """All adapters' names with their numbers, in the order in which they were added."""
    held = [module.lora for module in adapted_modules(model).values()]
    found = {name: adapters.get_submodule(name).number for adapters in held for name in adapters.names}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def remove(model: nn.Module, name: str = "default") -> None:
    """Take an adapter out of a model; one that is merged stays in the weights, and cannot be unmerged any more.

    What :func:`add` has frozen stays frozen.

    Raises:
        ValueError: no adapter of that name.
    """
    _check_known(model, [name], "remove")
    for module in [each for each in adapted_modules(model).values() if name in each.lora.names]:
        if name in module.lora.merged:  # the weights that are kept are without it, and it stays
            module.lora.base.clear()
        module.lora.drop(name)
        if not module.lora.names:
            module.lora = None
    for layer in moe_layers(model).values():
        layer.ask_ranks_again()


def set_active(model: nn.Module, names: str | Sequence[str]) -> None:
    """Choose the adapters that are added to the weights; of several the sum.

    Those that are not chosen get no gradients. Parameters stay trained or frozen as they were.

    Raises:
        ValueError: a name that no layer has, or that stands twice.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"dmoe.lora.set_active: expected each name once, got {wanted}")
    _check_known(model, wanted, "set_active")
    for module in adapted_modules(model).values():
        module.lora.active = tuple(name for name in wanted if name in module.lora.names)


def enable(model: nn.Module) -> None:
    """Undo :func:`disable`."""
    for module in adapted_modules(model).values():
        module.lora.enabled = True


def disable(model: nn.Module) -> Disabled:
    """Let the model run without its adapters; ``with disable(model):`` for a while.

    Raises:
        ValueError: adapters that are merged, without which there are no weights.
    """
    held = adapted_modules(model)
    for path, module in held.items():
        if module.lora.merged:
            raise ValueError(
                f"dmoe.lora.disable: {path}: expected adapters beside the weights, got {list(module.lora.merged)} "
                "merged into them; dmoe.lora.unmerge(model) first"
            )
    before = [(module.lora, module.lora.enabled) for module in held.values()]
    for adapters, _ in before:
        adapters.enabled = False
    return Disabled(before)


class Disabled:
    """What :func:`disable` returns: as a context manager it brings back what was there before."""

    def __init__(self, before: Sequence[tuple[AdapterSet, bool]]) -> None:
        self._before = before

    def __enter__(self) -> Disabled:
        return self

    def __exit__(self, *error: object) -> None:
        for adapters, enabled in self._before:
            adapters.enabled = enabled


@contextmanager
def use(model: nn.Module, adapter_ids: Tensor, names: Sequence[str] | None = None) -> Iterator[None]:
    """``with use(model, ids):`` one adapter for each token, in every layer that is called inside.

    Layers compute all of them together, and each adapter is trained by its own tokens. Where a name stands beside no
    weights of a layer, its tokens take the base there. Under activation checkpointing backward, too, belongs inside.

    Args:
        model: whose layers have them.
        adapter_ids: integers of all tokens, in x's leading dimensions or flat: positions in ``names``, -1 for none.
        names: adapters to choose from; None for all, in the order in which they were added.

    Raises:
        TypeError: ids that are no integers, names that are no sequence.
        ValueError: names that no layer has or that are merged, adapters that are disabled, or layers with expert
            parallelism, where tokens reach experts without their ids. The layers raise it for another number of ids
            than tokens.
        RuntimeError: from the layers, for ids on the CPU that are neither positions in ``names`` nor -1; and from a
            backward behind the block, where activation checkpointing computes layers again.
    """
    held = adapted_modules(model)
    if isinstance(names, str):
        raise TypeError(f"dmoe.lora.use: names: expected a sequence of names, got {names!r}")
    names = tuple(names_of(model) if names is None else names)
    _check_known(model, names, "use")
    if not isinstance(adapter_ids, Tensor) or adapter_ids.dtype not in (torch.int32, torch.int64):
        got = adapter_ids.dtype if isinstance(adapter_ids, Tensor) else type(adapter_ids).__name__
        raise TypeError(f"dmoe.lora.use: adapter_ids: expected an int32 or int64 tensor, got {got}")
    for path, module in held.items():
        if merged := sorted(set(names) & set(module.lora.merged)):
            raise ValueError(f"dmoe.lora.use: {path}: expected adapters beside the weights, got {merged} merged")
        if not module.lora.enabled:
            raise ValueError(
                f"dmoe.lora.use: {path}: expected adapters that work, got disabled ones: enable(model) first"
            )
    for path, layer in moe_layers(model).items():
        if isinstance(layer.dispatcher, AllToAllDispatcher) and layer.dispatcher.num_ranks > 1:
            raise ValueError(
                f"dmoe.lora.use: {path or 'MoE'}: expected experts that are all on this rank, got "
                f"{layer.dispatcher.num_ranks} ranks: tokens travel without their adapters' numbers"
            )
    before = [(module.lora, module.lora.by_token) for module in held.values()]
    block = torch.empty(0, next(_BLOCKS), device=adapter_ids.device)
    chosen = TokensChoice(names, adapter_ids.reshape(-1), block)
    for adapters, _ in before:
        adapters.by_token = chosen
    try:
        yield
    finally:
        for adapters, outer in before:
            adapters.by_token = outer


def _check_known(model: nn.Module, names: Sequence[str], operation: str) -> None:
    """There are names, and each is an adapter's of some module.

    Raises:
        ValueError: it is not so.
    """
    known = list(names_of(model))
    for name in names:
        if name not in known:
            raise ValueError(f"dmoe.lora.{operation}: expected names of the model's adapters {known}, got {name!r}")
    if not names:
        raise ValueError(f"dmoe.lora.{operation}: expected at least one name of the model's adapters {known}, got none")
