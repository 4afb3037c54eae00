"""Lightning goes by two names, whose classes do not know each other: which one this process uses."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

NAMES = ("lightning.pytorch", "pytorch_lightning")


def lightning() -> ModuleType:
    """The package that is imported already, or the first of the two that is there.

    Raises:
        ImportError: neither is installed.
    """
    for name in sorted(NAMES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ImportError("dmoe.integrations.lightning: expected Lightning, which is not installed: pip install lightning")


pl: Any = lightning()
