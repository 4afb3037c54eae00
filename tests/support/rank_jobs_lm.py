"""The language-model example on ranks."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from rank_jobs import plain

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from lm import checkpoint, teacher
from lm.data import load_corpus
from lm.generate import generate
from lm.model import count_parameters
from lm.ranks import ALONE, form
from lm.settings import Settings, UsageError
from lm.training import Run, train

CPU = torch.device("cpu")


def runs_of(settings, text, ranks=ALONE):
    corpus = load_corpus([text], 1_000_000, settings.seq_len)
    names = ["moe", "dense"] if settings.compare_dense else ["moe"]
    taught_by = teacher.load(settings.teacher, settings, CPU) if settings.teacher else None
    return corpus, [Run(name, settings, corpus, CPU, ranks, taught_by) for name in names]


def train_lm(group, fields, text, expert_parallel, folder, stop_at=None, resume=False, parallel="ddp"):
    """Trains up to ``stop_at``, where only the last rank wishes to stop, and saves. Curves, routing, sizes."""
    settings = Settings(**fields)
    ranks = form(expert_parallel, CPU, parallel)
    corpus, runs = runs_of(settings, text, ranks)
    for run in runs:
        run.warm_up()
    if resume:
        checkpoint.restore(checkpoint.load(Path(folder)), corpus, runs)

    def wish():
        reached = stop_at is not None and any(run.step >= stop_at for run in runs)
        return ranks.highest(2 if reached and ranks.rank == ranks.count - 1 else 0) > 0

    train(runs, lambda: None, wish)
    checkpoint.save(Path(folder), settings, corpus, runs)
    assert (Path(folder) / checkpoint.FILE).exists()  # no rank goes on before it is there
    dist.barrier()
    experts = [name for name, _ in runs[0].model.named_parameters() if ".experts." in name]
    return {
        "steps": [run.step for run in runs],
        "curves": [run.curve for run in runs],
        "routing": runs[0].routing,
        "sizes": count_parameters(runs[0].model),
        "text": "".join(generate(runs[0], "def", length=20)),
        "numbers here": sum(plain(value).numel() for value in runs[0].model.state_dict().values()),
        "experts here": {runs[0].model.get_parameter(name).shape[0] for name in experts},
    }


def save_on_a_full_disk(group, fields, text, folder):
    """What each rank is told; a checkpoint is there already."""
    settings = Settings(**fields)
    corpus, runs = runs_of(settings, text, form(1, CPU))
    checkpoint.save(Path(folder), settings, corpus, runs)

    def half(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    try:
        with patch.object(torch, "save", half):
            checkpoint.save(Path(folder), settings, corpus, runs)
    except UsageError as error:
        return str(error)
    return "saved"
