"""DeepSpeed's universal checkpoints with all experts in them, for any number of ranks and any ``ep_size``."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import autoep_universal, ds_to_universal


def to_universal(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """DeepSpeed's own ``ds_to_universal``, which leaves out experts that ranks share, and these beside.

    Args:
        source: the folder of a tag (``DIR/global_step1000``) that an engine wrote under ZeRO 1 or 2, with Adam.
        target: a folder of a tag beside which ``latest_universal`` will lie; an engine whose config has
            ``{"checkpoint": {"load_universal": True}}`` loads it by ``load_checkpoint`` of the folder around.

    Raises:
        ValueError: a checkpoint that says nothing of dmoe's experts, of ZeRO 3, or with experts of different widths.
        FileNotFoundError: no checkpoint.
        FileExistsError: the target is there.
    """
    source, target = Path(source), Path(target)
    model_file = source / "mp_rank_00_model_states.pt"
    if not model_file.is_file():
        raise FileNotFoundError(
            f"to_universal: source: expected the folder of a tag, with {model_file.name}, in {source}"
        )
    if target.exists():
        raise FileExistsError(f"to_universal: target: expected a folder that is not there yet, got {target}")
    state = torch.load(model_file, map_location="cpu", weights_only=False)
    shapes = {name: tuple(shape) for group in state.get("param_shapes") or [] for name, shape in group.items()}
    told = state.get("ds_config", {}).get("dmoe")
    if told is None or not shapes:
        raise ValueError(
            f"to_universal: source: expected a checkpoint of ZeRO 1 or 2 whose config initialize() completed, got "
            f"{model_file}, which has no {'dmoe in its config' if told is None else 'shapes of parameters'}"
        )
    experts = {name: _about(name, shapes[name], number) for name, number in told["experts"].items() if name in shapes}
    degree, apart = state["dp_world_size"], bool(state["ds_config"].get("use_data_before_expert_parallelism"))
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": True, "strict": False}
    given = argparse.Namespace(
        input_folder=str(source), output_folder=str(target), inject_missing_state=True, **options
    )
    with _without(experts):
        ds_to_universal.main(given)
    autoep_universal.consolidate_autoep_zero12_expert_states(
        str(target / "tmp"), str(target), experts, shapes, degree, 1, apart
    )
    shutil.rmtree(target / "tmp")
    _forget_names(target / "zero" / "optimizer_state.pt")


def _about(name: str, shape: tuple[int, ...], num_experts: int | None) -> dict[str, int]:
    """Of a parameter of experts, how many there are, here and on all ranks."""
    if num_experts is None:
        raise ValueError(
            f"to_universal: {name}: expected experts of one width, a dimension of them, got several widths"
        )
    return {"num_experts": num_experts, "num_local_experts": shape[0], "ep_size": num_experts // shape[0]}


@contextlib.contextmanager
def _without(names: dict[str, Any]) -> Iterator[None]:
    """DeepSpeed's converter takes a tensor's parts on all ranks for parts of one tensor: not these."""
    theirs = ds_to_universal._merge_tp_slice_files

    def merge(*args: Any, exclude_param_names: Any = None) -> Any:
        return theirs(*args, exclude_param_names={*(exclude_param_names or ()), *names})

    ds_to_universal._merge_tp_slice_files = merge
    try:
        yield
    finally:
        ds_to_universal._merge_tp_slice_files = theirs


def _forget_names(file: Path) -> None:
    """Groups of parameters are named by the ranks that share experts, and an engine takes over what stands here."""
    state = torch.load(file, map_location="cpu", weights_only=False)
    for group in state["param_groups"]:
        group.pop("name", None)
    torch.save(state, file)
