"""``register``, ``use`` and ``restore``: who computes a model's experts."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable
from typing import Any

from torch import nn

import dmoe
from dmoe.integrations.transformers.attached import guard_saving, refuse_attached, unguard
from dmoe.integrations.transformers.experts import dmoe_experts
from dmoe.integrations.transformers.fp8 import dmoe_fp8_experts
from dmoe.integrations.transformers.held_experts import held_experts
from dmoe.integrations.transformers.lora import hand_over, take_back
from dmoe.integrations.transformers.patches import FORWARDS, forward_for
from dmoe.integrations.transformers.versions import check_version, on_interface, registries

_WAS = "_dmoe_was"  # on a module: the implementation that its config named; an attribute that no file and no state has
_LOOKS_LIKE_MOE = re.compile(r"expert|moe|router|switch", re.IGNORECASE)


def register(name: str = "dmoe") -> None:
    """Make ``name`` an implementation of experts, for every Transformers model with such a switch.

    ``from_pretrained(..., experts_implementation="dmoe")`` and ``model.set_experts_implementation("dmoe")`` know it
    from then on, for weights in fp8 too. Doing it again changes nothing. ``save_pretrained`` of all models
    refuses those with adapters of ``dmoe.lora`` or codes of ``dmoe.quant`` from then on: its files have no names for
    them.

    Args:
        name: the word.

    Raises:
        ImportError: no transformers, or one before 5.7.
        ValueError: a name that somebody else has.
    """
    check_version()
    ours = (dmoe_experts, dmoe_fp8_experts)
    for registry, function in zip(registries(), ours, strict=True):
        if {"eager": None, **registry}.get(name, function) is not function:
            raise ValueError(f"register: name: expected a free one, got {name!r}, which Transformers knows already")
    for registry, function in zip(registries(), ours, strict=True):
        registry.register(name, function)
    dmoe.register_experts(held_experts)  # for dmoe.lora and dmoe.quant
    guard_saving()


def use(model: nn.Module) -> list[str]:
    """Let dmoe compute the experts of a model that is there, whether Transformers' switch reaches them or not.

    Experts with a switch get the word; the blocks of Llama 4, LongCat-Flash, DBRX, JetMoE and Step-3.7 another
    ``forward``, on the modules themselves; PEFT's adapters of experts hand their
    factors over. Parameters and their names stay, and so does what is saved. Doing it again changes nothing.

    Args:
        model: a model, adapted by PEFT or not, or a part of one.

    Returns:
        Names of the modules that dmoe computes, in the model's order.

    Raises:
        ImportError: no transformers, or one before 5.7.
        ValueError: nothing in it that dmoe could compute; or a forward that somebody has replaced already. The model is
            as it was.
    """
    register()
    modules = dict(model.named_modules())
    switched = {name: module for name, module in modules.items() if on_interface(module)}
    patched = {name: (each, forward) for name, each in modules.items() if (forward := forward_for(each)) is not None}
    if not switched and not patched:
        raise ValueError(f"use: expected a model with experts that dmoe can compute, got {_what_it_is(model)}")
    for name, (module, _) in patched.items():
        _check_own(name, module)
    for module in switched.values():
        if not hasattr(module, _WAS):
            setattr(module, _WAS, module.config._experts_implementation)
    for module in switched.values():
        _name_implementation(module, "dmoe")
    hand_over(model)
    for module, forward in patched.values():
        module.__dict__[_slot(module)] = functools.partial(forward, module)
    return [name for name in modules if name in switched or name in patched]


def restore(model: nn.Module) -> list[str]:
    """Undo :func:`use`: every forward and every named implementation is what it was.

    Args:
        model: one that :func:`use` was called on, or a part or a copy of one; of others nothing is changed.

    Returns:
        Names of the modules that dmoe does not compute any more.

    Raises:
        ValueError: experts with adapters of ``dmoe.lora``, or codes of ``dmoe.quant``, which nobody else would heed.
    """
    for name, module in model.named_modules():
        if hasattr(module, _WAS):
            refuse_attached("restore", module, name)
    restored = []
    take_back(model)
    for name, module in model.named_modules():
        if hasattr(module, _WAS):
            _name_implementation(module, getattr(module, _WAS))
            delattr(module, _WAS)
            unguard(module)
            restored.append(name)
        for slot in ("forward", "_old_forward"):
            if _is_ours(vars(module).get(slot)):
                if slot == "forward":
                    del module.__dict__[slot]
                else:
                    module.__dict__[slot] = types.MethodType(type(module).forward, module)
                restored.append(name)
    return restored


def _name_implementation(module: Any, name: str | None) -> None:
    module.config._experts_implementation = {"": name}  # the dict form: of this config alone, not of those under it


def _slot(module: nn.Module) -> str:
    """Where the forward of a module is that has one of its own: behind accelerate's, if that has hooked it."""
    return "_old_forward" if "_old_forward" in vars(module) and "_hf_hook" in vars(module) else "forward"


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, functools.partial) and forward.func in FORWARDS.values()


def _check_own(name: str, module: nn.Module) -> None:
    """A forward that somebody has put in the place of the class's own is his: to replace it would lose what it does."""
    own: Callable[..., Any] | None = vars(module).get(_slot(module))
    of_class = isinstance(own, types.MethodType) and own.__func__ is type(module).forward
    if own is not None and not of_class and not _is_ours(own):
        raise ValueError(
            f"use: {name}: expected the forward of {type(module).__name__}, got one that is replaced already: by a "
            "tensor or expert parallel plan, perhaps, under which dmoe does not compute this model"
        )


def _what_it_is(model: nn.Module) -> str:
    """What somebody may have taken for experts."""
    kinds = {type(module).__name__ for module in model.modules() if module is not model}
    seen = sorted(kind for kind in kinds if _LOOKS_LIKE_MOE.search(kind))
    held = f"whose {', '.join(seen)} dmoe does not know" if seen else "which is dense"
    return f"{type(model).__name__}, {held}"
