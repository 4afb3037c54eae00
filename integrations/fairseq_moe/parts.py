"""Checkpoint files of a model whose experts are spread over ranks, named as the branch names them.

==========================  =======================================================================================
file                        holds
==========================  =======================================================================================
``X-shared.pt``             what every rank has, and the optimizer's states of that; written by the first rank
``X-rank-N.pt``             rank N's experts, as ``...experts.{i}.fc1|fc2.{weight,bias}`` with i counted on that rank,
                            and the optimizer's states of those
``X.pt``                    all of it: written by a run on one rank
==========================  =======================================================================================

Expert i of rank N is expert ``N * local + i`` of all. Any number of ranks reads what any other wrote, each only the
files that have experts of its own. Of both kinds beside each other, the one with more updates is read.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import torch

import dmoe
from dmoe.integrations.fairseq_moe.flags import FlagError
from dmoe.integrations.fairseq_moe.names import OF_EXPERTS

OPTIMIZER = "last_optimizer_state"
# Beside the optimizer's state, which counts parameters: their names, in that order.
PARAMETERS = "optimizer_parameters"
_SUFFIXES = re.compile(r"(-rank-\d+|-shared)*(\.pt)?$")
_EXPERT = re.compile(rf"(.*\.)experts\.(\d+)\.({'|'.join(map(re.escape, OF_EXPERTS))})")
_GATE = ".gate.wg.weight"


@dataclass(frozen=True)
class Files:
    """A checkpoint that was found.

    Attributes:
        main: the file with what every rank has.
        parts: files with experts, in the order of the ranks that wrote them; ``main`` alone when that has them all.
        num_experts: E; 0 for a dense model.
        updates: training steps it has seen.
        resumable: whether the optimizer's state in it, if any, is one that this package wrote.
    """

    main: str
    parts: tuple[str, ...]
    num_experts: int
    updates: int
    resumable: bool

    @property
    def local(self) -> int:
        """Experts in one file."""
        return self.num_experts // len(self.parts)


def stem_of(path: str) -> str:
    """The name of a checkpoint without what says which part of it a file is."""
    return _SUFFIXES.sub("", path, count=1)


def find(path: str, num_experts: int | None = None) -> Files | None:
    """The checkpoint that a path names, whichever of its files that is; None when there is none.

    Args:
        path: ``X.pt``, ``X-shared.pt`` or ``X-rank-N.pt``.
        num_experts: E of the model that it is for, if known.

    Raises:
        FlagError: a file is missing, or files that do not belong together, or another number of experts.
    """
    stem = stem_of(path)
    found = [each for each in (_whole(stem), _parts(stem)) if each is not None]
    if not found:
        return None
    files = max(found, key=lambda each: each.updates)
    if num_experts is not None and files.num_experts not in (0, num_experts):
        raise FlagError(
            f"{files.main}: expected a checkpoint of {num_experts} experts (--moe-expert-count), got one of "
            f"{files.num_experts}"
        )
    return files


def _whole(stem: str) -> Files | None:
    path = stem + ".pt"
    if not os.path.isfile(path):
        return None
    state = _read(path)
    return Files(path, (path,), _num_experts(state), _updates(state), _resumable(state))


def _parts(stem: str) -> Files | None:
    folder, name = os.path.split(stem)
    pattern = re.compile(re.escape(name) + r"-rank-(\d+)\.pt")
    beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    ranks = sorted(int(match[1]) for match in map(pattern.fullmatch, beside) if match)
    shared = f"{stem}-shared.pt"
    if not ranks and not os.path.isfile(shared):
        return None

    def part(rank: int) -> str:
        return f"{stem}-rank-{rank}.pt"

    if not ranks:
        raise FlagError(f"{part(0)}: expected this file beside {shared}, and those of all other ranks, got none")
    first = _read(part(ranks[0]))
    if not os.path.isfile(shared):
        if not _num_experts(first):  # neither has the gates
            raise FlagError(f"{shared}: expected this file beside {part(ranks[0])}, got none")
        shared = part(ranks[0])  # as the branch wrote before it split them
    state = _read(shared)
    experts = _num_experts(state)
    local = _local(first)
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
    updates = _updates(state)
    for rank in needed:
        of_rank = _read(part(rank))
        if (_local(of_rank), _updates(of_rank)) != (local, updates):
            raise FlagError(
                f"{part(rank)}: expected {local} experts after {updates} updates, as beside it, got {_local(of_rank)} "
                f"after {_updates(of_rank)}; the files are of different runs, or saving was interrupted"
            )
    return Files(shared, tuple(part(rank) for rank in needed), experts, updates, _resumable(state))


def take(state: dict[str, Any], files: Files, rank: int, ranks: int) -> None:
    """Put what a rank needs of the experts into a state, in place.

    Args:
        state: the content of ``files.main``.
        files: where the experts are.
        rank, ranks: who asks.

    Raises:
        FlagError: the optimizer's state cannot be divided.
    """
    total = files.num_experts
    if not total or (len(files.parts) == 1 and ranks == 1):
        return
    local = total // min(ranks, total)
    first = rank % min(ranks, total) * local  # more ranks than experts: groups of E in a row
    per_file = files.local
    wanted = range(first // per_file, -(-(first + local) // per_file))
    if wanted.start * per_file % local or len(wanted) * per_file % local:
        wanted = range(len(files.parts))  # parts that do not fit into each other: cut all of it anew
    trees = [_tree(state if path == files.main else _read(path), path) for path in (files.parts[n] for n in wanted)]
    try:
        merged = trees[0] if len(trees) == 1 else dmoe.checkpoint.merge_states(trees)
        pieces = len(wanted) * per_file // local
        if pieces > 1:
            merged = dmoe.checkpoint.split_state(merged, pieces)[(first - wanted.start * per_file) // local]
    except (ValueError, TypeError) as error:
        raise FlagError(f"{files.main}: its experts cannot be divided anew: {error}") from error
    state["model"] = {key: value for key, value in state["model"].items() if not _EXPERT.fullmatch(key)}
    state["model"] |= merged["model"]
    if state.get(OPTIMIZER) is not None:
        _take_optimizer(state, merged["optimizer"]["state"])


def _take_optimizer(state: dict[str, Any], by_name: dict[str, Any]) -> None:
    names = state.get(PARAMETERS, [])  # none: the branch's, see Files.resumable
    states = dict(state[OPTIMIZER]["state"])
    states |= {index: by_name[name] for index, name in enumerate(names) if name in by_name}
    state[OPTIMIZER] = {**state[OPTIMIZER], "state": states}


def _tree(state: dict[str, Any], path: str) -> dict[str, Any]:
    """The experts of a file as dmoe's checkpoints have them: stacked, and the optimizer's states by name."""
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for key, value in state["model"].items():
        found = _EXPERT.fullmatch(key)
        if found:
            stacks.setdefault(found[1] + OF_EXPERTS[found[3]], {})[int(found[2])] = value
    model = {}
    for name, experts in stacks.items():
        if sorted(experts) != list(range(len(experts))):
            raise FlagError(f"{path}: expected experts 0 to {len(experts) - 1} of {name}, got {sorted(experts)}")
        model[name] = torch.stack([experts[expert] for expert in range(len(experts))])
    states = {}
    if state.get(OPTIMIZER) is not None and PARAMETERS in state:
        by_index = state[OPTIMIZER]["state"]
        names = enumerate(state[PARAMETERS])
        states = {name: by_index[index] for index, name in names if name in model and index in by_index}
    return {"model": model, "optimizer": {"state": states, "param_groups": [{"params": list(states)}]}}


def divided(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A rank's training state as what goes into ``-rank-N.pt`` and what into ``-shared.pt``."""
    experts, shared = dict(state), dict(state)
    model = state["model"]
    experts["model"] = {key: value for key, value in model.items() if _EXPERT.fullmatch(key)}
    shared["model"] = {key: value for key, value in model.items() if not _EXPERT.fullmatch(key)}
    optimizer = state.get(OPTIMIZER)
    if optimizer is not None:
        of_experts = {index for index, name in enumerate(state[PARAMETERS]) if ".moe.experts." in name}
        states = optimizer["state"]
        experts[OPTIMIZER] = {**optimizer, "state": {n: each for n, each in states.items() if n in of_experts}}
        shared[OPTIMIZER] = {**optimizer, "state": {n: each for n, each in states.items() if n not in of_experts}}
    return experts, shared


def _read(path: str) -> dict[str, Any]:
    try:
        return dmoe.checkpoint.read_file(path)
    except (OSError, ValueError, TypeError) as error:
        raise FlagError(str(error)) from error


def _num_experts(state: dict[str, Any]) -> int:
    return next((len(value) for key, value in state.get("model", {}).items() if key.endswith(_GATE)), 0)


def _local(state: dict[str, Any]) -> int:
    return 1 + max((int(found[2]) for key in state.get("model", {}) if (found := _EXPERT.fullmatch(key))), default=-1)


def _updates(state: dict[str, Any]) -> int:
    history = state.get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def _resumable(state: dict[str, Any]) -> bool:
    return state.get(OPTIMIZER) is None or PARAMETERS in state or not _num_experts(state)
