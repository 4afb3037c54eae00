"""Files that belong together: written beside the old ones, by one process or by ranks, and made valid in one act.

==============================  ====================================================================================
file                            what it is
==============================  ====================================================================================
``.NAME.ID.FILE.part``          what will be ``FILE``, in the same folder; nobody reads it
``.NAME.ID.dmoe-commit``        a journal, made when every part is whole and on the disk. From the moment it is there (a
                                rename) the parts are the files; whoever comes next puts them in place
==============================  ====================================================================================

A process killed at any point leaves the old files or the new ones. Before the journal the parts are nobody's, and the
next writer removes them. After it, :func:`finish_writing` does what is left, any number of times and in any process:
readers call it first, and so does the next writer. In other folders than the journal's a symbolic link of its name
leads to it. A file that is alone needs no journal: its own rename is the act.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
import torch.distributed as dist

from dmoe.checkpoint import journal as journals


@dataclass(frozen=True)
class Written:
    """A file that is not ``torch.save``'s: what writes it, given the open file."""

    write: Callable[[BinaryIO], None]


Content: TypeAlias = Mapping[str, Any] | os.PathLike[str] | Callable[[], Mapping[str, Any]] | Written
_Path: TypeAlias = str | os.PathLike[str]


def write_together(
    name: _Path,
    files: Mapping[Any, Content],
    *,
    group: Any = None,
    overwrite: bool = False,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda items, total: items,
) -> None:
    """Write files that are valid together: a crash at any moment leaves all the old ones or all the new ones, whole.

    With a group every rank calls this, with files of its own or none. No rank returns before all are in place.

    Args:
        name: of the whole, the same on every rank, as ``folder/checkpoint_last``. The files lie in its folder or below,
            on a file system that all ranks share. The next write under this name removes what a killed one has left.
        files: by their paths: what ``torch.save`` is to write, a function that gives it when its turn comes, or the
            path of a file to copy, or a :class:`Written`.
        group: a ``torch.distributed`` process group; None is this process alone.
        overwrite: whether files that exist are replaced.
        progress: wraps the paths and their number, as tqdm does.

    Raises:
        FileExistsError: there is one of the files, and ``overwrite`` is not set.
        OSError: a folder is missing, the disk is full, and the like. With a group every rank raises OSError, whatever
            it was and wherever: the message names the first rank that could not write, and says why.
        ValueError: files outside the folder.
    """
    whole = Path(name)
    ranks = _Ranks(whole, group)
    identity: str = ranks.agreed(lambda: _begin(whole) if ranks.first else "")[0]
    targets = {Path(path): content for path, content in files.items()}
    parts = {target: journals.part_of(target, whole, identity) for target in targets}

    def write_parts() -> list[list[Any]]:
        refuse_existing(targets, overwrite)
        moves = []
        _link_journal(whole, identity, parts.values())
        for target in progress(targets, len(targets)):
            write_new(parts[target], targets[target])
            moves.append(journals.move_of(parts[target], target, whole))
        for folder in {part.parent for part in parts.values()}:
            journals.sync_folder(folder)
        return moves

    try:
        written = [move for of_rank in ranks.agreed(write_parts) for move in of_rank]
    except BaseException:
        if not ranks.unsure:  # else the others may be making these parts valid
            _drop(parts.values(), whole, identity)
        raise
    ranks.agreed(lambda: _make_valid(whole, identity, written) if ranks.first else None)


def remove_together(name: _Path, files: Iterable[_Path]) -> None:
    """Remove files that are valid together, so that a crash leaves all of them, or none to whoever comes next.

    Args:
        name: as that of :func:`write_together`; the files' names begin with it.
        files: in its folder.

    Raises:
        OSError: they cannot be removed.
        ValueError: files that are others'.
    """
    whole, removals = Path(name), [Path(file) for file in files]
    for file in removals:
        if file.parent != whole.parent or not file.name.startswith(whole.name):
            raise ValueError(f"{whole}: expected files whose names begin with this, got {file}")
    journal = journals.journal_of(whole, _begin(whole))
    journals.commit(journal, {"removals": [file.name for file in removals]})
    journals.carry_out(journal)


def finish_writing(folder: _Path) -> None:
    """Put in place what killed processes had made valid in a folder, and not yet put there. Mostly there is nothing.

    Raises:
        OSError: there is, and the folder cannot be written.
        ValueError: a file with the name of a journal that is none.
    """
    for journal in journals.journals(Path(folder)):
        try:
            journals.carry_out(journal)
        except OSError as error:
            raise OSError(
                f"{journal}: expected to put the files in place that a stopped process had finished, got: {error}"
            ) from error


def name_of(pattern: _Path) -> Path:
    """The name of files that a pattern with ``{rank}`` describes: up to the folder or file that it stands in."""
    parts = Path(pattern).parts
    first = next((n for n, part in enumerate(parts) if "{rank}" in part), len(parts) - 1)
    return Path(*parts[: first + 1])


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """Raise FileExistsError for the first path that exists, unless it may be replaced."""
    for path in paths:
        if path.exists() and not path.is_file():
            raise FileExistsError(f"{path}: expected the name of a file to write, got a folder or a device")
        if not overwrite and path.exists():
            raise FileExistsError(f"{path}: expected no file of that name, got one; --overwrite replaces it")


def write_new(path: Path, content: Content) -> None:
    """Write a new file, which is on the disk when this returns, and not there when it raises."""
    with open(path, "xb") as file:
        try:
            _fill(file, content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _fill(file: BinaryIO, content: Content) -> None:
    if isinstance(content, Written):
        content.write(file)
    elif isinstance(content, os.PathLike):
        with open(content, "rb") as source:
            shutil.copyfileobj(source, file, 1 << 20)
    else:
        torch.save(content() if callable(content) else content, file)


class _Ranks:
    """Who writes together, and what they agree on.

    Attributes:
        unsure: whether the last agreement failed on its way, so that other ranks may have gone on.
    """

    def __init__(self, name: Path, group: Any) -> None:
        self.name, self.group, self.unsure = name, group, False
        self.first = group is None or dist.get_rank(group) == 0

    def agreed(self, step: Callable[[], Any]) -> list[Any]:
        """What a step gives on each rank; if it raises on one, then on all."""
        if self.group is None:
            return [step()]
        given, told, cause = None, None, None
        try:
            given = step()
        except Exception as error:
            told, cause = f"{type(error).__name__}: {error}", error
        answers: list[Any] = [None] * dist.get_world_size(self.group)
        self.unsure = True
        dist.all_gather_object(answers, (given, told), group=self.group)
        self.unsure = False
        for rank, (_, problem) in enumerate(answers):
            if problem is not None:
                raise OSError(
                    f"{self.name}: expected every rank to write its files, got from rank {rank}: {problem}"
                ) from cause
        return [given for given, _ in answers]


def _begin(name: Path) -> str:
    """Carry out or remove what is left of earlier writes; the identity of a new one."""
    finish_writing(name.parent)
    journals.clear(name.parent, name)
    return secrets.token_hex(8)


def _link_journal(name: Path, identity: str, parts: Iterable[Path]) -> None:
    """Let readers of other folders find the journal to come."""
    journal = journals.journal_of(name, identity)
    for folder in {part.parent for part in parts} - {name.parent}:
        journals.clear(folder, name, but=identity)
        with suppress(OSError):  # of a file system without links, or of another rank with files there
            (folder / journal.name).symlink_to(os.path.relpath(journal, folder))


def _drop(parts: Iterable[Path], name: Path, identity: str) -> None:
    """Remove parts that will not be valid."""
    for part in parts:
        part.unlink(missing_ok=True)
        if part.parent != name.parent:
            journals.journal_of(part.parent / name.name, identity).unlink(missing_ok=True)


def _make_valid(name: Path, identity: str, moves: list[list[Any]]) -> None:
    journal, parts = journals.journal_of(name, identity), [name.parent / part for part, *_ in moves]
    try:
        if len(moves) == 1:
            target = name.parent / moves[0][1]
            os.replace(parts[0], target)
            journals.sync_folder(target.parent)
            _drop(parts, name, identity)
            return
        journals.commit(journal, {"moves": moves})
    except BaseException:
        if not journal.exists():
            _drop(parts, name, identity)
        raise
    journals.carry_out(journal)
    journals.check_in_place(moves, name.parent)
