"""Triton's interpreter without its largest waste: it looks through all of ``triton.language`` at every call of a device
function, to replace what the kernel's launch has replaced already. That is a quarter of what our kernels take there.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import SimpleNamespace


def install():
    """Where the interpreter is loaded: from now on a launch replaces the language, and calls inside it do not."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    replace = getattr(interpreter, "_patch_lang", None)
    if replace is None or hasattr(replace, "inside"):  # not loaded, or done; or a Triton that does it another way
        return
    nothing = SimpleNamespace(restore=lambda: None)

    @functools.cache
    def languages(function):
        """What of the language a function sees, and so gets replaced for it."""
        seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return frozenset(module.__name__ for module in seen if module.__name__.startswith("triton.language"))

    @functools.wraps(replace)
    def once(function):
        if once.inside is not None and languages(function) <= once.inside:
            return nothing
        scope = replace(function)
        if once.inside is None:
            once.inside, restore = languages(function), scope.restore

            def end():
                once.inside = None
                restore()

            scope.restore = end
        return scope

    once.inside = None
    interpreter._patch_lang = once
