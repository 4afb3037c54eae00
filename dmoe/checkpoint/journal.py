"""The journal of files that become valid together; ``together.py`` says what it is for.

A journal is a small JSON file that appears by a rename. It holds ``moves``, each ``[part, file, bytes, nanoseconds]``
of a part's size and time, and ``removals``; all paths are relative to its folder and stay below it. A folder may come
from anywhere: a journal moves nothing but its own parts, and removes nothing but files whose names begin with its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

_FORMAT = "dmoe.checkpoint files 1"
_ENDING = ".dmoe-commit"
_NAME = re.compile(rf"\..+\.[0-9a-f]{{16}}{re.escape(_ENDING)}")


def journal_of(name: Path, identity: str) -> Path:
    """Where the journal of one write under a name lies."""
    return name.with_name(f".{name.name}.{identity}{_ENDING}")


def part_of(target: Path, name: Path, identity: str) -> Path:
    """What a file is called before it is valid."""
    return target.with_name(f".{name.name}.{identity}.{target.name}.part")


def move_of(part: Path, target: Path, name: Path) -> list[Any]:
    """A part, which is there, as an entry of ``moves``."""
    stat = part.stat()
    return [below(part, name), below(target, name), stat.st_size, stat.st_mtime_ns]


def below(path: Path, name: Path) -> str:
    """A path from the folder of a name.

    Raises:
        ValueError: it leads out of that folder.
    """
    relative = os.path.relpath(path, name.parent)
    if relative.startswith(os.pardir):
        raise ValueError(f"{name}: expected files in its folder or below, got {path}")
    return relative


def commit(journal: Path, content: Mapping[str, Any]) -> None:
    """The one act that makes files valid, or as good as removed."""
    draft = journal.with_suffix(".draft")
    try:
        with open(draft, "x") as file:
            json.dump({"format": _FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(draft, journal)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(journal.parent)


def journals(folder: Path) -> list[Path]:
    """Those in a folder, and links to those of others."""
    return [folder / name for name in sorted(listed(folder)) if _NAME.fullmatch(name)]


def carry_out(journal: Path) -> None:
    """Do what is left of a journal, and remove it. Another process may be doing the same.

    Raises:
        OSError: it cannot be done.
        ValueError: it is no journal.
    """
    try:
        with open(journal) as file:
            content = _checked(file.read(), journal)
    except FileNotFoundError:  # a link to one that has been carried out, or never was there
        return
    base = Path(os.path.realpath(journal)).parent
    folders = {base}
    for part, target, _, _ in content["moves"]:
        with suppress(FileNotFoundError):  # somebody has
            os.replace(base / part, base / target)
        folders.add((base / target).parent)
    for removed in content["removals"]:
        (base / removed).unlink(missing_ok=True)
        folders.add((base / removed).parent)
    for folder in folders:
        sync_folder(folder)
    for folder in folders - {base}:
        (folder / journal.name).unlink(missing_ok=True)
    (base / journal.name).unlink(missing_ok=True)


def check_in_place(moves: Iterable[list[Any]], base: Path) -> None:
    """Look whether files are those that were written.

    Raises:
        OSError: one is not, as where somebody removed its part.
    """
    for _, target, size, time in moves:
        stat = (base / target).stat()
        if (stat.st_size, stat.st_mtime_ns) != (size, time):
            raise OSError(f"{base / target}: expected the file just written, got another one; who else writes here?")


def _checked(text: str, journal: Path) -> dict[str, list[Any]]:
    key = journal.name.removesuffix(_ENDING)
    name = key[1:].rpartition(".")[0]

    def is_fine(path: str) -> bool:
        return not PurePosixPath(path).is_absolute() and os.pardir not in PurePosixPath(path).parts

    def is_move(part: str, target: str, size: int, time: int) -> bool:
        file = PurePosixPath(target)
        return is_fine(part) and PurePosixPath(part) == file.with_name(f"{key}.{file.name}.part")

    try:
        content = json.loads(text)
        moves, removals = content.get("moves", []), content.get("removals", [])
        fine = content["format"] == _FORMAT and all(is_move(*move) for move in moves)
        fine = fine and all(is_fine(path) and PurePosixPath(path).name.startswith(name) for path in removals)
    except (ValueError, TypeError, KeyError, AttributeError):
        fine = False
    if not fine:
        raise ValueError(f"{journal}: expected a journal of dmoe.checkpoint, got {text[:80]!r}")
    return {"moves": moves, "removals": removals}


def clear(folder: Path, name: Path, but: str = "") -> None:
    """Remove what killed writes under a name have left in a folder, except those of one identity."""
    left = re.compile(rf"\.{re.escape(name.name)}\.([0-9a-f]{{16}})\..+")
    for each in listed(folder):
        match = left.fullmatch(each)
        if match and match[1] != but:
            (folder / each).unlink(missing_ok=True)


def listed(folder: Path) -> list[str]:
    """Names in a folder; none where there is no such folder, or one that may not be looked into."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def sync_folder(folder: Path) -> None:
    """Bring names to the disk, where the file system knows how to."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
