"""From a model that is spread over ranks into Hugging Face's format, which plain Transformers loads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dmoe.checkpoint.hub_beside import copy_beside
from dmoe.checkpoint.hub_writer import MAX_SHARD_BYTES, write_json
from dmoe.checkpoint.new_folder import new_folder
from dmoe.checkpoint.shared_files import PartWriter, SharedFiles
from dmoe.integrations.transformers.attached import refuse_attached
from dmoe.integrations.transformers.files_names import Keys, class_name
from dmoe.integrations.transformers.parallel_links import (
    Link,
    box_of,
    cut_dims,
    here,
    links_of,
    native_shapes,
    tensors_of,
)
from dmoe.integrations.transformers.parallel_mesh import Grid, grid_of_model
from dmoe.integrations.transformers.parallel_optimizer import FOLDER, STATE, Moments, moments_of

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def save_pretrained(
    model: Any,
    folder: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    max_shard_size: int | str = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write a model of :func:`parallelize` as Transformers' ``save_pretrained`` would; every rank calls this.

    Weights, their index, ``config.json``, ``generation_config.json``, and the tokenizer's and the licence's files where
    the model came from a folder that has them. Each rank writes what it holds into the files, where it belongs, so that
    nobody gathers experts: only those that FSDP cuts across, where there are more replicas than experts of a rank, are
    put together, one rank's of one layer at a time. The files do not depend on the number of ranks. They become the
    folder, all at once, when every rank is done.

    Args:
        model: :func:`parallelize`'s.
        folder: a path on a file system of all ranks; new or empty.
        optimizer: whose state is to go along, in ``optimizer/``, for :func:`load_optimizer`; of AdamW's kind, with
            numbers, or tensors in the parameter's shape, for each parameter.
        max_shard_size: bytes of the tensors of one file at most, or as "5GB".
        overwrite: whether a model's folder may be replaced, with all that is in it.
        progress: show a bar, on the first rank.

    Raises:
        FileExistsError: there is something at the path.
        OSError: the disk is full, and the like.
        ValueError: a model of somebody else, or with adapters of ``dmoe.lora`` or codes of ``dmoe.quant``; a size that
            is none, or files that cannot be written part by part.
        RuntimeError: another rank raised one of these. Nothing is left of the new files, whichever it was.
    """
    grid = grid_of_model(model)
    plans, state = grid.together(lambda: _plans(model, optimizer, _bytes_of(max_shard_size)))
    stack = ExitStack()
    try:
        made = grid.together(lambda: stack.enter_context(new_folder(folder, overwrite=overwrite)), first_alone=True)
        grid.together(lambda: _begin(model, plans, state, made), first_alone=True)
        problem = _write(plans, made, grid, progress=progress and grid.first)
        grid.together(lambda: _raise(problem))
    except BaseException as error:
        stack.__exit__(type(error), error, error.__traceback__)  # the folder goes
        raise
    grid.together(stack.close)  # the folder is there


@dataclass(frozen=True)
class _Plan:
    """Tensors, what they are called in the files of one folder, and the files.

    Attributes:
        inside: the folder, inside that of the model.
        links: what is written.
        tensors: by the links' names.
    """

    inside: str
    links: list[Link]
    tensors: Mapping[str, Tensor]
    keys: Keys
    files: SharedFiles


def _plans(model: Any, optimizer: torch.optim.Optimizer | None, limit: int) -> tuple[list[_Plan], dict[str, Any]]:
    """Of the model, then of each kind of moment; and the rest of the optimizer's state, empty without one."""
    refuse_attached("save_pretrained", model)
    links, tensors = links_of(model), tensors_of(model)
    moments = Moments() if optimizer is None else moments_of(model, optimizer, links)
    plans = [_plan(model, "", links, tensors, limit)]
    for kind, of_kind in moments.kinds.items():
        its = [link for link in links if link.name in of_kind]
        plans.append(_plan(model, f"{FOLDER}/{kind}", its, of_kind, limit))
    return plans, moments.state


def _plan(model: Any, inside: str, links: list[Link], tensors: Mapping[str, Tensor], limit: int) -> _Plan:
    keys = Keys(model, native_shapes(links, tensors))
    return _Plan(inside, links, tensors, keys, SharedFiles(keys.tensors, limit))


def _begin(model: Any, plans: list[_Plan], state: Mapping[str, Any], folder: Path) -> None:
    """All but the tensors' values."""
    for plan in plans:
        (folder / plan.inside).mkdir(parents=True, exist_ok=True)
        plan.files.create(folder / plan.inside)
    if state:
        (folder / FOLDER).mkdir(exist_ok=True)
        write_json(folder / FOLDER / STATE, state)
    config = model.config
    source = Path(getattr(config, "_name_or_path", "") or "-")
    if source.is_dir():
        copy_beside(source, folder)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [class_name(model)]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _write(plans: list[_Plan], folder: Path, grid: Grid, *, progress: bool) -> Exception | None:
    """Write this rank's parts; what went wrong, for other ranks may be waiting for this one to gather something."""
    problem: Exception | None = None
    total = sum(len(plan.links) for plan in plans)
    with tqdm(total=total, desc="Saving", disable=not progress, unit="tensor") as bar:
        for plan in plans:
            try:
                with plan.files.writer(folder / plan.inside) as writer:
                    for link in plan.links:
                        parts = _parts(link, plan.tensors[link.name], plan.keys, grid)
                        try:
                            if problem is None:
                                _write_parts(parts, writer)
                        except Exception as error:
                            problem = error
                        bar.update()
            except Exception as error:
                problem = problem or error
    return problem


def _write_parts(parts: Iterator[dict[str, tuple[int, Tensor]]], writer: PartWriter) -> None:
    for some in parts:
        for key, (row, part) in some.items():
            writer.write(key, row, part)


def _parts(link: Link, tensor: Any, keys: Keys, grid: Grid) -> Iterator[dict[str, tuple[int, Tensor]]]:
    """What this rank has to write of a tensor. Ranks that hold parts of what has to be whole talk before it returns."""
    by_row = (link.by_expert or link.weight is None) and all(map(keys.takes_rows, link.native))
    mine, first = here(tensor), 0
    if not hasattr(tensor, "to_local"):  # every rank has it
        return _of_rows(link, mine, 0, keys) if grid.first else iter(())
    if by_row and cut_dims(tensor) <= {0}:
        first = box_of(tensor)[0].start
    elif link.by_expert and by_row:
        mine, first = _experts_of_rank(tensor, grid)
    else:
        mine = tensor.detach().full_tensor()
        return _of_rows(link, mine, 0, keys) if grid.first else iter(())
    return _of_rows(link, mine, first, keys) if mine.shape[0] else iter(())


def _of_rows(link: Link, mine: Tensor, first: int, keys: Keys) -> Iterator[dict[str, tuple[int, Tensor]]]:
    """Rows of a tensor as parts of the files', experts one by one where that can be: what is copied is one at most."""
    one_by_one = link.by_expert and all(map(keys.takes_rows, link.native))
    each = [mine[n : n + 1] for n in range(mine.shape[0])] if one_by_one else [mine]
    for n, some in enumerate(each):
        natives = link.natives(some)
        yield {key: part for name in natives for key, part in keys.parts(name, natives[name], first + n).items()}


def _experts_of_rank(tensor: Any, grid: Grid) -> tuple[Tensor, int]:
    """The experts of this rank, which FSDP cut across, put together; none where another one writes them."""
    from torch.distributed.tensor import Replicate, Shard

    gathered = tensor.detach().redistribute(placements=[Replicate(), Shard(0)]).to_local()
    fsdp, ep = grid.of("fsdp"), grid.of("ep")
    first = ep.get_local_rank() * gathered.shape[0]
    return (gathered if fsdp.get_local_rank() == 0 else gathered[:0]), first


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


def _bytes_of(size: int | str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|[KMG]I?B)", str(size).upper())
    if found is None or isinstance(size, bool):
        raise ValueError(f'save_pretrained: max_shard_size: expected bytes, or as "5GB", got {size!r}')
    return int(float(found[1]) * _UNITS[found[2]])
