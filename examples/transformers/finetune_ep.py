#!/usr/bin/env python3
"""Fine-tunes a mixture of experts of Transformers with its experts spread over ranks, from files to files.

    pip install '.[transformers,examples]' accelerate
    torchrun --nproc-per-node 2 examples/transformers/finetune_ep.py               # two minutes on two cores
    torchrun --nproc-per-node 8 examples/transformers/finetune_ep.py --model Qwen/Qwen3-30B-A3B --data notes/ --ep 8 \\
        --dtype bfloat16 --batch 1

Each of ``--ep`` ranks reads and holds its own experts, and brings its own sequences; further ranks are further such
groups. ``parallelize`` builds the model, ``save_pretrained`` writes it as plain Transformers loads it, whatever the
number of ranks. All weights are trained. Without ``--model`` the first rank trains a small one to begin with, as
finetune_peft.py does. It ends with the model in ``OUT/tuned``, and the picture ``OUT/finetune_ep.png``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from recipe import Text, UsageError, Windows, base_model, draw, held_out_sequences, loss_of, shares, text_of
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import dmoe
from dmoe.integrations.transformers import parallelize, save_pretrained


def main(given: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns its exit status: 0, or 2 for what the user can put right."""
    options = build_parser().parse_args(given)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=2))
    try:
        return run(options)
    except (UsageError, OSError, ValueError) as error:
        print(f"finetune_ep: rank {dist.get_rank()}: error: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or id of a model with experts and a tokenizer [a small one, trained first]")
    add("--data", nargs="*", default=[], metavar="PATH", help="text to fine-tune on [Python's help topics]")
    add("--out", type=Path, default=Path("runs/finetune_ep"), help="[runs/finetune_ep]")
    add("--ep", type=int, metavar="W", help="ranks that share the experts [all]")
    add("--steps", type=int, default=150, help="of fine-tuning [150]")
    add("--base-steps", type=int, default=300, help="of training the small model [300]")
    add("--batch", type=int, default=4, help="sequences of a rank in a step [4]")
    add("--seq-len", type=int, default=128, help="tokens in a sequence [128]")
    add("--lr", type=float, default=1e-3, help="learning rate [0.001]")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model [float32]")
    return parser


def run(options: argparse.Namespace) -> int:
    """The recipe itself; every rank runs it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ep = options.ep or world
    if world % ep:
        raise UsageError(f"--ep: expected a divisor of the {world} ranks, got {ep}")
    text = text_of(options.data, options.seq_len, options.model)
    start = options.model or options.out / "base"
    if rank == 0 and options.model is None:
        options.out.mkdir(parents=True, exist_ok=True)
        base_model(start, options.base_steps, options.seq_len, 8)
    dist.barrier()
    model = parallelize(start, ep=ep, fsdp=world // ep, dtype=getattr(torch, options.dtype))
    before = held_out(model, text, options.seq_len)
    model.train()
    optimizer = AdamW([{"params": group} for group in dmoe.parallel.split_parameters(model)], lr=options.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, options.steps // 10), options.steps)
    windows = Windows(text.train, options.seq_len, options.steps * options.batch, seed=rank)
    device = next(model.parameters()).device
    losses: list[tuple[int, float]] = []
    recent: list[float] = []
    bar = tqdm(range(options.steps), desc=f"fine-tuning on {world} ranks", disable=rank > 0)
    for step in bar:
        rows = [windows[step * options.batch + row]["input_ids"] for row in range(options.batch)]
        ids = torch.stack(rows).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        (loss + dmoe.aux_loss(model)).backward()
        dmoe.parallel.clip_grad_norm(model, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        recent.append(mean.item() / world)
        if len(recent) == max(1, options.steps // 50) or step + 1 == options.steps:
            losses.append((step + 1, sum(recent) / len(recent)))
            recent = []
            bar.set_postfix_str(f"loss {losses[-1][1]:.3f}")
    after = held_out(model, text, options.seq_len)
    tuned = options.out / "tuned"
    save_pretrained(model, tuned, overwrite=True)
    if rank == 0:
        held = sum(local(parameter).numel() for parameter in model.parameters() if dmoe.is_expert_param(parameter))
        note = f"On {text.name}; each rank holds {held:,} of the experts' numbers"
        picture, title = options.out / "finetune_ep.png", f"A mixture fine-tuned with its experts over {ep} ranks"
        draw(picture, title, note, losses, (before[0], after[0]), (before[1], after[1]))
        print(f"held-out loss {before[0]:.3f} -> {after[0]:.3f} nats a token; {tuned}, {picture}")
    return 0


@torch.no_grad()
def held_out(model: Any, text: Text, seq_len: int) -> tuple[float, Tensor]:
    """As recipe.py's, of sequences that ranks share; each needs as many forwards as the others."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sequences = held_out_sequences(text, seq_len)
    mine = torch.arange(rank, max(world, len(sequences) // world * world), world) % len(sequences)
    device = next(model.parameters()).device
    model.eval()
    loss, counts = torch.zeros((), device=device), None
    for ids in sequences[mine].to(device).split(4):
        loss += loss_of(model(input_ids=ids).logits, ids) * len(ids)
        layers = dmoe.reduce_metrics(model).values()  # of all ranks
        chosen = torch.stack([metrics.tokens_per_expert for metrics in layers])
        counts = chosen if counts is None else counts + chosen
    dist.all_reduce(loss)
    assert counts is not None
    return loss.item() / (len(mine) * world), shares(counts).cpu()


def local(parameter: Any) -> Tensor:
    """This rank's part of it."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


if __name__ == "__main__":
    sys.exit(main())
