"""What tests of the language-model examples share: a text, tiny sizes, a command line."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from lm.settings import Settings  # noqa: E402

TINY = Settings(
    layers=2, hidden=16, heads=2, ffn=8, experts=4, top_k=2, batch=2, seq_len=16, steps=6, warmup=2, eval_every=4,
    eval_bytes=128, dtype="float32", compare_dense=True,
)  # fmt: skip
CPU = torch.device("cpu")


def write_text(path: Path) -> Path:
    """A file of some thousand words, which a model can learn something of in a few steps."""
    words = ["def", "return", "expert", "token", "self", "=", "(", ")", "\n"]
    path.write_text(" ".join(random.Random(0).choices(words, k=4000)))
    return path


def command_line(text: Path, out: Path, *more: str) -> list[str]:
    """Of train_lm.py, at tiny sizes."""
    flags = "--layers 2 --hidden 16 --heads 2 --ffn 8 --experts 4 --top-k 2 --batch 4 --seq-len 32 --lr 0.01 --warmup 2"
    return [*flags.split(), "--eval-bytes", "512", "--dtype", "float32", "--device", "cpu",
            "--data", str(text), "--out", str(out), *more]  # fmt: skip


def never() -> bool:
    """No wish to stop."""
    return False
