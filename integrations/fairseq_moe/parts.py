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
files that have experts of its own. ``finding.py`` says which files are a checkpoint, and which of several is read.

The files of several ranks become valid together, see :func:`dmoe.checkpoint.write_together`: a training killed while it
saves leaves the checkpoint of before, or the new one, whole. They say when, and with which others, they were saved.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

import dmoe
from dmoe.integrations.fairseq_moe.flags import FlagError
from dmoe.integrations.fairseq_moe.names import OF_EXPERTS

if TYPE_CHECKING:
    from dmoe.integrations.fairseq_moe.finding import Files

OPTIMIZER = "last_optimizer_state"
# Beside the optimizer's state, which counts parameters: their names, in that order.
PARAMETERS = "optimizer_parameters"
# When a checkpoint was saved (``time``, in seconds since 1970) and, of several ranks, a ``set`` that no other one has.
SAVED = "saved"
_SUFFIXES = re.compile(r"(-rank-\d+|-shared)*(\.pt)?$")
_EXPERT = re.compile(rf"(.*\.)experts\.(\d+)\.({'|'.join(map(re.escape, OF_EXPERTS))})")
_GATE = ".gate.wg.weight"


def stem_of(path: str) -> str:
    """The name of a checkpoint without what says which part of it a file is."""
    return _SUFFIXES.sub("", path, count=1)


def take(state: dict[str, Any], files: Files, rank: int, ranks: int) -> None:
    """Put what a rank needs of the experts into a state, in place.

    Args:
        state: the content of ``files.main``.
        files: where the experts are.
        rank, ranks: who asks.

    Raises:
        FlagError: the optimizer's state cannot be divided, or another checkpoint has taken the place of this one.
    """
    check_saved(state, files, files.main)
    total = files.num_experts
    if not total or (len(files.parts) == 1 and ranks == 1):
        return
    local = total // min(ranks, total)
    first = rank % min(ranks, total) * local  # more ranks than experts: groups of E in a row
    per_file = files.local
    wanted = range(first // per_file, -(-(first + local) // per_file))
    if wanted.start * per_file % local or len(wanted) * per_file % local:
        wanted = range(len(files.parts))  # parts that do not fit into each other: cut all of it anew
    trees = []
    for path in (files.parts[n] for n in wanted):
        part = state if path == files.main else read(path)
        check_saved(part, files, path)
        trees.append(_tree(part, path))
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


def check_saved(state: Mapping[str, Any], files: Files, path: str) -> None:
    """Look whether a file is still the one that was found.

    Raises:
        FlagError: it is not, as where a training goes on saving.
    """
    if state.get(SAVED) != files.saved:
        raise FlagError(f"{path}: expected the checkpoint of {files.updates} updates, got another one, saved meanwhile")


def read(path: str, *, mapped: bool = False) -> dict[str, Any]:
    """A file's content; ``mapped`` for a look only: see :func:`dmoe.checkpoint.read_file`.

    Raises:
        FlagError: it cannot be read.
    """
    try:
        return dmoe.checkpoint.read_file(path, mapped=mapped)
    except (OSError, ValueError, TypeError) as error:
        raise FlagError(str(error)) from error


def num_experts_of(state: dict[str, Any]) -> int:
    """E, by the gates in a state; 0 where there are none."""
    return next((len(value) for key, value in state.get("model", {}).items() if key.endswith(_GATE)), 0)


def local_experts(state: dict[str, Any]) -> int:
    """How many experts a state holds."""
    return 1 + max((int(found[2]) for key in state.get("model", {}) if (found := _EXPERT.fullmatch(key))), default=-1)


def updates_of(state: dict[str, Any]) -> int:
    """Training steps that a state has seen."""
    history = state.get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def resumable(state: dict[str, Any]) -> bool:
    """Whether the optimizer's state, if any, is one that this package wrote."""
    return state.get(OPTIMIZER) is None or PARAMETERS in state or not num_experts_of(state)
