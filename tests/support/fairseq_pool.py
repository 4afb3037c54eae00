"""One process that runs the fairseq tests' jobs, started by the first of them."""

from __future__ import annotations

import atexit
import functools
from importlib import util

import pytest
from rank_pool import RankPool

needs_fairseq = pytest.mark.skipif(util.find_spec("fairseq") is None, reason="needs fairseq: `make fairseq`")


@functools.cache
def _pool():
    pool = RankPool(1)
    atexit.register(pool.close)
    return pool


def in_fairseq(function, *arguments):
    """The result of a function of an importable module, from the process that has fairseq."""
    return _pool().run(_call, function, *arguments)[0]


def _call(group, function, *arguments):
    return function(*arguments)
