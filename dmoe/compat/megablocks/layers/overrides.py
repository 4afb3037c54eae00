"""Whether a module is still as it was written here, so that one fused operation may stand for its steps.

MegaBlocks computes in steps that users override, hook and patch. Whoever does so gets the steps, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.modules import module as modules

_Class = TypeVar("_Class", bound=type)


def steps(*names: str) -> Callable[[_Class], _Class]:
    """Class decorator: these methods are what a fused operation replaces, besides those of the parents."""

    def remember(cls: _Class) -> _Class:
        known = (*getattr(cls, "_steps", {}), *names)
        cls._steps = {name: getattr(cls, name) for name in known}  # type: ignore[attr-defined]
        return cls

    return remember


def is_untouched(module: nn.Module) -> bool:
    """Whether every one of those methods is the one written here: no subclass, no patch of a class or an object."""
    own = getattr(type(module), "_steps", None)
    if own is None:
        return False
    return not any(name in module.__dict__ or getattr(type(module), name) is not step for name, step in own.items())


def is_unwatched(module: nn.Module) -> bool:
    """Whether nobody would notice that a module is not called: it has no hook, and no compiled form of its own."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
        modules._global_forward_pre_hooks,
        modules._global_forward_hooks,
        modules._global_backward_pre_hooks,
        modules._global_backward_hooks,
    )
    return not any(hooks) and module._compiled_call_impl is None
