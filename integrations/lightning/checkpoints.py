"""Checkpoints that every rank writes its part of, laid out as Lightning's ``ModelParallelStrategy`` lays out its own.

==================  ==================================================================================================
in the folder       what it is
==================  ==================================================================================================
``.metadata``, ...  ``torch.distributed.checkpoint``: ``state_dict``, and ``optimizer_0`` and so on by parameters' names
``meta.pt``         all the rest: loops, callbacks, hyperparameters
==================  ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from dmoe.checkpoint.sharded import load_sharded, refuse_plain_experts, write_parts

META = "meta.pt"


class ShardedCheckpoints:
    """Comes before a strategy of Lightning among the bases of a class: a checkpoint is a folder, for any ranks."""

    restore_checkpoint_after_setup = True  # experts have their places then, and the optimizer its parameters
    lightning_restore_optimizer = False  # load_checkpoint does

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state; the part of it that is here."""
        me: Any = self
        return get_model_state_dict(me.lightning_module, options=StateDictOptions(cpu_offload=True))

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """An optimizer's state by names of parameters; the part of it that is here."""
        me: Any = self
        optimizer = getattr(optimizer, "optimizer", optimizer)  # a LightningOptimizer has it inside
        return get_optimizer_state_dict(me.lightning_module, optimizer, options=StateDictOptions(cpu_offload=True))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder, together with all ranks.

        Raises:
            ValueError: experts that are plain tensors, of which nobody knows that ranks have others.
            TypeError: ``storage_options``, which are for files.
        """
        me: Any = self
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__}.save_checkpoint: storage_options: expected None for a folder")
        refuse_plain_experts(f"{type(self).__name__}.save_checkpoint", me.lightning_module)
        path = Path(me.broadcast(filepath))
        parts = {"state_dict": checkpoint.pop("state_dict")}
        for index, state in enumerate(checkpoint.pop("optimizer_states", [])):
            parts[f"optimizer_{index}"] = state
        if me.is_global_zero:
            if path.is_file():
                path.unlink()
            path.mkdir(parents=True, exist_ok=True)
        me.barrier()
        write_parts(path, parts)
        if me.is_global_zero:
            torch.save(checkpoint, path / META)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder that any number of ranks wrote into module and optimizers; the rest of it is returned.

        Raises:
            ValueError: no such folder; or training is to go on from one that has the weights alone.
        """
        me: Any = self
        path = Path(me.broadcast(checkpoint_path))
        if not (path / META).is_file():
            raise ValueError(
                f"{type(self).__name__}.load_checkpoint: expected a folder that this strategy or ModelParallelStrategy "
                f"wrote, with {META} in it, got {path}"
            )
        module = me.lightning_module
        if me.optimizers and not _has_optimizers(path):
            raise ValueError(
                f"{type(self).__name__}.load_checkpoint: expected a checkpoint with the state of optimizers, got "
                f"{path} with the weights alone (save_weights_only=True), from which no training goes on"
            )
        optimizers = {f"optimizer_{index}": (module, each) for index, each in enumerate(me.optimizers)}
        load_sharded(path, {"state_dict": module}, optimizers, strict=module.strict_loading)
        rest: dict[str, Any] = torch.load(path / META, weights_only=weights_only)
        return rest

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: :meth:`load_checkpoint` has done it."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: :meth:`load_checkpoint` has done it."""


def _has_optimizers(folder: Path) -> bool:
    return any(key.startswith("optimizer_") for key in FileSystemReader(folder).read_metadata().state_dict_metadata)
