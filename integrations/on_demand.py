"""Names of a package that are found when they are asked for: importing it then imports no framework."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def on_demand(
    package: str, home: Mapping[str, str], before: Callable[[str], None] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__``.

    Args:
        package: its name.
        home: by public name, the module in the package that has it.
        before: called with a name that is asked for the first time, to refuse it in words.
    """

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if before is not None:
            before(name)
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)  # where Megatron's --spec looks for it
        return value

    return find, lambda: sorted(home)
