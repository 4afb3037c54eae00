"""A finished run as the teacher of another one (MoS: Rajbhandari et al. 2022, section 4.2)."""

from __future__ import annotations

import dataclasses
import hashlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .model import ByteLM, count_parameters
from .settings import Settings, UsageError


class Teacher:
    """What a student needs of its teacher: the logits, while it is taught, and from then on the facts alone.

    Attributes:
        facts: sha256 of the weights, the text (its fingerprint) and settings that it was trained with, its
            parameters, and its last held-out figure.
    """

    def __init__(self, facts: dict[str, Any], model: ByteLM | None) -> None:
        self.facts = facts
        self._model = model

    @property
    def present(self) -> bool:
        """Whether it can still teach."""
        return self._model is not None

    def logits(self, inputs: Tensor, autocast: AbstractContextManager[Any]) -> Tensor:
        """``(B, S)`` bytes to ``(B, S, 256)``, in evaluation mode and without a gradient."""
        if self._model is None:
            raise RuntimeError(f"teacher {self.facts['folder']}: expected its model, which is not loaded any more")
        with torch.no_grad(), autocast:
            return self._model(inputs)


def load(folder: str, settings: Settings, device: torch.device) -> Teacher:
    """The mixture of a finished run, from its folder; every rank holds all of it.

    Args:
        folder: with ``checkpoint.pt``, which is read as plain tensors and values.
        settings: of the student.
        device: where it is to run.

    Raises:
        UsageError: there is no such run, it is not finished, or its sequences are shorter than the student's.
    """
    content = checkpoint.load(Path(folder), "--teacher")
    theirs, run = Settings.from_dict(content["settings"]), content["runs"]["moe"]
    if run["step"] < theirs.steps:
        raise UsageError(
            f"--teacher: {folder} holds a run that is at step {run['step']} of {theirs.steps}: finish it (--resume)"
        )
    if theirs.seq_len < settings.seq_len:
        raise UsageError(
            f"--teacher: {folder} was trained on sequences of {theirs.seq_len} bytes: expected at least --seq-len, "
            f"which is {settings.seq_len}"
        )
    model = ByteLM(dataclasses.replace(theirs, seq_len=settings.seq_len))
    model.load_state_dict(run["model"])
    facts = {
        "folder": folder,
        "sha256": _digest(run["model"]),
        "text": content["text"],
        "settings": content["settings"],
        "parameters": count_parameters(model),
        "held_out_bpb": run["curve"][-1]["held_out_bpb"],
    }
    return Teacher(facts, model.eval().requires_grad_(False).to(device))


def again(facts: dict[str, Any], settings: Settings, device: torch.device, *, needed: bool) -> Teacher:
    """The teacher of a run that goes on.

    Args:
        facts: from the run's checkpoint.
        settings: of the student.
        device: where it is to run.
        needed: whether steps are left in which it teaches; its folder may be gone otherwise.

    Raises:
        UsageError: see `load`; or it is no longer the model that it was.
    """
    if not needed:
        return Teacher(facts, None)
    teacher = load(facts["folder"], settings, device)
    if teacher.facts["sha256"] != facts["sha256"]:
        raise UsageError(f"--teacher: {facts['folder']} holds another model than the one that this run began with")
    return teacher


def _digest(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
