"""An optimizer's state beside a model in Hugging Face's format, for any number of ranks.

A moment has its parameter's shape, and so it is written as its parameter is: under the same names, in the same files'
format, each rank its part. Nothing in it is executed when it is read.

==============================  ====================================================================================
in the model's folder           what it is
==============================  ====================================================================================
``optimizer/state.json``        options of the parameter groups; numbers of each parameter (AdamW's ``step``), and which
                                moments it has, by the first native name of the parameter
``optimizer/exp_avg/``, ...     a folder of each kind of moment: ``model*.safetensors`` and their index
==============================  ====================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.hub_folder import HubFolder, read_json
from dmoe.integrations.transformers.parallel_links import Link, links_of, tensors_of
from dmoe.integrations.transformers.parallel_load import load
from dmoe.integrations.transformers.parallel_mesh import grid_of_model

FOLDER, STATE, _FORMAT = "optimizer", "state.json", "dmoe optimizer 1"


@dataclass(frozen=True)
class Moments:
    """An optimizer's state, by what it belongs to.

    Attributes:
        kinds: tensors in their parameters' shapes by kind, such as ``exp_avg``, and by the parameter's name.
        state: all the rest, for ``state.json``.
    """

    kinds: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def moments_of(model: Any, optimizer: torch.optim.Optimizer, links: Iterable[Link]) -> Moments:
    """An optimizer's state, taken apart.

    Raises:
        ValueError: a parameter that is not the model's, or state in another shape than its parameter's.
    """
    links_by_name = {link.name: link for link in links}
    names = _names_of(model, optimizer)
    kinds: dict[str, dict[str, Tensor]] = {}
    each: dict[str, Any] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        numbers, moments = {}, []
        for kind, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                kinds.setdefault(kind, {})[name] = value
                moments.append(kind)
            elif isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                numbers[kind] = float(value)
            else:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"save_pretrained: optimizer: expected numbers, and tensors of {name}'s shape "
                    f"{tuple(parameter.shape)}, got {kind}: {got}"
                )
        each[links_by_name[name].native[0]] = {"numbers": numbers, "moments": moments}
    groups = [
        {key: float(v) if isinstance(v, Tensor) else v for key, v in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    state = {"format": _FORMAT, "optimizer": type(optimizer).__name__, "param_groups": groups, "state": each}
    try:
        json.dumps(state)
    except TypeError as error:
        raise ValueError(f"save_pretrained: optimizer: expected options that JSON has, got: {error}") from error
    return Moments(kinds, state)


def load_optimizer(optimizer: torch.optim.Optimizer, model: Any, folder: Any, *, progress: bool = True) -> None:
    """Give an optimizer the state that :func:`save_pretrained` wrote beside a model, on any number of ranks.

    Every rank calls this, and reads the moments of what it holds. Parameters without a state in the files begin anew,
    as they would have gone on there.

    Args:
        optimizer: of ``model``'s parameters, in as many groups as the one that was saved; their options are taken.
        model: :func:`parallelize`'s.
        folder: the model's.
        progress: show a bar, on the first rank.

    Raises:
        ValueError: another kind of optimizer or number of groups; a moment that is missing or has another shape.
        OSError: files are missing, or damaged.
        RuntimeError: another rank raised one of these; the optimizer is then as it was.
    """
    grid = grid_of_model(model)
    state = grid.together(lambda: _read(optimizer, model, Path(folder) / FOLDER, progress=progress and grid.first))
    optimizer.load_state_dict(state)


def _read(optimizer: torch.optim.Optimizer, model: Any, folder: Path, *, progress: bool) -> dict[str, Any]:
    told = read_json(folder / STATE)
    kind, saved = type(optimizer).__name__, told.get("param_groups")
    if told.get("format") != _FORMAT or not isinstance(saved, list) or not isinstance(told.get("state"), dict):
        raise ValueError(f"{folder / STATE}: expected the state of an optimizer, got another file")
    if told.get("optimizer") != kind or len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"{folder / STATE}: expected the state of {kind} with {len(optimizer.param_groups)} groups of parameters, "
            f"got {told.get('optimizer')} with {len(saved)}"
        )
    names = _names_of(model, optimizer)
    links = {link.name: link for link in links_of(model)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    kinds: dict[str, dict[str, Tensor]] = {}
    for position, parameter in enumerate(parameters):
        name = names[id(parameter)]
        of_one = told["state"].get(links[name].native[0])
        if of_one is None:
            continue
        state[position] = {each: torch.tensor(number) for each, number in of_one["numbers"].items()}
        for each in of_one["moments"]:
            moment = torch.empty_like(parameter.detach())
            state[position][each] = kinds.setdefault(each, {})[name] = moment
    for each, moments in kinds.items():
        with HubFolder(folder / each) as files:
            its = [links[name] for name in moments]
            load(model, its, moments, files, may_have_more=True, progress=progress, what=each)
    groups = []
    start = 0
    for options, group in zip(saved, optimizer.param_groups, strict=True):
        made = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        groups.append(made | {"params": list(range(start, start + len(group["params"])))})
        start += len(group["params"])
    return {"state": state, "param_groups": groups}


def _names_of(model: Any, optimizer: torch.optim.Optimizer) -> Mapping[int, str]:
    """The model's names of an optimizer's parameters, by identity."""
    names = {id(tensor): name for name, tensor in tensors_of(model).items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ValueError(
                    f"optimizer: expected parameters of the model, got one of shape {tuple(parameter.shape)} that is "
                    "none of them: make the optimizer after parallelize"
                )
    return names
