"""Do all ranks of a group come to a collective call, or will one of them never? Asked by the group's store.

A rank that was not given a group cannot say so to that group: the others would wait in a collective call until its time
limit, and leave the group out of step. So they meet in its store first, where one may stop waiting; and a verdict of
elsewhere, in the store of a group that all of them have, is a reason to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_KEY, _ALL = "dmoe/met", "all"
_SHORTEST, _LONGEST = 1e-3, 0.05  # seconds between two looks


class Verdict:
    """What is known of a question, left for those ranks of a group that wait elsewhere.

    Args:
        group: the ranks.
        token: of this question alone, the same on all of them.
    """

    def __init__(self, group: ProcessGroup, token: str) -> None:
        self._store, self._key = group.get_group_store(), f"dmoe/verdict/{token}"

    def leave(self, problem: str) -> None:
        """For the others; what is left there stays, and nobody asks with this token again."""
        self._store.set(self._key, problem)

    def read(self) -> str | None:
        """What somebody left, if anything."""
        return self._store.get(self._key).decode() if self._store.check([self._key]) else None


def meet(group: ProcessGroup, verdict: Verdict) -> str | None:
    """Wait until all ranks of a group have come here, or a verdict says that there is no use in it.

    The caller has to go on to a collective call over the group, unless this returned something.

    Returns:
        None when all are here; else the verdict, and this rank has withdrawn as if it had never come.

    Raises:
        RuntimeError: neither happened within the time limit of the group's store.
    """
    here = _Here(group)
    here.change(here.among)
    pause, end = _SHORTEST, time.monotonic() + here.store.timeout.total_seconds()
    while here.read() != _ALL:
        problem = verdict.read()
        if problem is None and time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        elif (left := here.change(here.without)) != _ALL:  # else the last one has come meanwhile, and counts on this
            if problem is not None:
                return problem
            raise RuntimeError(
                f"dmoe: not all {here.size} ranks of the group came within its time limit, but beside this one only "
                f"{sorted(_ranks(left))}: others died, or were not given the group"
            )
    return None


class _Here:
    """The ranks of a group that have come: one key of its store, changed at once or not at all.

    When the last one comes it holds ``_ALL``; whoever finds that afterwards comes from the collective call behind it,
    in which all were, and begins anew.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.store: Any = group.get_group_store()  # whose stub lacks the time limit
        self.me, self.size = dist.get_rank(group), dist.get_world_size(group)

    def read(self) -> str:
        return self.store.get(_KEY).decode() if self.store.check([_KEY]) else ""

    def change(self, to: Callable[[str], str]) -> str:
        """What it holds after the change."""
        while True:
            before = self.read()
            after = to(before)
            if after == before or self.store.compare_set(_KEY, before, after).decode() == after:
                return after

    def among(self, before: str) -> str:
        """With this rank."""
        ranks = (set() if before == _ALL else _ranks(before)) | {self.me}
        return _ALL if len(ranks) == self.size else _text(ranks)

    def without(self, before: str) -> str:
        """Without it, unless all are here."""
        return _ALL if before == _ALL else _text(_ranks(before) - {self.me})


def _ranks(text: str) -> set[int]:
    return {int(rank) for rank in text.split() if rank != "of"}


def _text(ranks: set[int]) -> str:
    return " ".join(map(str, ["of", *sorted(ranks)]))  # never empty, which stands for a key that is not there
