#!/usr/bin/env python3
"""Trains a small GPT with experts in a loop of plain PyTorch, spread over a mesh of ranks by one call.

    torchrun --nproc-per-node 2 examples/train_mesh.py --ep 2
    torchrun --nproc-per-node 8 examples/train_mesh.py --ep 4 --data ddp
    python -m dmoe.report runs/pytorch      # a page of what the experts did

On GPUs or CPUs, on bytes of Python's help topics. Any number of ranks goes on from what others saved in ``--out``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lm.data import help_topics, training_batch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy

import dmoe

BALANCE: dict[str, Any] = {"load_balancing_coefficient": 0.01, "load_balancing_over": "global", "num_moe_layers": 2}
MOE = dmoe.MoEConfig(hidden_size=64, ffn_hidden_size=64, num_experts=8, top_k=2, **BALANCE)
GPT = dmoe.models.MoEGPTConfig(256, 64, 2, 4, 256, max_positions=64, moe={0: MOE, 1: MOE})


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {**dict(zip(("model", "optim"), get_state_dict(model, optimizer), strict=True)), "steps": steps}


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts [1]")
    parser.add_argument("--data", choices=("fsdp2", "ddp"), default="fsdp2", help="what other ranks do [fsdp2]")
    parser.add_argument("--steps", type=int, default=100, help="to be reached [100]")
    parser.add_argument("--out", type=Path, default=Path("runs/pytorch"), help="[runs/pytorch]")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, sizes = dist.get_rank(), (dist.get_world_size() // given.ep, given.ep)
    mesh = init_device_mesh(device, sizes, mesh_dim_names=("replicas", "ep"))
    torch.manual_seed(0)  # alike on every rank
    model = dmoe.parallel.parallelize(dmoe.models.MoEGPT(GPT, device=device), mesh, data=given.data)
    groups = [{"params": group} for group in dmoe.parallel.split_parameters(model) if group]
    optimizer, checkpoint = torch.optim.AdamW(groups, lr=3e-3), given.out / "checkpoint"
    state = state_of(model, optimizer, 0)
    if checkpoint.exists():
        load(state, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
    corpus = help_topics()
    with dmoe.monitor(model, given.out, every=10) as monitor:
        for step in range(state["steps"], given.steps):
            ids, targets = training_batch(corpus, seed=rank, step=step, batch=8, seq_len=64)
            with monitor.step(step):
                loss = cross_entropy(model(ids.to(device)).flatten(0, 1), targets.to(device).flatten())
                (loss + dmoe.aux_loss(model)).backward()
                norm = dmoe.parallel.clip_grad_norm(model, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if rank == 0 and step % 10 == 9:
                print(f"step {step + 1}: loss {loss.item():.3f}, norm {norm.item():.3f}")
    save(state_of(model, optimizer, given.steps), checkpoint_id=checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
