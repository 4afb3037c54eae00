"""A job by its module's name: what the ranks import, and takes seconds, the tests need not."""

from __future__ import annotations

import importlib


def call(group, module, function, *arguments):
    """``module.function(group, *arguments)``, on a rank of a :class:`rank_pool.RankPool`."""
    return getattr(importlib.import_module(module), function)(group, *arguments)
