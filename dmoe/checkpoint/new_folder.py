"""Folders that are there as a whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_name(text: object) -> bool:
    """Whether something is the name of a file in a folder, and of nothing above or below."""
    return (
        isinstance(text, str)
        and bool(text)
        and text not in (".", "..")
        and Path(text).name == text
        and "\0" not in text
    )


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False, marker: str = "config.json") -> Iterator[Path]:
    """A temporary folder beside ``path``, which becomes it when the block ends, and is gone if that raised.

    A process that is killed leaves the temporary one, ``.NAME.ID.part``, and ``path`` as it was; the next that writes
    the same folder removes it.

    Args:
        path: must not exist, or be an empty folder.
        overwrite: may be a folder of the same kind, too, which stays whole until the new one takes its place. A process
            killed between those two renames leaves both, with the old one as ``.NAME.ID.old``.
        marker: a file by which a folder of this kind is known.

    Raises:
        FileExistsError: there is something else.
        OSError: the folder around it is missing, or cannot be written.
    """
    path = Path(os.path.abspath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: expected a folder, for {path.name} in it, got none")
    _refuse_existing(path, overwrite, marker)
    _remove_left(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, however that ends
        yield temporary
        for inside in temporary.rglob("*"):
            sync(inside)
        sync(temporary)
        _refuse_existing(path, overwrite, marker)  # somebody may have been faster
        _put_in_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    sync(path.parent)


def _remove_left(path: Path) -> None:
    """What killed processes have left of this folder: nobody holds its lock any more."""
    left = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{16}}\.part")
    for folder in path.parent.iterdir():
        if not left.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:  # another process is at it
            pass
        finally:
            os.close(lock)


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists() or not any(path.iterdir()):
        os.replace(temporary, path)  # of an empty folder too
        return
    old = temporary.with_suffix(".old")
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def _refuse_existing(path: Path, overwrite: bool, marker: str) -> None:
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path}: expected nothing of that name, got something; overwrite replaces it")
    if path.is_symlink() or not (path / marker).is_file():
        raise FileExistsError(f"{path}: expected a model's folder to replace, with a {marker}, got something else")


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
