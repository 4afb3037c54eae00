#!/usr/bin/env python
"""A small model with a mixture of experts in Accelerate's loop, its experts over ranks.

    accelerate launch --multi_gpu --num_processes 2 examples/train_accelerate.py --ep 2
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/train_accelerate.py --ep 2
    python examples/train_accelerate.py --resume runs/accelerate/state
    accelerate launch --num_processes 4 --use_fsdp --fsdp_version 2 --fsdp_cpu_ram_efficient_loading false \\
        examples/train_accelerate.py --ep 2
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dmoe
import dmoe.integrations.accelerate as on_accelerate


def main() -> list[float]:
    """Train; the losses of this rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=1, help="ranks that share the experts")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--resume", help="a state, of any number of ranks")
    parser.add_argument("--out", default="runs/accelerate")
    args = parser.parse_args()

    set_seed(0)  # alike on all ranks: so are the values that the experts are taken from
    x = torch.randn(4096, 16)
    data = TensorDataset(x, torch.sin(x @ torch.randn(16)) + x[:, 0].abs())
    layer = dmoe.MoE(
        hidden_size=32, ffn_hidden_size=64, num_experts=8, top_k=2, load_balancing_coefficient=0.01,
        load_balancing_over="global", selection_bias=True,
    )  # fmt: skip
    net: Any = nn.Sequential(nn.Linear(16, 32), layer, nn.Linear(32, 1))

    accelerator = Accelerator(gradient_accumulation_steps=2)
    net = on_accelerate.parallelize(accelerator, net, ep=args.ep)
    groups = [{"params": group} for group in dmoe.parallel.split_parameters(net) if group]
    optimizer: Any = torch.optim.AdamW(groups, lr=3e-3)
    model, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(data, batch_size=64, shuffle=True))
    if args.resume:
        accelerator.load_state(args.resume)

    losses: list[float] = []
    with dmoe.monitor(model, args.out, every=10) as monitor:  # then: python -m dmoe.report runs/accelerate
        while len(losses) < args.steps:
            for batch, target in loader:
                with monitor.step(), accelerator.accumulate(model):
                    task = nn.functional.mse_loss(model(batch).squeeze(-1), target)
                    accelerator.backward(task + dmoe.aux_loss(model))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                    if accelerator.sync_gradients:
                        dmoe.update_selection_bias(model)
                losses.append(task.item())
                if len(losses) == args.steps:
                    break
    accelerator.save_state(f"{args.out}/state")
    accelerator.print(f"loss {sum(losses[:10]) / 10:.3f} at first, {sum(losses[-10:]) / 10:.3f} at last")
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
