#!/usr/bin/env python3
"""Trains a small language model with experts by DeepSpeed's engine, on the sources of Python's standard library.

    torchrun --nproc-per-node 2 examples/train_deepspeed.py --ep-size 2 --zero 2 --save runs/deepspeed
    deepspeed examples/train_deepspeed.py --ep-size 8 --zero 3      # all GPUs of this machine

On GPUs or CPUs. The same command again goes on from what is saved.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn

import dmoe
from dmoe.integrations.deepspeed import expert_parallel_group, initialize


class Model(nn.Module):
    """Bytes to bytes: causal attention and experts, twice."""

    def __init__(self, hidden: int, ep_size: int) -> None:
        super().__init__()
        moe = dmoe.MoEConfig(hidden_size=hidden, ffn_hidden_size=2 * hidden, num_experts=8, top_k=2)
        self.embedding, self.head = nn.Embedding(256, hidden), nn.Linear(hidden, 256)
        self.attention = nn.ModuleList(nn.MultiheadAttention(hidden, 4, batch_first=True) for _ in range(2))
        group = expert_parallel_group(ep_size)
        self.ffn = nn.ModuleList(dmoe.MoE(moe, ep_group=group, dtensor=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        """``(B, S)`` to logits ``(B, S, 256)``."""
        x, ahead = self.embedding(ids), torch.ones(2 * ids.shape[1:], dtype=torch.bool, device=ids.device).triu(1)
        for layer, (attention, ffn) in enumerate(zip(self.attention, self.ffn, strict=True)):
            normed = self.norms[2 * layer](x)
            x = x + attention(normed, normed, normed, attn_mask=ahead, need_weights=False)[0]
            x = x + ffn(self.norms[2 * layer + 1](x))
        return self.head(x)


def main() -> None:
    """Train, and save at the end."""
    parser = argparse.ArgumentParser()
    for name, default in (("--ep-size", 1), ("--zero", 2), ("--steps", 100), ("--local_rank", 0)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--save", help="folder for checkpoints")
    given = parser.parse_args()
    torch.manual_seed(0)  # alike on every rank
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": torch.cuda.is_available()},
        "zero_optimization": {"stage": given.zero},
        "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    }
    engine, *_ = initialize(model=Model(64, given.ep_size), config=config)
    if given.save and Path(given.save, "latest").exists():
        engine.load_checkpoint(given.save)
    text = bytearray().join(file.read_bytes() for file in sorted(Path(os.__file__).parent.glob("*.py")))
    data = torch.frombuffer(text, dtype=torch.uint8)
    for micro_step in range(2 * engine.global_steps, 2 * (engine.global_steps + given.steps)):
        own = torch.Generator().manual_seed(micro_step * engine.world_size + engine.global_rank)  # every rank its own
        rows = data.unfold(0, 65, 1)[torch.randint(len(data) - 65, (8,), generator=own)].long().to(engine.device)
        loss = nn.functional.cross_entropy(engine(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())
        engine.backward(loss + dmoe.aux_loss(engine.module))
        engine.step()
        if micro_step % 10 == 9 and engine.global_rank == 0:
            print(f"step {engine.global_steps}: loss {loss.item():.3f}")
    if given.save:
        engine.save_checkpoint(given.save)


if __name__ == "__main__":
    main()
