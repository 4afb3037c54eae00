"""Which files are a checkpoint, of those that lie in a folder.

``X.pt`` names both what one rank wrote (``X.pt``) and what several did (``X-shared.pt`` and ``X-rank-N.pt``). Where
both are whole, the one saved later is read; where one is not, the other one. ``X-shared.pt`` and ``X-rank-N.pt`` name
the parts alone. What a killed training had finished writing is put in place first.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import dmoe
from dmoe.integrations.fairseq_moe.flags import FlagError
from dmoe.integrations.fairseq_moe.parts import (
    SAVED,
    local_experts,
    num_experts_of,
    read,
    resumable,
    stem_of,
    updates_of,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """A checkpoint that was found.

    Attributes:
        main: the file with what every rank has.
        parts: files with experts, in the order of the ranks that wrote them; ``main`` alone when that has them all.
        num_experts: E; 0 for a dense model.
        updates: training steps it has seen.
        resumable: whether the optimizer's state in it, if any, is one that this package wrote.
        saved: what is alike in files saved together, and in no others; None in those of other programs.
        modified: when ``main`` was last written, as the file system knows.
    """

    main: str
    parts: tuple[str, ...]
    num_experts: int
    updates: int
    resumable: bool
    saved: Any = None
    modified: float = 0.0

    @property
    def local(self) -> int:
        """Experts in one file."""
        return self.num_experts // len(self.parts)

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.saved["time"] if self.saved else self.modified))
        return f"{self.main} ({self.updates} updates, saved {when})"


def find(path: str, num_experts: int | None = None, *, or_another: bool = False) -> Files | None:
    """The checkpoint that a path names, whichever of its files that is; None when there is none.

    Args:
        path: ``X.pt``, ``X-shared.pt`` or ``X-rank-N.pt``.
        num_experts: E of the model that it is for, if known.
        or_another: where no whole one is left of what the path names, take the newest whole one of the same folder.

    Raises:
        FlagError: a file is missing, or files that do not belong together, or another number of experts.
    """
    stem = stem_of(path)
    found: list[Files] = []
    problems: list[FlagError] = []
    for _ in range(2):  # twice: a training may have been putting its files in place, one by one, while this looked
        try:
            dmoe.checkpoint.finish_writing(os.path.dirname(stem))
        except (OSError, ValueError) as error:
            raise FlagError(str(error)) from error
        found, problems = _at(stem, parts_alone=path not in (stem, stem + ".pt"))
        if not problems:
            break
    files = _newest(found)
    if files is None and problems:
        # A dense one, or that of another model, is nobody's next best.
        fits = [each for each in _others(stem) if each.num_experts and num_experts in (None, each.num_experts)]
        files = _newest(fits)
        if files is None:
            raise problems[0]
        if not or_another:
            raise FlagError(f"{problems[0]}. The newest whole checkpoint of this folder is {files}")
    if files is None:
        return None
    if problems:
        logger.warning(f"{problems[0]}. Going on with {files}")
    for other in found:
        if other is not files:
            logger.warning(f"{files} is read, not {other}, which was saved before it")
    if num_experts is not None and files.num_experts not in (0, num_experts):
        raise FlagError(
            f"{files.main}: expected a checkpoint of {num_experts} experts (--moe-expert-count), got one of "
            f"{files.num_experts}"
        )
    return files


def _newest(found: list[Files]) -> Files | None:
    """The one saved last; by the file system's clock where files do not say."""
    by_content = all(each.saved for each in found)
    return max(
        found, key=lambda each: (each.saved["time"] if by_content else each.modified, each.updates), default=None
    )


def _at(stem: str, parts_alone: bool = False) -> tuple[list[Files], list[FlagError]]:
    """The whole checkpoints of a name, and what is wrong with others."""
    found, problems = [], []
    kinds: Iterable[Callable[[str], Files | None]] = (_parts,) if parts_alone else (_whole, _parts)
    for kind in kinds:
        try:
            files = kind(stem)
        except FlagError as error:
            problems.append(error)
        else:
            found += [] if files is None else [files]
    return found, problems


def _others(stem: str) -> list[Files]:
    """The whole checkpoints of other names in a folder."""
    folder = os.path.dirname(stem)
    stems = {stem_of(os.path.join(folder, name)) for name in _beside(stem) if name.endswith(".pt")}
    return [files for other in sorted(stems - {stem}) for files in _at(other)[0]]


def _beside(stem: str) -> list[str]:
    folder = os.path.dirname(stem) or "."
    return os.listdir(folder) if os.path.isdir(folder) else []


def _whole(stem: str) -> Files | None:
    path = stem + ".pt"
    if not os.path.isfile(path):
        return None
    state = read(path, mapped=True)
    return _files(path, (path,), state)


def _parts(stem: str) -> Files | None:
    pattern = re.compile(re.escape(os.path.basename(stem)) + r"-rank-(\d+)\.pt")
    ranks = sorted(int(match[1]) for match in map(pattern.fullmatch, _beside(stem)) if match)
    shared = f"{stem}-shared.pt"
    if not ranks and not os.path.isfile(shared):
        return None

    def part(rank: int) -> str:
        return f"{stem}-rank-{rank}.pt"

    if not ranks:
        raise FlagError(f"{part(0)}: expected this file beside {shared}, and those of all other ranks, got none")
    first = read(part(ranks[0]), mapped=True)
    if not os.path.isfile(shared):
        if not num_experts_of(first):  # neither has the gates
            raise FlagError(f"{shared}: expected this file beside {part(ranks[0])}, got none")
        shared = part(ranks[0])  # as the branch wrote before it split them
    state = read(shared, mapped=True)
    experts = num_experts_of(state)
    local = local_experts(first)
    if not experts or not local or experts % local:
        raise FlagError(
            f"{part(ranks[0])}: expected experts that add up to the {experts} of {shared}, got {local} in this file"
        )
    needed = range(experts // local)
    missing = [rank for rank in needed if rank not in ranks]
    if missing:
        raise FlagError(
            f"{part(missing[0])}: expected the files of {len(needed)} ranks ({experts} experts, {local} in each file), "
            f"got none of rank {', '.join(map(str, missing))}"
        )
    updates, saved = updates_of(state), state.get(SAVED)
    for rank in needed:
        of_rank = read(part(rank), mapped=True)
        if (local_experts(of_rank), updates_of(of_rank)) != (local, updates):
            raise FlagError(
                f"{part(rank)}: expected {local} experts after {updates} updates, as beside it, got "
                f"{local_experts(of_rank)} after {updates_of(of_rank)}; the files are of different runs, or saving was "
                "interrupted"
            )
        if of_rank.get(SAVED) != saved:
            raise FlagError(
                f"{part(rank)}: expected a file saved together with {shared}, got one saved at another time, after "
                f"{updates} updates as well"
            )
    return _files(shared, tuple(part(rank) for rank in needed), state)


def _files(main: str, parts: tuple[str, ...], state: dict[str, Any]) -> Files:
    modified = os.stat(main).st_mtime
    return Files(main, parts, num_experts_of(state), updates_of(state), resumable(state), state.get(SAVED), modified)
