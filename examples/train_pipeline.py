#!/usr/bin/env python3
"""Trains a small GPT with experts in a pipeline of ``torch.distributed.pipelining``, whose stages may share experts.

    torchrun --nproc-per-node 4 examples/train_pipeline.py --ep 2      # 2 stages, 2 ranks each; 4 stages without --ep

On GPUs or CPUs, on bytes of Python's help topics. Every stage's layers attach their balance loss in backward.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
from lm.data import help_topics, training_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B
from torch.nn.functional import cross_entropy

import dmoe
from dmoe.parallel.pipeline import PipelineStage

HIDDEN, BLOCKS = 64, 4


class Block(nn.TransformerEncoderLayer):
    """Causal attention and an FFN, pre-norm."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``(B, S, H)`` to the same."""
        return super().forward(x, nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device), is_causal=True)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts of a stage [1]")
    parser.add_argument("--steps", type=int, default=100, help="[100]")
    given = parser.parse_args()
    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    stages = dist.get_world_size() // given.ep
    mesh = init_device_mesh(device.type, (stages, given.ep), mesh_dim_names=("pp", "ep"))
    stage, rank, pp_group = mesh["pp"].get_local_rank(), mesh["ep"].get_local_rank(), mesh["pp"].get_group()
    torch.manual_seed(0)  # alike on every rank: each builds the whole model and keeps its stage
    blocks = (Block(HIDDEN, 4, 2 * HIDDEN, dropout=0, batch_first=True, norm_first=True) for _ in range(BLOCKS))
    whole = nn.Sequential(nn.Embedding(256, HIDDEN), *blocks, nn.Linear(HIDDEN, 256))
    balance: dict[str, Any] = {"load_balancing_coefficient": 0.01, "load_balancing_over": "global"}
    dmoe.replace_ffn(whole, "[1-4]", num_experts=8, top_k=2, aux_loss="attached", num_moe_layers=BLOCKS, **balance)
    ends = [0, *(1 + (index + 1) * BLOCKS // stages for index in range(stages - 1)), len(whole)]
    model = dmoe.parallel.parallelize(whole[ends[stage] : ends[stage + 1]].to(device), mesh["ep"], data="ddp")
    schedule = Schedule1F1B(
        PipelineStage(model, stage, stages, device, group=pp_group),
        n_microbatches=4,
        loss_fn=lambda logits, targets: cross_entropy(logits.flatten(0, 1), targets.flatten()),
    )
    optimizer = torch.optim.AdamW([{"params": group} for group in dmoe.parallel.split_parameters(model) if group], 3e-3)
    corpus, last = help_topics(), stage == stages - 1
    for step in range(given.steps):
        ids, targets = training_batch(corpus, seed=rank, step=step, batch=16, seq_len=64)
        of_last: dict[str, Any] = {"target": targets.to(device), "losses": []} if last else {}
        schedule.step(*([ids.contiguous().to(device)] if stage == 0 else []), **of_last)
        optimizer.step()
        optimizer.zero_grad()
        attached = dmoe.attached_aux_loss(model, pp_group)
        if last and rank == 0 and step % 10 == 9:
            loss = torch.stack(of_last["losses"]).mean()
            print(f"step {step + 1}: loss {loss:.3f}, of all stages' balance {attached:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
