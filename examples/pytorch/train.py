#!/usr/bin/env python3
"""Trains a small GPT with experts in a loop of plain PyTorch, spread over a mesh of ranks by one call.

    torchrun --nproc-per-node 2 examples/pytorch/train.py --ep 2
    torchrun --nproc-per-node 8 examples/pytorch/train.py --ep 4 --data ddp --optimizer muon

On GPUs or CPUs, on bytes of Python's help topics. The same command, with any number of ranks, goes on from what is
saved in ``--out``; ``python -m dmoe.report OUT`` makes a page of what the experts did.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

import dmoe

sys.path.append(str(Path(__file__).resolve().parents[1]))
from lm.data import help_topics, training_batch

MOE = dmoe.MoEConfig(
    hidden_size=64, ffn_hidden_size=64, num_experts=8, top_k=2, load_balancing_coefficient=0.01,
    load_balancing_over="global", num_moe_layers=2,
)  # fmt: skip
GPT = dmoe.models.MoEGPTConfig(256, 64, 2, 4, 256, max_positions=64, moe={0: MOE, 1: MOE})


def optimizers_of(model: Any, name: str) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices, each expert's by itself, and AdamW for the rest."""
    experts = {id(parameter) for parameter in model.parameters() if dmoe.is_expert_param(parameter)}
    matrices = [p for n, p in model.named_parameters() if name == "muon" and "blocks." in n and not n.endswith("bias")]
    matrices = [p for p in matrices if p.ndim >= 2]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    groups = [[p for p in rest if id(p) in experts], [p for p in rest if id(p) not in experts]]
    adamw = torch.optim.AdamW([{"params": group} for group in groups if group], lr=3e-3)
    return [adamw, dmoe.optim.PerMatrix(matrices, torch.optim.Muon, lr=0.02)] if matrices else [adamw]


def main(arguments: list[str] | None = None) -> float:
    """Train and save; the last loss of this rank's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts [1]")
    parser.add_argument("--data", choices=("fsdp2", "ddp"), default="fsdp2", help="what the other ranks do [fsdp2]")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="[adamw]")
    parser.add_argument("--steps", type=int, default=100, help="to be reached [100]")
    parser.add_argument("--out", type=Path, default=Path("runs/pytorch"), help="[runs/pytorch]")
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device, (world // given.ep, given.ep), mesh_dim_names=("replicas", "ep"))
    torch.manual_seed(0)  # alike on every rank
    model = dmoe.parallel.parallelize(dmoe.models.MoEGPT(GPT, device=device), mesh, data=given.data)
    optimizers, first, checkpoint = optimizers_of(model, given.optimizer), 0, given.out / "checkpoint"
    parts = [dict(zip(("model", "optimizers"), get_state_dict(model, optimizers), strict=True)), {"steps": 0}]
    if checkpoint.exists():
        dcp.load(state := {**parts[0], **parts[1]}, checkpoint_id=checkpoint)
        set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizers"])
        first = state["steps"]
    corpus, loss = help_topics(), torch.zeros(())
    with dmoe.monitor(model, given.out, every=10) as monitor:
        for step in range(first, given.steps):
            ids, targets = training_batch(corpus, seed=rank, step=step, batch=8, seq_len=64)
            with monitor.step(step):
                loss = cross_entropy(model(ids.to(device)).flatten(0, 1), targets.to(device).flatten())
                (loss + dmoe.aux_loss(model)).backward()
                norm = dmoe.parallel.clip_grad_norm(model, 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            if rank == 0 and step % 10 == 9:
                print(f"step {step + 1}: loss {loss.item():.3f}, norm {norm.item():.3f}")
    model_state, optimizer_state = get_state_dict(model, optimizers)
    dcp.save({"model": model_state, "optimizers": optimizer_state, "steps": given.steps}, checkpoint_id=checkpoint)
    dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main()
