"""Whole MoE blocks of a Hugging Face model as :class:`dmoe.MoE`, exactly, and back.

For our router, our losses, expert parallelism, and families that compute every expert for every token. Where only the
experts' computation is wanted, ``experts_implementation="dmoe"`` changes less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

import dmoe
from dmoe.integrations.transformers.attached import guard_saving, refuse_attached
from dmoe.integrations.transformers.block_module import MoEBlock
from dmoe.integrations.transformers.blocks_table import config_of, family_of


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The MoE blocks of a model that dmoe can be, by name, each once.

    Raises:
        ValueError: a block that looks like one and is of no known family, or of one that dmoe lacks options for.
    """
    found = {}
    for name, module in model.named_modules():
        if family_of(module) is not None:
            found[name] = module
        elif _looks_like_one(module):
            raise ValueError(
                f"to_dmoe: expected MoE blocks that the table names, got {type(module).__name__} at {name}"
            )
    return found


def to_dmoe(model: nn.Module, *, ep_group: Any = None, loss_group: Any = None, **options: Any) -> list[str]:
    """Put a :class:`dmoe.MoE` in the place of every MoE block, in place: router, experts and shared expert.

    Outputs, losses and gradients are those of the model before (in float32 to rounding; in other dtypes the router
    computes in float32, unless ``router_dtype="input"``). Weights keep their values, dtypes, devices and
    ``requires_grad``; parameters are new ones, so the optimizer is to be made afterwards, and gradients that wait are
    dropped. ``save_pretrained`` and ``state_dict`` keep the model's own names. The model's own auxiliary loss
    (``output_router_logits=True``) is computed as before, and dmoe's losses are off unless ``options`` say otherwise;
    old releases' Llama 4, which looks for router logits at the block itself, finds none.

    Args:
        model: of Transformers, in one piece: not offloaded, quantised, sharded or with adapters.
        ep_group: expert parallelism over these ranks, as :class:`dmoe.MoE` takes it: each keeps its experts.
        loss_group: as :class:`dmoe.MoE` takes it.
        **options: fields of :class:`dmoe.MoEConfig` that the model does not settle itself, such as
            ``load_balancing_coefficient``, ``aux_loss``, ``capacity_factor``, ``backend``; ``num_moe_layers`` is the
            number of blocks.

    Returns:
        The names of the blocks that were replaced; none where all are dmoe's already.

    Raises:
        ValueError: nothing to replace, or a block that dmoe.MoE is not exactly; the model is then as it was.
    """
    blocks = find_blocks(model)
    if not blocks:
        if any(isinstance(module, MoEBlock) for module in model.modules()):
            return []
        raise ValueError(f"to_dmoe: expected a model with MoE blocks, got {type(model).__name__} without any")
    options = {"num_moe_layers": len(blocks), **options}
    new: dict[str, MoEBlock] = {}
    for name, block in blocks.items():
        moe = dmoe.MoE(config_of(block, **options), ep_group=ep_group, loss_group=loss_group, device="meta")
        new[name] = MoEBlock(block, moe)
    _check_alone(model, new)
    taken: list[MoEBlock] = []
    try:
        for made in new.values():
            made.take()
            taken.append(made)
    except BaseException:
        for made in taken:
            made.give_back()
        raise
    _swap(model, {made.theirs: made for made in taken})
    guard_saving()
    return list(blocks)


def from_dmoe(model: nn.Module) -> list[str]:
    """Put Hugging Face's own blocks back where :func:`to_dmoe` took them, with the weights as they are now.

    The very module objects come back, with the values, dtypes and ``requires_grad`` that the layers have by now, and
    whatever was hooked or set on them. Gradients that wait are dropped. With expert parallelism every rank calls this,
    and gets all experts.

    Returns:
        The names of the blocks that were put back.

    Raises:
        ValueError: the model has no block of :func:`to_dmoe`'s, or one that FSDP2 shards; or adapters of ``dmoe.lora``
            or codes of ``dmoe.quant``, for which Hugging Face's blocks have no place.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, MoEBlock)}
    if not blocks:
        raise ValueError(
            f"from_dmoe: expected a model that to_dmoe changed, got {type(model).__name__} without its blocks"
        )
    for name, made in blocks.items():
        refuse_attached("from_dmoe", made, name)
        sharded = {n for n, parameter in made.moe.named_parameters() if hasattr(parameter, "placements")}
        spread = {n for n in sharded if n.startswith("experts.")} if made.moe.experts.distributed else set()
        if sharded != spread or any(hasattr(module, "unshard") for module in made.modules()):
            raise ValueError(f"from_dmoe: expected parameters that FSDP2 does not shard, got a sharded block: {name}")
    _swap(model, {made: made.give_back() for made in blocks.values()})
    return list(blocks)


def _swap(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Replace children wherever they stand."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in new:
                parent._modules[name] = new[child]


def _looks_like_one(module: nn.Module) -> bool:
    """Whether a module of Transformers has stacked experts as a child, and so is a block, of whatever family."""
    if not type(module).__module__.startswith("transformers."):
        return False
    experts = module._modules.get("experts")
    named = {} if experts is None else experts._parameters
    return any(parameter is not None and parameter.dim() == 3 for parameter in named.values())


def _check_alone(model: nn.Module, new: dict[str, MoEBlock]) -> None:
    """Raise ValueError where a block's tensors are not only its own, or cannot be one of dmoe's."""
    names: dict[int, list[str]] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names.setdefault(id(tensor), []).append(name)
    for place, made in new.items():
        if any(hasattr(module, "_hf_hook") for module in made.theirs.modules()):
            raise ValueError(f"to_dmoe: expected a model in one place, got one that accelerate moves: {place}")
        prefix = f"{place}." if place else ""
        state = made.theirs.state_dict(keep_vars=True)
        for name, tensor in state.items():
            if hasattr(tensor, "to_local"):
                raise ValueError(f"to_dmoe: expected whole tensors, got a DTensor: {prefix}{name}")
            if not tensor.is_floating_point():
                raise ValueError(f"to_dmoe: expected floating-point weights, got {tensor.dtype}: {prefix}{name}")
            others = [each for each in names[id(tensor)] if not each.startswith(prefix)]
            if others:
                raise ValueError(
                    f"to_dmoe: expected tensors of one block's own, got {prefix}{name}, which is {others[0]} as well"
                )
        for weight in made.weights:
            if len({state[name].requires_grad for name in weight.theirs}) > 1:
                both = " and ".join(weight.theirs)
                raise ValueError(
                    f"to_dmoe: expected {both} to be trained, or frozen, together, got one of each: {place}"
                )
