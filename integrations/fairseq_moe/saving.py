"""Saving the checkpoint of several ranks as one event.

fairseq's own ``save_checkpoint`` decides on each rank alone what to write, under which names, and what to remove. Here
the first rank asks it, once; what it then does to files is done to checkpoints, by all ranks together.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils

import dmoe
from dmoe.integrations.fairseq_moe import parallel
from dmoe.integrations.fairseq_moe.flags import FlagError
from dmoe.integrations.fairseq_moe.parts import stem_of

logger = logging.getLogger(__name__)


def save_checkpoint(stock: Any, cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> Any:
    """Save, copy and remove whole checkpoints, under fairseq's names and by its rules; every rank has to ask.

    Raises:
        FlagError: on all ranks, what went wrong on any of them.
    """
    if not getattr(trainer, "spread", False) or cfg.no_save:
        return stock(cfg, trainer, epoch_itr, val_loss)
    if trainer.data_parallel_rank == 0:
        return _lead(stock, cfg, trainer, epoch_itr, val_loss)
    cfg.no_save = True  # of the stock one only what it notes about the best loss
    try:
        stock(cfg, trainer, epoch_itr, val_loss)
    finally:
        cfg.no_save = False
    trainer.consolidate_optimizer()
    return _follow(trainer)


def _lead(stock: Any, cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> Any:
    asked = False  # whether the others are in the same step

    def all_do(act: str, *what: Any) -> None:
        nonlocal asked
        asked = True
        _do(trainer, *parallel.from_first((act, *what)))
        asked = False

    def save_one(filename: str, extra_state: dict[str, Any]) -> None:
        all_do("save", filename, extra_state)

    def copy(source: str, target: str, overwrite: bool = False) -> str:
        all_do("copy", source, target)
        return target

    manager, module = checkpoint_utils.PathManager, checkpoint_utils.os
    for_trainer = _With(trainer, save_checkpoint=save_one, checkpoint_suffix="-shared")
    if cfg.write_checkpoints_asynchronously:
        logger.warning("--write-checkpoints-asynchronously has no effect on several ranks: they save together")
    waits, cfg.write_checkpoints_asynchronously = cfg.write_checkpoints_asynchronously, False
    try:
        with _in_place_of(checkpoint_utils, PathManager=_With(manager, copy=copy), os=_With(module, remove=remove)):
            stock(cfg, for_trainer, epoch_itr, val_loss)
    except Exception as error:
        if not asked:
            parallel.from_first(("fail", f"{cfg.save_dir}: expected to save a checkpoint, got: {error}"))
        raise
    finally:
        cfg.write_checkpoints_asynchronously = waits
    parallel.from_first(("end",))


def _follow(trainer: Any) -> None:
    while True:
        act, *what = parallel.from_first(None)
        if act == "end":
            return
        if act == "fail":
            raise FlagError(what[0])
        _do(trainer, act, *what)


def _do(trainer: Any, act: str, path: str, what: Any) -> None:
    if act == "save":
        trainer.save_checkpoint(path, what)
        return
    names = (_names(each, trainer.data_parallel_rank) for each in (path, what))
    _write(what, {target: Path(source) for source, target in zip(*names, strict=True)})


def write(filename: str, rank: int, *states: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint, on each of the ranks that have it.

    Args:
        filename: any of its files'.
        rank: this one.
        states: what it alone has, and, on the first rank, what all have.

    Raises:
        FlagError: on all ranks, if any could not: then the checkpoint of before is still there.
    """
    _write(filename, dict(zip(_names(filename, rank), states, strict=True)))


def remove(filename: str) -> None:
    """Remove a checkpoint of several ranks, for all of them.

    Args:
        filename: of its shared file.
    """
    stem = stem_of(filename)
    part = re.compile(re.escape(os.path.basename(stem)) + r"-(shared|rank-\d+)\.pt")
    folder = os.path.dirname(stem) or "."
    names = sorted(filter(part.fullmatch, os.listdir(folder)))
    dmoe.checkpoint.remove_together(stem, [os.path.join(folder, name) for name in names])


def _names(filename: str, rank: int) -> list[str]:
    """The files of a checkpoint that a rank writes."""
    stem = stem_of(filename)
    return [f"{stem}-rank-{rank}.pt", *([f"{stem}-shared.pt"] if rank == 0 else [])]


def _write(filename: str, files: Mapping[str, Any]) -> None:
    group = distributed_utils.get_data_parallel_group()
    try:
        dmoe.checkpoint.write_together(stem_of(filename), files, group=group, overwrite=True)
    except OSError as error:
        raise FlagError(str(error)) from error


class _With:
    """Another object but for some of its names."""

    def __init__(self, other: Any, **names: Any) -> None:
        self.__dict__.update(names, _other=other)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


@contextmanager
def _in_place_of(module: Any, **names: Any) -> Iterator[None]:
    """Other globals of a module for a while."""
    before = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(before)
