"""Text from a trained model."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from .training import Run


def generate(run: Run, prompt: str, length: int = 400, temperature: float = 0.7) -> Iterator[str]:
    """Samples ``length`` bytes after ``prompt``, as text in pieces; bytes that are no UTF-8 come as U+FFFD.

    The draws come from a generator with the run's seed: the same model says the same thing. Each byte is read from the
    last ``seq_len`` ones, whose positions begin at 0 again, so there is nothing that `dmoe.models.generate` could keep.
    """
    s = run.settings
    generator = torch.Generator().manual_seed(s.seed)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokens = list(prompt.encode() or b"\n")
    bfloat16 = s.dtype == "bfloat16"
    run.model.eval()
    with torch.inference_mode(), torch.autocast(run.device.type, torch.bfloat16) if bfloat16 else nullcontext():
        for _ in range(length):
            window = torch.tensor([tokens[-s.seq_len :]], device=run.device)
            logits = run.model(window)[0, -1].float().cpu()
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
            tokens.append(token)
            yield decoder.decode(bytes([token]))
    run.model.train()
    yield decoder.decode(b"", final=True)
