"""Groups of ranks that all layers share: each new one costs time, and on GPUs memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

# By the group of all ranks, which they end with: a new one, after destroy_process_group, has none.
_MADE: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def made_once(key: Any, make: Callable[[], Any]) -> Any:
    """What ``make`` returned for this key; every rank has to ask for the same keys in the same order."""
    made = _MADE.setdefault(dist.group.WORLD, {})
    if key not in made:
        made[key] = make()
    return made[key]
