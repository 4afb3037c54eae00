"""Do all ranks of a group come to a collective call, or will one of them never? Asked by the group's store.

A rank that was not given a group cannot say so to that group: the others would wait in a collective call until its time
limit, and leave the group out of step. So they meet in its store first, where one may stop waiting; and a verdict of
elsewhere, in the store of a group that all of them have, is a reason to.

A rank that was not asked one question may be here for the next before the others have heard that. So questions are
numbered, and only ranks with the same one meet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_KEY, _ALL = "dmoe/met", "all of"
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


def meet(group: ProcessGroup, verdict: Verdict, number: int) -> str | None:
    """Wait until all ranks of a group have come here, or a verdict says that there is no use in it.

    The caller has to go on to a collective call over the group, unless this returned something.

    Args:
        group: the ranks.
        verdict: of the same question, elsewhere.
        number: of the question, the same on all ranks, and larger for each that follows.

    Returns:
        None when all are here; else the verdict, and this rank has withdrawn as if it had never come.

    Raises:
        RuntimeError: neither happened within the time limit of the group's store.
    """
    here = _Here(group, number)
    here.change(here.among)
    pause, end = _SHORTEST, time.monotonic() + here.store.timeout.total_seconds()
    while here.read() != here.everyone:
        problem = verdict.read()
        if problem is None and time.monotonic() < end:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        elif (
            left := here.change(here.without)
        ) != here.everyone:  # else the last one has come meanwhile, and counts on this
            if problem is not None:
                return problem
            raise RuntimeError(
                f"dmoe: not all {here.size} ranks of the group came within its time limit, but beside this one only "
                f"{sorted(_numbers(left))}: others died, or were not given the group"
            )
    return None


class _Here:
    """The ranks of a group that have come: one key of its store, changed at once or not at all.

    When the last one comes with a question's number it says that all have; whoever finds that afterwards comes from the
    collective call behind it, in which all were, and begins anew.
    """

    def __init__(self, group: ProcessGroup, number: int) -> None:
        self.store: Any = group.get_group_store()  # whose stub lacks the time limit
        self.me, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.number, self.everyone = number, f"{_ALL} {number}"

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
        numbers = _numbers(before) | {self.me: self.number}
        all_here = len(numbers) == self.size and set(numbers.values()) == {self.number}
        return self.everyone if all_here else _text(numbers)

    def without(self, before: str) -> str:
        """Without it, unless all are here."""
        if before == self.everyone:
            return before
        return _text({rank: number for rank, number in _numbers(before).items() if rank != self.me})


def _numbers(text: str) -> dict[int, int]:
    """By rank the number of its question; nobody where all have met."""
    if text.startswith(_ALL):
        return {}
    pairs = (pair.split(":") for pair in text.split() if ":" in pair)
    return {int(rank): int(number) for rank, number in pairs}


def _text(numbers: dict[int, int]) -> str:
    # Never empty, which stands for a key that is not there.
    return " ".join(["of", *(f"{rank}:{number}" for rank, number in sorted(numbers.items()))])
