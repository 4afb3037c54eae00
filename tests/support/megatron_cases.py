"""Small GPTs for Megatron, and how results of two layers are compared."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import itertools
import os
import traceback

import pytest
from rank_pool import RankPool


@dataclasses.dataclass(frozen=True)
class Ranks:
    """How many ranks, and how they are divided."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and how it is trained; ``config`` holds fields of Megatron's ``TransformerConfig``.

    A ``weight_decay`` of its own is one by groups of parameters, as Megatron's scheduler of learning rates sets it.
    """

    ranks: Ranks = Ranks()
    config: dict = dataclasses.field(default_factory=dict)
    distributed_optimizer: bool = False
    padding: bool = False
    overlap: bool = False
    weight_decay: float | None = None
    steps: int = 6

    def on(self, **ranks):
        """The same on other ranks."""
        return dataclasses.replace(self, ranks=Ranks(**ranks))


def since(*release):
    """A mark that skips where megatron-core is older than ``0, 19``, without importing it."""
    try:
        major, minor = importlib.metadata.version("megatron-core").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        major, minor = 0, 0
    has = (int(major), int(minor)) >= release
    return pytest.mark.skipif(not has, reason="this megatron-core has no such option")


def call(group, module, name, *arguments):
    """A job by its name: modules of jobs import Megatron, which is for ranks alone.

    What it leaves behind is freed at once: gloo's threads would otherwise spin on connections that others have closed.
    """
    failed = None
    try:
        result = getattr(importlib.import_module(module), name)(group, *arguments)
    except BaseException as error:  # that of PyTorch's checkpoints is no Exception, and would end the rank
        failed = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    importlib.import_module("rank_jobs_megatron").disconnect()
    if failed is not None:
        raise RuntimeError(failed)
    return result


class MegatronRanks:
    """Four processes with Megatron imported, in which runs of 1, 2 or 4 ranks follow one another."""

    def __init__(self, folder):
        self._folder, self._numbers, self._pool, self._native = folder, itertools.count(), RankPool(4), {}

    def run(self, job, case, *arguments, about=None):
        """``rank_jobs_megatron.<job>(group, case, first argument, store, ...)`` on the ranks of a case, or on ranks.

        ``about`` names another module of jobs, as ``specs`` for ``rank_jobs_megatron_specs``.
        """
        world = getattr(case, "ranks", case).world
        about = "checkpoint" if job in ("save", "load") else about
        module = "rank_jobs_megatron" + (f"_{about}" if about else "")
        first, *rest = arguments
        arguments = (case, first, self.new_path("store"), *rest)
        return self._pool.run(call, module, job, *arguments, ranks=world)

    def native(self, case):
        """What Megatron's own layer does, once for each case."""
        key = repr(case)
        if key not in self._native:
            self._native[key] = self.run("train", case, "native")
        return self._native[key]

    def new_path(self, kind):
        return os.path.join(self._folder, f"{kind}{next(self._numbers)}")

    def close(self):
        self._pool.close()


def assert_same_training(expected, found, *, loss=5e-5, norm=1e-4, logged=1e-4):
    """Losses to 4 decimals, gradient norms relatively to 1e-4, on every rank and step; what is logged, and the biases.

    Of norms that is float32's rounding, which Adam's first steps, divided by small moments, make much larger.
    """
    assert len(expected) == len(found)
    for theirs, ours in zip(expected, found, strict=True):
        for (their_loss, their_norm), (our_loss, our_norm) in zip(theirs["steps"], ours["steps"], strict=True):
            assert (their_loss is None) == (our_loss is None)
            if their_loss is not None:
                assert abs(their_loss - our_loss) < loss, (theirs["steps"], ours["steps"])
            assert abs(their_norm - our_norm) < norm * max(1, their_norm), (theirs["steps"], ours["steps"])
        assert theirs["logged"].keys() == ours["logged"].keys()
        for name, value in theirs["logged"].items():
            assert abs(value - ours["logged"][name]) < logged * max(1, abs(value)), name
        assert len(theirs["biases"]) == len(ours["biases"])
        for their_bias, our_bias in zip(theirs["biases"], ours["biases"], strict=True):
            assert all(abs(a - b) < 1e-5 for a, b in zip(their_bias, our_bias, strict=True)), (their_bias, our_bias)
