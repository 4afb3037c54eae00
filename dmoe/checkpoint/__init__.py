"""Checkpoints of MoE layers: other systems' in and out, files of ranks merged and split, all of them looked at.

    python -m dmoe.checkpoint inspect SRC
    python -m dmoe.checkpoint convert SRC DST --to dmoe
    python -m dmoe.checkpoint merge whole.pt rank0.pt rank1.pt
    python -m dmoe.checkpoint split whole.pt 4 rank{rank}.pt

``convert --help`` lists the layouts, which are known by names and files. Tensors stay in the files until they are
written again, one at a time; nothing in a file is executed.

``merge`` and ``split`` are for training states in dmoe's own names: files of ``torch.save``, of a model's
``state_dict()`` or of dicts and lists around it, with optimizers' states. With ``MoE(ep_group=...)`` each rank's holds
E / W experts of each layer, and everything else alike; the merged one is that of the same model in one process.
Parameters that are DTensors are the business of ``torch.distributed.checkpoint``.

Files that belong together become valid together, also those that a training's ranks write: :func:`write_together`.
"""

from __future__ import annotations

from dmoe.checkpoint.command import progress_bar, progress_over, run_command
from dmoe.checkpoint.convert_command import convert, read_model
from dmoe.checkpoint.files import read_file, write_file
from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.inspection import LayerPart, inspect_state
from dmoe.checkpoint.load import build_layer, load_layers
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.states import merge_states, split_state
from dmoe.checkpoint.together import finish_writing, name_of, remove_together, write_together

__all__ = [
    "LayerPart",
    "Model",
    "Options",
    "build_layer",
    "convert",
    "finish_writing",
    "inspect_state",
    "load_layers",
    "merge_states",
    "name_of",
    "progress_bar",
    "progress_over",
    "read_file",
    "read_model",
    "remove_together",
    "run_command",
    "split_state",
    "write_file",
    "write_together",
]
