"""What ``dmoe.lora`` and ``dmoe.quant`` have put into a model, where Transformers would go on as if it were not there.

Its own implementations of experts read no adapters, and its files have names for neither adapters nor codes. Both are
refused: by a hook on the experts, which runs before whoever computes them, and in ``PreTrainedModel.save_pretrained``,
which has no place for a hook, and so is wrapped when dmoe first has to do with a model.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

import dmoe
from dmoe.integrations.transformers.experts import dmoe_experts
from dmoe.integrations.transformers.versions import registries

# On experts: the handle of the hook. As long as it is pickled with the module, no other hook gets the hook's number.
_GUARD = "_dmoe_guard"
_OUT = "dmoe.lora.merge and remove (dmoe.lora.save_peft keeps adapters in files), dmoe.quant.dequantize"


def attached_to(model: nn.Module) -> dict[str, str]:
    """What a model has beside its parameters, or in their place, by the qualified name of the module that holds it."""
    adapters, codes = dmoe.lora.adapted_modules(model), dmoe.quant.QuantizedProjection
    found = {}
    for path, module in model.named_modules():
        if path in adapters:
            found[f"{path}.lora".lstrip(".")] = "adapters of dmoe.lora"
        if isinstance(module, codes):
            found[path] = "codes of dmoe.quant"
    return found


def refuse_attached(operation: str, model: nn.Module, path: str = "", also: str = "") -> None:
    """Raise ValueError where a model has adapters or codes.

    Args:
        operation: that goes on without them.
        model: the model, or a part of one.
        path: of the part.
        also: one more way out.
    """
    for place, what in attached_to(model).items():
        where = f"{path}.{place}".strip(".")
        raise ValueError(
            f"{operation}: {where}: expected parameters alone, which Transformers knows, got {what}: take them out "
            f"first, {_OUT}{also}"
        )


def guard(experts: Any) -> None:
    """From now on experts that have adapters or codes are not computed by anybody else; twice is once."""
    if not hasattr(experts, _GUARD):
        setattr(experts, _GUARD, experts.register_forward_pre_hook(_check_who_computes))


def unguard(experts: Any) -> None:
    """Undo :func:`guard`."""
    if hasattr(experts, _GUARD):
        getattr(experts, _GUARD).remove()
        delattr(experts, _GUARD)


def computed_by_dmoe(experts: Any) -> bool:
    """Whether the word in the config of experts on Transformers' interface is dmoe's."""
    implementation = getattr(experts.config, "_experts_implementation", None)
    ours: bool = registries().plain.get(implementation, None) is dmoe_experts  # the word is the same for fp8
    return ours


def _check_who_computes(experts: Any, _: Any) -> None:
    if computed_by_dmoe(experts):
        return
    for what in sorted(set(attached_to(experts).values())):
        raise ValueError(
            f"dmoe: {type(experts).__name__}: expected experts that dmoe computes, beside {what} that are in the "
            f"model, got experts_implementation={experts.config._experts_implementation!r}: let dmoe compute them "
            '(experts_implementation="dmoe", or dmoe.integrations.transformers.use(model)); if others are to, take '
            f"them out then, {_OUT}"
        )


def guard_saving() -> None:
    """Let ``save_pretrained`` of every model look for adapters and codes first; twice is once.

    Tensors that are given to it, ``state_dict=``, are what it looks at instead. Where PEFT has put adapters into the
    model itself (``model.add_adapter``) it writes those, and nothing of the model.
    """
    from transformers import PreTrainedModel

    theirs = PreTrainedModel.save_pretrained
    if hasattr(theirs, _GUARD):
        return
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments.get("state_dict")
        named = given is None or any(f"{place}." in name for place in attached_to(self) for name in given)
        if named and not getattr(self, "_hf_peft_config_loaded", False):
            refuse_attached("save_pretrained", self, also="; or torch.save(model.state_dict(), file), for dmoe alone")
        return theirs(self, *args, **kwargs)

    setattr(save_pretrained, _GUARD, True)
    setattr(PreTrainedModel, "save_pretrained", save_pretrained)  # noqa: B010  # mypy takes no other way
